"""An fp8 cache: where its scales come from, what they mend, and that answers stay close."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mogul.core.errors import ArtifactError, ConfigError
from mogul.serve import Engine, SamplingParams
from mogul.serve.kv_scales import FILE, KvScales, find_scales, measure_scales, read_scales
from mogul.serve.options import EngineOptions

SMALL = {"max_sequences": 4, "step_tokens": 24, "cache_tokens": 400, "page_size": 4, "seed": 0}


def scaled_model(tiny, factor: float):
    """A tiny Llama whose values are `factor` times as large, and its output the same."""
    model = copy.deepcopy(tiny.model("llama"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= factor
            layer.self_attn.o_proj.weight /= factor
    return model


def logprobs(model, prompt, kv_dtype="auto", scales=None) -> torch.Tensor:
    engine = Engine(model, None, EngineOptions(**SMALL, kv_dtype=kv_dtype), kv_scales=scales)
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = engine.generate([prompt], asked)
    engine.close()
    return torch.tensor([record.logprob for record in answer.prompt_logprobs[1:]])


def measured(model, prompts) -> KvScales:
    engine = Engine(model, None, EngineOptions(**SMALL))
    scales = measure_scales(engine, prompts)
    engine.close()
    return scales


def test_fp8_pages_change_little(tiny, family):
    (prompt,) = tiny.prompts(60)
    model = copy.deepcopy(tiny.model(family))
    exact = logprobs(model, prompt)
    error = (logprobs(model, prompt, "fp8") - exact).abs()
    assert 1e-5 < float(error.mean()) < 0.3


@pytest.mark.parametrize("factor", [3e-4, 3e3])
def test_measured_scales_mend_numbers_that_e4m3_has_not(tiny, factor):
    prompts = tiny.prompts(60, 50)
    model = scaled_model(tiny, factor)
    exact = logprobs(model, prompts[0])
    lost = float((logprobs(model, prompts[0], "fp8") - exact).abs().mean())
    scales = measured(model, prompts)
    kept = float((logprobs(model, prompts[0], "fp8", scales) - exact).abs().mean())
    assert kept < 0.3
    assert kept < 0.2 * lost


def test_scales_are_powers_of_two_with_room_above_the_largest_of_each_head(tiny):
    prompts = tiny.prompts(30, 20)
    model = copy.deepcopy(tiny.model("llama"))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    scales = measured(model, prompts)
    for layer in (0, 1):
        rows = torch.cat([out for i, out in enumerate(seen) if i % 2 == layer])
        largest = rows.view(len(rows), 2, 8).abs().amax((0, 2))
        room = 448 * scales.values[layer] / largest
        assert 1.5 <= float(room.min()) <= float(room.max()) < 3
        assert set(scales.values[layer].log2().frac().tolist()) == {0.0}


def test_scales_are_kept_beside_the_checkpoint(tiny, tmp_path):
    model = copy.deepcopy(tiny.model("moge"))
    model.save_pretrained(tmp_path)
    assert read_scales(tmp_path) is None
    scales = measured(model, tiny.prompts(30))
    assert scales.save(tmp_path).name == FILE
    engine = Engine.from_pretrained(tmp_path, device="cpu", kv_dtype="fp8", **SMALL)
    for layer, cache in enumerate(engine.runner.caches):
        assert torch.equal(cache.key_scale, scales.keys[layer])
        assert torch.equal(cache.value_scale, scales.values[layer])
    engine.close()
    engine = Engine.from_pretrained(tmp_path, device="cpu", **SMALL)
    assert {cache.key_scale for cache in engine.runner.caches} == {None}
    engine.close()


def test_the_checkpoints_own_scales_are_used(tiny, tmp_path):
    tiny.model("moge").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(0.5 + layer)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([0.25])
    save_file(tensors, file, {"format": "pt"})
    engine = Engine.from_pretrained(tmp_path, device="cpu", kv_dtype="fp8", **SMALL)
    found = [(float(c.key_scale), float(c.value_scale)) for c in engine.runner.caches]
    assert found == [(0.5, 0.25), (1.5, 0.25)]
    assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].finish == "length"
    engine.close()


def test_statistics_beside_another_checkpoint_do_not_bring_its_own_scales(tmp_path):
    served, other = tmp_path / "served", tmp_path / "other"
    for folder, factor in ((served, 1.0), (other, 8.0)):
        folder.mkdir()
        names = (f"model.layers.0.self_attn.{kind}_scale" for kind in "kv")
        save_file({name: torch.tensor([factor]) for name in names}, folder / "model.safetensors")
    scales = find_scales(served, other)
    assert scales is not None
    assert scales.keys[0].tolist() == [1.0]
    with pytest.raises(ArtifactError, match="does not exist"):
        find_scales(served, tmp_path / "none")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"model.layers.0.self_attn.k_scale": 1.0}, "keys of 1 layers and values of 0"),
        (
            {"model.layers.0.self_attn.k_scale": 1.0, "model.layers.0.self_attn.v_scale": 0.0},
            "which scales nothing",
        ),
        ({"model.layers.0.weight": 1.0}, "is no scale of a layer"),
    ],
)
def test_scales_that_are_none_are_refused(tmp_path, names, words):
    save_file({name: torch.tensor([value]) for name, value in names.items()}, tmp_path / FILE)
    with pytest.raises(ArtifactError, match=words):
        read_scales(tmp_path)


def test_scales_know_the_weights_they_were_measured_on(tiny, tmp_path):
    own, other, elsewhere = (tmp_path / name for name in ("own", "other", "elsewhere"))
    for folder, factor in ((own, 1.0), (other, 2.0)):
        scaled_model(tiny, factor).save_pretrained(folder)
    engine = Engine.from_pretrained(own, device="cpu", **SMALL)
    scales = measure_scales(engine, tiny.prompts(30), checkpoint=own)
    engine.close()
    elsewhere.mkdir()
    for folder in (own, other, elsewhere):
        scales.save(folder)
    for statistics in (None, elsewhere, elsewhere / "input_stats.safetensors"):
        engine = Engine.from_pretrained(
            own, device="cpu", kv_dtype="fp8", statistics=statistics, **SMALL
        )
        assert torch.equal(engine.runner.caches[1].key_scale, scales.keys[1])
        engine.close()
        with pytest.raises(ArtifactError, match="was measured on other weights") as caught:
            Engine.from_pretrained(
                other, device="cpu", kv_dtype="fp8", statistics=statistics, **SMALL
            )
        assert caught.value.__notes__ == ["fix: measure them anew: mogul calibrate MODEL"]
    Engine.from_pretrained(other, device="cpu", **SMALL).close()  # nothing asks for them


def test_scales_of_a_model_in_memory_belong_to_any_weights(tiny, tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    one = tuple(torch.tensor([2.0]) for _ in range(2))
    KvScales(one, tuple(scale.clone() for scale in one)).save(tmp_path)
    found = read_scales(tmp_path, checkpoint=tmp_path)
    assert found is not None
    assert found.weights == ""
    assert found.of_rank(1, 2).values[1].tolist() == [2.0]


def test_a_damaged_file_of_scales_is_told(tmp_path):
    (tmp_path / FILE).write_bytes(b"cut off")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_scales(tmp_path)


def test_scales_of_another_model_are_refused(tiny):
    one, three = (torch.ones(1),), (torch.ones(3),)
    for scales, words in (
        (KvScales(one, one), "scales of 1 layers for a model of 2"),
        (KvScales(three * 2, one * 2), "3 scales for the 2 key-value heads of layer 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            logprobs(tiny.model("llama"), [1, 2], "fp8", scales)


def test_scales_are_measured_on_a_plain_cache_with_room(tiny):
    engine = tiny.engine("llama", kv_dtype="fp8")
    with pytest.raises(ConfigError, match="of the model's own dtype"):
        measure_scales(engine, [[1, 2]])
    with pytest.raises(ConfigError, match="too small for these prompts"):
        measure_scales(tiny.engine("llama"), tiny.prompts(200, 200))


def test_scales_without_fp8_pages_are_refused(tiny):
    one = torch.ones(1)
    scales = KvScales((one, one), (one, one))
    with pytest.raises(ConfigError, match="cache of the model's own dtype"):
        Engine(tiny.model("llama"), None, EngineOptions(**SMALL), kv_scales=scales)


def test_fp8_pages_are_plain_attention_over_rounded_keys_and_values(tiny):
    model = copy.deepcopy(tiny.model("llama"))

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float8_e4m3fn).to(x.dtype)

    def attend(module, query, key, value, *args, **more):
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, rounded(key), rounded(value), *args, **more)

    ALL_ATTENTION_FUNCTIONS.register("rounded", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("rounded", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    prompt = list(range(3, 40))
    found = logprobs(model, prompt, "fp8")
    want = {}
    for name in ("sdpa", "rounded"):
        model.set_attn_implementation(name)
        with torch.inference_mode():
            every = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        want[name] = every.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert (found - want["rounded"]).abs().max() < 1e-4
    assert (found - want["sdpa"]).abs().max() > 1e-3, "rounding is seen"
