"""Checkpoints in fp8: what is written, what is read, and what other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mogul.cli.main import main
from mogul.core.errors import ArtifactError, ConfigError
from mogul.models import MogeConfig, MogeForCausalLM, load_model, load_tokenizer
from mogul.models.input_stats import measure_stats, read_stats
from mogul.models.load import load_config
from mogul.models.quantise_linears import PackedLinear
from mogul.models.quantise_load import load_quantised, weight_format
from mogul.models.quantised_read import load_stored
from mogul.models.quantised_write import quantise_checkpoint
from mogul.serve import Engine, SamplingParams
from mogul.serve.kv_scales import KvScales, read_scales
from mogul.spec.fingerprint import weights_hash

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "num_experts": 8}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=96)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, **HEADS)),
    "moge": lambda: MogeForCausalLM(MogeConfig(**SIZES, **EXPERTS, **GROUPS)),
}
HEADS: dict[str, Any] = {"head_dim": 16}
GROUPS: dict[str, Any] = {"num_groups": 2}
FORMATS = ("fp8", "fp8-experts", "fp8-w8a16")
IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 9], [1, 1, 2, 3, 5, 8, 13]])


def saved(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(3)
    MODELS[name]().to(dtype).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_equal_models(got: Any, want: Any) -> None:
    left, right = got.state_dict(), want.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        assert left[name].dtype == tensor.dtype, name
        assert torch.equal(left[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert torch.equal(logits(got), logits(want))


@pytest.mark.parametrize(
    ("name", "format"),
    [("llama", "fp8"), *((name, f) for name in ("qwen3_moe", "moge") for f in FORMATS)],
)
def test_what_is_read_is_what_quantising_while_loading_makes(
    tmp_path: Path, name: str, format: str
) -> None:
    source = saved(tmp_path / "source", name)
    report = quantise_checkpoint(source, tmp_path / "out", format, max_file_bytes=60_000)
    parts = list(report.folder.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert {part.stat().st_mode for part in parts} == {(source / "config.json").stat().st_mode}
    what = weight_format(format)
    want = load_quantised(source, what.experts, linears=what.linears)
    assert_equal_models(load_stored(report.folder), want)
    held = sum(t.nbytes for f in report.folder.glob("*.safetensors") for t in load_file(f).values())
    assert report.num_bytes == held < report.source_bytes
    assert report.experts == (0 if name == "llama" else 2)


def test_statistics_round_the_file_as_they_round_while_loading(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    measure_stats(load_model(source), [IDS], checkpoint=source).save(source)
    stats = read_stats(source)
    quantise_checkpoint(source, tmp_path / "told", importance=stats)
    quantise_checkpoint(source, tmp_path / "blind")
    told = load_stored(tmp_path / "told")
    assert_equal_models(told, load_quantised(source, "fp8", linears=True, importance=stats))
    assert not torch.equal(logits(told), logits(load_stored(tmp_path / "blind")))


def test_the_engine_opens_it_without_a_word_about_formats(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe", torch.float32)
    quantise_checkpoint(source, tmp_path / "out")
    small: dict[str, Any] = {"max_sequences": 2, "cache_tokens": 64, "device": "cpu"}
    greedy = SamplingParams(max_tokens=6, temperature=0)
    engines = (
        Engine.from_pretrained(tmp_path / "out", **small),
        Engine.from_pretrained(source, quantise="fp8", **small),
    )
    said = [engine.generate(IDS.tolist(), greedy) for engine in engines]
    assert [o.token_ids for o in said[0]] == [o.token_ids for o in said[1]]


def test_the_folder_says_what_others_ask_for(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "LICENSE").write_text("free")
    quantise_checkpoint(source, tmp_path / "out", "fp8-experts")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    scheme = content.pop("quantization_config")
    assert content == json.loads((source / "config.json").read_text())
    assert (scheme["quant_method"], scheme["format"]) == ("compressed-tensors", "float-quantized")
    assert {"lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.q_proj"} <= {
        *scheme["ignore"]
    }
    assert not any("experts" in name for name in scheme["ignore"])
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.experts.7.down_proj.weight"
    assert (tensors[name].dtype, tensors[name].shape) == (torch.float8_e4m3fn, (64, 48))
    scale = tensors[f"{name}_scale"]
    assert (scale.dtype, scale.shape) == (torch.float32, (64, 1))
    whole = load_file(source / "model.safetensors")[name].float()
    assert ((tensors[name].float() * scale - whole).norm() / whole.norm()) < 0.03
    assert (tmp_path / "out" / "LICENSE").read_text() == "free"
    assert "mogul quantise source --to fp8-experts" in (tmp_path / "out" / "README.md").read_text()


def rewritten(folder: Path, change: Any, scheme: dict[str, Any] | None = None) -> Path:
    """The checkpoint with its tensors passed through `change`, its scheme updated."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= scheme or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_scales_in_16_bits_and_of_whole_matrices_are_read(tmp_path: Path) -> None:
    """As other programs write them."""
    source = saved(tmp_path / "source", "qwen3_moe", torch.float32)
    out = quantise_checkpoint(source, tmp_path / "out").folder
    wide: dict[str, torch.Tensor] = {}

    def others(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith("_scale")]:
            weight = name.removesuffix("_scale")
            if "down_proj" in name:  # one scale a matrix
                whole = tensors[weight].float() * tensors[name]
                tensors[name] = (whole.abs().max() / 448).reshape(1)
                tensors[weight] = (whole / tensors[name]).to(torch.float8_e4m3fn)
            else:
                tensors[name] = tensors[name].bfloat16()
            wide[weight] = tensors[weight].float() * tensors[name].float()
        return tensors

    got = load_stored(rewritten(out, others))
    twin = MODELS["qwen3_moe"]().eval()
    tensors = load_file(source / "model.safetensors") | wide
    twin_folder = tmp_path / "twin"
    twin.save_pretrained(twin_folder)
    save_file(tensors, twin_folder / "model.safetensors", metadata={"format": "pt"})
    want = logits(load_model(twin_folder))  # the same weights, inputs not rounded
    assert ((logits(got) - want).norm() / want.norm()) < 0.06
    experts: Any = got.model.layers[1].mlp.experts
    row = experts.experts.down.dequantise(experts.format, torch.float32, 3)
    assert torch.equal(row, wide["model.layers.1.mlp.experts.3.down_proj.weight"])


