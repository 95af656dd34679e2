"""Weights quantised while an engine loads: as if quantised afterwards, one layer at a time."""

from __future__ import annotations

import copy
import json
import weakref
from typing import Any

import pytest
import torch

from mogul.bench.serve_floor import weights_of
from mogul.core.errors import ArtifactError, ConfigError
from mogul.models import quantise_load
from mogul.models.quantise import PackedExperts, quantise_model
from mogul.models.quantise_head import PackedHead, quantise_head
from mogul.models.quantise_linears import PackedLinear, quantise_linears
from mogul.serve import Engine, SamplingParams
from mogul.serve.fuse import fuse_linears
from mogul.serve.loading import random_model

SMALL: dict[str, Any] = {"max_sequences": 4, "step_tokens": 24, "cache_tokens": 400, "page_size": 4}
GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=0)
FAMILIES = {"llama": (PackedLinear,), "moge": (PackedLinear, PackedExperts)}


def folder_of(tiny, family, path):
    model = copy.deepcopy(tiny.model(family))
    model.set_attn_implementation("sdpa")
    model.save_pretrained(path)
    return model.eval()


def packed_twin(tiny, family, path):
    """A family's model in fp8, whose folder still holds what it was packed from."""
    model = folder_of(tiny, family, path)
    if PackedExperts in FAMILIES[family]:
        quantise_model(model, "fp8")
    quantise_linears(model)
    return model


def count(model, kind) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_says_what_the_quantised_module_says(tiny, family, tmp_path):
    twin = packed_twin(tiny, family, tmp_path)
    engine = Engine.from_pretrained(tmp_path, quantise="fp8", device="cpu", **SMALL)
    for kind in FAMILIES[family]:
        assert count(engine.runner.model, kind) == count(twin, kind) > 0
    check(engine, twin, tiny.prompts(5, 30))
    assert fuse_linears(engine.runner.model, torch.device("cpu")) > 0, "packed layers join too"
    check(engine, twin, tiny.prompts(7, 21))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_with_a_head_in_bytes_says_what_the_quantised_module_says(tiny, family, tmp_path):
    twin = packed_twin(tiny, family, tmp_path)
    embedding = twin.get_input_embeddings().weight.clone()
    quantise_head(twin)
    assert torch.equal(twin.get_input_embeddings().weight, embedding), "a tied one is kept"
    engine = Engine.from_pretrained(tmp_path, quantise="fp8-all", device="cpu", **SMALL)
    packed = engine.runner.model.get_output_embeddings()
    assert torch.equal(packed.words, twin.get_output_embeddings().words)
    assert weights_of(engine.runner.model).dense_bytes < weights_of(tiny.model(family)).dense_bytes
    check(engine, twin, tiny.prompts(5, 30))


def check(engine, twin, prompts) -> None:
    """Every token is the twin's likeliest, or within rounding of it, at its log-probability."""
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert answer.finish == "length", answer.error
        with torch.no_grad():
            logits = twin(torch.tensor([[*prompt, *answer.token_ids]])).logits[0]
        want = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        picked = want.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        got = torch.tensor([one.logprob for one in answer.logprobs])
        # rounding to e4m3 turns differences of 1e-7 into steps of a row's quantum now and then
        assert float((got - picked).abs().median()) < 2e-3
        assert float((want.amax(-1) - picked).max()) < 0.1


@pytest.mark.parametrize("load", ["checkpoint", "random"])
def test_no_two_layers_are_whole_at_once(tiny, load, tmp_path, monkeypatch):
    folder_of(tiny, "moge", tmp_path)
    whole: list[weakref.ref] = []
    build = quantise_load._packed

    def watched(module, *rest):
        alive = sum(one() is not None for one in whole)
        assert alive <= (0 if load == "checkpoint" else 8), "at most the rest of one block"
        whole.extend(weakref.ref(tensor) for tensor in own(module))
        return build(module, *rest)

    def own(module):
        return [module.get_parameter(name) for name, _ in module.named_parameters()]

    monkeypatch.setattr(quantise_load, "_packed", watched)
    engine = Engine.from_pretrained(tmp_path, quantise="fp8", load=load, device="cpu", **SMALL)
    assert len(whole) > 10
    assert not any(one() is not None for one in whole)
    assert engine.generate([[5, 6, 7]], GREEDY)[0].finish == "length"


