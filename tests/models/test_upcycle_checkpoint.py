from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mogul.cli.upcycle import Options, run
from mogul.core.errors import ArtifactError, ConfigError
from mogul.models import new_checkpoint, tensor_file
from mogul.models.upcycle import checkpoint as checkpoint_module
from mogul.models.upcycle import jobs as jobs_module
from mogul.models.upcycle import upcycle, upcycle_checkpoint
from mogul.spec.checkpoint import read_checkpoint

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
}


def save_dense(folder: Path, name: str = "llama", **save_options: object) -> PreTrainedModel:
    cls, config_cls, extra = DENSE[name]
    torch.manual_seed(7)
    model = cls(config_cls(**SIZES, **extra)).eval()
    model.save_pretrained(folder, **save_options)
    return model


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("name", DENSE)
def test_streaming_writes_what_the_upcycled_model_saves(
    tmp_path: Path, name: str, noise: float
) -> None:
    dense = save_dense(tmp_path / "dense", name, max_shard_size="20kB")
    assert (tmp_path / "dense" / "model.safetensors.index.json").exists()
    how = {"num_experts": 12, "num_groups": 4, "seed": 3, "noise": noise}
    upcycle(dense, **how).save_pretrained(tmp_path / "memory")
    report = upcycle_checkpoint(tmp_path / "dense", tmp_path / "disk", **how, max_file_bytes=30_000)
    files = sorted((tmp_path / "disk").glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 30_000 + 20_000 for file in files)  # data and header
    got = all_tensors(tmp_path / "disk")
    assert_same_tensors(got, all_tensors(tmp_path / "memory"))
    assert report.params == sum(tensor.numel() for tensor in got.values())
    index = json.loads((tmp_path / "disk" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.num_bytes
    assert index["weight_map"].keys() == got.keys()
    configs = [json.loads((tmp_path / x / "config.json").read_text()) for x in ("disk", "memory")]
    assert configs[0] == configs[1]


def test_the_result_loads_and_computes_the_dense_function(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "qwen2")
    report = upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    moge = AutoModelForCausalLM.from_pretrained(report.folder).eval()
    ids = torch.randint(0, 67, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(moge(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
    assert report.params == moge.num_parameters()
    ffn_params = 2 * 3 * 32 * 48
    router_params = 2 * 8 * 32
    final_norm = 32  # not counted, as in `mogul info`
    assert report.active_params == dense.num_parameters() + router_params - final_norm
    assert report.params == dense.num_parameters() + router_params + 3 * ffn_params


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_kept_each_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    save_dense(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = {name: t if "norm" in name else t.to(dtype) for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    got = all_tensors(tmp_path / "out")
    assert {t.dtype for name, t in got.items() if "norm" in name} == {torch.float32}
    assert {t.dtype for name, t in got.items() if "norm" not in name} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(got["model.norm.weight"], tensors["model.norm.weight"])
    for entry in read_checkpoint(tmp_path / "out").tensors.values():
        assert entry.first_byte % (4 if entry.dtype == "F32" else 2) == 0


def test_companions_come_along_and_the_card_says_what_it_is(tmp_path: Path, capsys) -> None:
    source = tmp_path / "tiny-llama"
    save_dense(source)
    GenerationConfig(max_new_tokens=77, eos_token_id=5).save_pretrained(source)
    kept = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "LICENSE": "free"}
    for name, content in kept.items():
        (source / name).write_text(content)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (source / "README.md").write_text("the dense model")
    (source / "eval.json").write_text("{}")
    out = tmp_path / "out"
    upcycle_checkpoint(source, out, num_experts=8, num_groups=2, seed=4)
    assert all((out / name).read_text() == content for name, content in kept.items())
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 77
    assert "not copied" in (told := capsys.readouterr().err)
    assert "eval.json" in told
    card = (out / "README.md").read_text()
    assert "tiny-llama, upcycled to grouped experts" in card
    assert "8 in 2 groups, 24 inner columns each" in card
    assert "computes the dense model's function" in card
    assert "mogul upcycle tiny-llama --experts 8 --groups 2 --seed 4" in card
    upcycle_checkpoint(source, out, num_experts=8, num_groups=2, noise=0.5, force=True)
    assert "does **not** compute what the dense model computes" in (out / "README.md").read_text()


def test_memory_holds_one_dense_ffn_matrix_and_no_whole_file(tmp_path: Path, monkeypatch) -> None:
    save_dense(tmp_path / "dense")
    alive: list[int] = []
    peaks: list[int] = []
    read = tensor_file.StoredTensor.read

    def counted_read(self: tensor_file.StoredTensor) -> torch.Tensor:
        tensor = read(self)
        alive.append(self.num_bytes)
        peaks.append(sum(alive))
        weakref.finalize(tensor, alive.remove, self.num_bytes)
        return tensor

    written: list[int] = []
    write = jobs_module.write_tensor

    def counted_write(file, tensor: torch.Tensor) -> None:
        written.append(tensor.numel() * tensor.element_size())
        write(file, tensor)

    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(tensor_file.StoredTensor, "read", counted_read)
    monkeypatch.setattr(jobs_module, "write_tensor", counted_write)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    ffn_matrix_bytes = 32 * 48 * 4
    assert len(peaks) == 2 * 3  # every FFN matrix is read once, nothing else is
    assert max(peaks) == ffn_matrix_bytes
    assert max(written) == ffn_matrix_bytes // 2
    places = tensor_file.stored_tensors(tmp_path / "dense")
    chunks = list(places["lm_head.weight"].chunks())
    assert max(map(len, chunks)) == 1000


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_disk_too_small_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    save_dense(tmp_path / "dense")
    before = snapshot(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 2048, 2048))
    monkeypatch.setattr(new_checkpoint, "header_of", None)  # writing would fail with a TypeError
    with pytest.raises(ArtifactError, match=r"out needs [\d.]+ KiB but only 2\.00 KiB are free"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert snapshot(tmp_path) == before


def test_a_disk_that_fills_up_half_way_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    save_dense(tmp_path / "dense")
    before = snapshot(tmp_path)
    write, calls = jobs_module.write_tensor, []

    def failing_write(file, tensor: torch.Tensor) -> None:
        calls.append(tensor)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, tensor)

    monkeypatch.setattr(jobs_module, "write_tensor", failing_write)
    with pytest.raises(
        ArtifactError, match=r"No space left on device\): it needs [\d.]+ KiB, .* are free; nothing"
    ) as caught:
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert caught.value.__notes__ == ["fix: free some space or choose another place"]
    assert snapshot(tmp_path) == before


def test_a_source_that_cannot_be_read_is_not_taken_for_a_full_disk(
    tmp_path: Path, monkeypatch
) -> None:
    save_dense(tmp_path / "dense")
    source = str(tmp_path / "dense" / "model.safetensors")

    def failing_copy(*_) -> None:
        raise OSError(errno.EIO, "Input/output error", source)

    monkeypatch.setattr(checkpoint_module, "copy_files", failing_copy)
    with pytest.raises(OSError, match=rf"Input/output error: '{source}'"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_refused_before_writing(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"model\.safetensors has \d+ bytes where its header"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert snapshot(tmp_path) == before


def edit_tensors(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("llama", lambda t: t.pop("model.norm.weight"), r"lacks tensors: model\.norm\.weight"),
        (
            "llama",
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}),
            r"has surplus tensors: model\.layers\.0\.mlp\.up_proj\.bias",
        ),
        (
            "llama",
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(46, 32)}),
            r"misshaped tensors: .*up_proj\.weight \[46, 32\] instead of \[48, 32\]",
        ),
        (
            "qwen3",
            lambda t: t.update({"lm_head.weight": torch.ones(67, 32)}),
            r"lm_head\.weight differs from the embeddings",
        ),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
            "tensors of dtype I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, name, edit, words) -> None:
    save_dense(tmp_path / "dense", name)
    edit_tensors(tmp_path / "dense", edit)
    with pytest.raises(ArtifactError, match=words):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert not (tmp_path / "out").exists()


def test_harmless_leftovers_are_dropped(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "qwen3")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(tmp_path / "dense", add)
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    got = all_tensors(tmp_path / "out")
    assert "lm_head.weight" not in got
    assert not any("inv_freq" in name for name in got)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    OlmoForCausalLM(OlmoConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "olmo")
    with pytest.raises(ConfigError, match=r"OlmoForCausalLM .* cannot be upcycled"):
        upcycle_checkpoint(tmp_path / "olmo", tmp_path / "out", num_experts=8, num_groups=2)
    save_dense(tmp_path / "dense")
    upcycle_checkpoint(tmp_path / "dense", tmp_path / "moge", num_experts=8, num_groups=2)
    with pytest.raises(ConfigError, match=r"MogeForCausalLM .* mixture of experts already"):
        upcycle_checkpoint(tmp_path / "moge", tmp_path / "out", num_experts=8, num_groups=2)
    (tmp_path / "dense" / "model.safetensors").rename(tmp_path / "dense" / "model.bin")
    with pytest.raises(ArtifactError, match="holds neither"):
        upcycle_checkpoint(tmp_path / "dense", tmp_path / "out", num_experts=8, num_groups=2)
    assert not (tmp_path / "out").exists()


def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    save_dense(tmp_path / "work" / "dense")
    source, how = tmp_path / "work" / "dense", {"num_experts": 8, "num_groups": 2}
    upcycle_checkpoint(source, tmp_path / "out", **how)
    (tmp_path / "out" / "old.txt").write_text("old")
    with pytest.raises(ConfigError, match="out exists already") as caught:
        upcycle_checkpoint(source, tmp_path / "out", **how)
    assert "--force" in caught.value.__notes__[0]
    upcycle_checkpoint(source, tmp_path / "out", **how, force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    for out in (source, tmp_path / "work"):
        with pytest.raises(ConfigError, match="holds the source"):
            upcycle_checkpoint(source, out, **how, force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    with pytest.raises(ConfigError, match="is no checkpoint"):
        upcycle_checkpoint(source, tmp_path / "notes", **how, force=True)
    assert (tmp_path / "notes" / "diary.txt").exists()


def test_the_verb_prints_what_it_wrote(tmp_path: Path, capsys) -> None:
    save_dense(tmp_path / "dense")
    options = Options(
        model=str(tmp_path / "dense"), experts=8, groups=2, out=tmp_path / "out", format="json"
    )
    assert run(options) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["experts"], row["groups"], row["expert width"]) == (8, 2, 24)
    assert row["bytes"] == sum(t.numel() * 4 for t in all_tensors(tmp_path / "out").values())