def test_linear_layers_whose_inputs_stay_wide_are_widened(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "llama")
    out = quantise_checkpoint(source, tmp_path / "out").folder
    packed = load_stored(out)
    content = json.loads((out / "config.json").read_text())
    group = content["quantization_config"]["config_groups"]["group_0"] | {"input_activations": None}
    model = load_stored(rewritten(out, dict, {"config_groups": {"group_0": group}}))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    one: Any = packed.model.layers[0].mlp.up_proj
    want = (one.value.float() * one.scale[:, None]).bfloat16()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, want)


def without(name: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


DOWN = "model.layers.0.mlp.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(f"{DOWN}_scale"), rf"1 weights have no scale \({DOWN}\)"),
        (without(DOWN), f"{DOWN} is missing"),
        (lambda t: t | {f"{DOWN}_scale": torch.ones(7, 1)}, "has 7 numbers for 64 channels"),
        (lambda t: t | {f"{DOWN}_scale": torch.full((64, 1), torch.nan)}, "that are no scales"),
        (lambda t: t | {DOWN: t[DOWN][:, :40].contiguous()}, r"\[64, 40\], not e4m3 \[64, 48\]"),
        (
            lambda t: (
                t
                | {
                    "lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn),
                    "lm_head.weight_scale": torch.ones(96, 1),
                }
            ),
            r"1 weights in 8 bits that mogul keeps in 16 \(lm_head.weight\)",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: Any, words: str) -> None:
    out = quantise_checkpoint(saved(tmp_path / "source", "qwen3_moe"), tmp_path / "out").folder
    with pytest.raises(ArtifactError, match=words):
        load_stored(rewritten(out, change))


def scheme(**group: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    whole: dict[str, Any] = {"weights": weights, "input_activations": inputs}
    whole["output_activations"] = {}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {k: v | group.get(k, {}) for k, v in whole.items()}},
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quant_method": "awq"}, "is quantised by 'awq', which mogul cannot read"),
        ({"quant_method": "compressed-tensors"}, "has no config_groups"),
        (
            scheme() | {"config_groups": {"group_0": {"weights": 7}}},
            "stores weights as float-quantized, None None bits",
        ),
        (scheme() | {"format": "pack-quantized"}, "stores weights as pack-quantized, float 8 bits"),
        (scheme(weights={"num_bits": 4, "type": "int"}), "float-quantized, int 4 bits"),
        (scheme(weights={"strategy": "block"}), "scales weights by block; mogul reads one scale"),
        (scheme(input_activations={"strategy": "tensor"}), "scales inputs by tensor, float 8 bits"),
        (scheme(input_activations={"dynamic": False}), "has fixed scales of inputs"),
        (scheme(output_activations={"num_bits": 8}), "rounds outputs; mogul leaves them"),
    ],
)
def test_schemes_that_mogul_lacks_are_named(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    folder = saved(tmp_path, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    with pytest.raises(ArtifactError, match=words):
        load_stored(folder)


def test_what_cannot_be_written_or_opened_otherwise(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    with pytest.raises(ConfigError, match="int4-64 has no form in a file") as refused:
        quantise_checkpoint(source, tmp_path / "out", "int4-64")
    assert "quantise='int4-64' while loading" in refused.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    out = quantise_checkpoint(source, tmp_path / "out").folder
    with pytest.raises(ConfigError, match="exists already"):
        quantise_checkpoint(source, out)
    with pytest.raises(ConfigError, match="is quantised already"):
        quantise_checkpoint(out, tmp_path / "again")
    with pytest.raises(ConfigError, match="is quantised already"):
        load_quantised(out, "fp8")
    with pytest.raises(ArtifactError, match=r"is quantised \(compressed-tensors\); such a model"):
        load_model(out)
    with pytest.raises(ConfigError, match="is not quantised"):
        load_stored(source)
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        load_tokenizer(out)


def test_experts_stored_together_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(**SIZES, intermediate_size=48, head_dim=16, num_local_experts=4)
    GptOssForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ArtifactError, match="holds several experts in one tensor"):
        quantise_checkpoint(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path / "source", "llama")
    out = quantise_checkpoint(source, tmp_path / "out").folder
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mogul.models.quantised_write.write_tensor", failing)
    with pytest.raises(ArtifactError, match="no space left"):
        quantise_checkpoint(source, out, force=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    args = ["quantise", str(source), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*args, "--to", "fp8-w8a16", "--format", "json"]) == 0
    told = capsys.readouterr()
    row = json.loads(told.out)["rows"][0]
    assert (row["weights"], row["layers of experts"], row["linear layers"]) == ("fp8-w8a16", 2, 0)
    assert row["bytes"] < row["bytes before"]
    assert "rounding is coarser (mogul calibrate" in told.err
    assert main(args) == 2
    assert "exists already" in capsys.readouterr().err
    assert load_config(tmp_path / "out").model_type == "qwen3_moe"


def test_the_verb_carries_scales_of_these_weights_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = saved(tmp_path / "source", "llama"), tmp_path / "out"
    args = ["quantise", str(source), "--out", str(out), "--device", "cpu"]
    keys, values = ((torch.full((1,), n), torch.full((1,), 2 * n)) for n in (0.25, 0.75))
    KvScales(keys, values, "of others").save(source)
    assert main(args) != 0
    assert "was measured on other weights" in capsys.readouterr().err
    assert not out.exists()
    KvScales(keys, values, weights_hash(source)).save(source)
    assert main(args) == 0
    carried = read_scales(out, checkpoint=out)
    assert carried is not None
    assert (carried.keys, carried.values) == (keys, values)