@pytest.mark.parametrize("name", quantise_load.WEIGHTS)
def test_random_weights_of_every_format(tiny, name, tmp_path):
    folder_of(tiny, "qwen3_moe", tmp_path)
    settled: dict[str, Any] = {"dtype": "float32", "device": "cpu", "experts": "mogul"}
    model = random_model(tmp_path, quantise=name, **settled)
    assert count(model, PackedExperts) == 2
    assert count(model, PackedLinear) == (8 if name in ("fp8", "fp8-all") else 0)
    assert count(model, PackedHead) == (name == "fp8-all")
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5]])).logits
    assert logits.isfinite().all()
    assert float(logits.std()) > 1e-3
    assert count(random_model(tmp_path, **settled), PackedExperts) == 0, "classes build as before"


def test_a_model_that_reads_pictures_too_is_refused(tmp_path):
    text = {"model_type": "qwen3_vl_moe_text", "num_hidden_layers": 2, "hidden_size": 32}
    config = {"model_type": "qwen3_vl_moe", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="'qwen3_vl_moe' is no causal language model"):
        Engine.from_pretrained(tmp_path, load="random", device="cpu")


def test_an_unknown_format_is_refused(tiny, tmp_path):
    folder_of(tiny, "llama", tmp_path)
    with pytest.raises(ConfigError, match="quantise 'fp4' is unknown"):
        Engine.from_pretrained(tmp_path, quantise="fp4", device="cpu")
    with pytest.raises(ConfigError, match="no routed experts"):
        Engine.from_pretrained(tmp_path, quantise="int4-32", device="cpu")


def test_an_engine_rounds_by_the_statistics_beside_the_checkpoint(tiny, tmp_path, capsys):
    from mogul.models.input_stats import measure_stats, read_stats

    twin = folder_of(tiny, "moge", tmp_path)
    ids = [torch.tensor(tiny.prompts(40, 40)) for _ in range(2)]
    opened = {"quantise": "fp8", "device": "cpu", **SMALL}
    assert "rounding is coarser" in told_by(capsys, tmp_path, opened)
    measure_stats(twin, ids, checkpoint=tmp_path).save(tmp_path)
    stats = read_stats(tmp_path)
    assert stats is not None
    quantise_model(twin, "fp8", importance=stats.importance)  # type: ignore[arg-type]
    quantise_linears(twin, stats.importance)  # type: ignore[arg-type]
    engine = Engine.from_pretrained(tmp_path, **opened)
    assert "rounding by the inputs of 160 tokens" in capsys.readouterr().err
    check(engine, twin, tiny.prompts(5, 30))
    for name, module in twin.named_modules():
        if isinstance(module, PackedLinear):
            packed = engine.runner.model.get_submodule(name)
            assert torch.equal(packed.value.view(torch.uint8), module.value.view(torch.uint8))


def told_by(capsys, path, opened) -> str:
    Engine.from_pretrained(path, **opened).close()
    return capsys.readouterr().err


def test_statistics_that_nothing_needs_are_refused(tiny, tmp_path):
    from mogul.core.errors import ArtifactError

    folder_of(tiny, "moge", tmp_path)
    with pytest.raises(ConfigError, match="are for quantising"):
        Engine.from_pretrained(tmp_path, statistics=tmp_path, device="cpu")
    with pytest.raises(ArtifactError, match=r"holds no input_stats"):
        Engine.from_pretrained(tmp_path, statistics=tmp_path, quantise="fp8", device="cpu")
