"""Input statistics in a file beside a checkpoint: what is kept, what is refused, what they mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import mogul.models  # noqa: F401
from mogul.core.errors import ArtifactError, ConfigError
from mogul.models.expert_inputs import expert_inputs
from mogul.models.input_stats import FILE, InputStats, measure_stats, read_stats
from mogul.models.quantise import PackedExperts, experts_modules, quantise_model
from mogul.models.quantise_linears import linear_inputs, linear_modules, quantise_linears
from mogul.models.quantise_load import load_quantised

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "router_n_groups": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def make_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("moge", **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config).float().eval()


def batches() -> list[torch.Tensor]:
    return list(torch.randint(0, 64, (3, 2, 17), generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path)
    return tmp_path


def parts(found: Any) -> tuple[torch.Tensor, ...]:
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def test_the_file_gives_back_what_was_measured(folder) -> None:
    model = make_model()
    stats = measure_stats(model, batches(), checkpoint=folder, sources=["a:1"])
    assert stats.num_tokens == 3 * 2 * 17
    want: dict[str, Any] = {**expert_inputs(model, batches()), **linear_inputs(model, batches())}
    assert stats.importance.keys() == want.keys()
    assert len(want) == len([*experts_modules(model), *linear_modules(model)])
    assert stats.save(folder) == folder / FILE
    read = read_stats(folder, checkpoint=folder)
    assert read is not None
    assert (read.num_tokens, read.sources, read.unseen) == (stats.num_tokens, ("a:1",), ())
    for name, one in want.items():
        for kept, measured in zip(parts(read.importance[name]), parts(one), strict=True):
            torch.testing.assert_close(kept, measured, rtol=5e-3, atol=0)


def test_loading_rounds_by_the_file(folder) -> None:
    stats = measure_stats(make_model(), batches(), checkpoint=folder)
    stats.save(folder)
    model = make_model()
    quantise_model(model, "fp8", importance=expert_inputs(make_model(), batches()))
    quantise_linears(model, linear_inputs(make_model(), batches()))
    blind = load_quantised(folder, "fp8", linears=True)
    told = load_quantised(folder, "fp8", linears=True, importance=read_stats(folder))
    ids = batches()[0]
    with torch.no_grad():
        want, got, plain = (one(ids).logits for one in (model, told, blind))
    assert float((got - want).abs().max()) < 0.3 * float((plain - want).abs().max())


def test_an_absent_file_is_none_and_a_layer_that_never_ran_is_allowed(tmp_path) -> None:
    model = make_model(num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    assert read_stats(tmp_path) is None
    stats = measure_stats(model, batches(), checkpoint=tmp_path)
    assert stats.unseen
    assert all(".layers.2." in name for name in stats.unseen)
    stats.save(tmp_path)
    told = load_quantised(tmp_path, "int4-32", importance=read_stats(tmp_path))
    assert sum(isinstance(module, PackedExperts) for module in told.modules()) == 3


def test_statistics_of_other_weights_are_refused(folder, tmp_path_factory) -> None:
    other = tmp_path_factory.mktemp("other")
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(other)
    measure_stats(model, batches(), checkpoint=other).save(folder)
    with pytest.raises(ArtifactError, match="was measured on other weights") as caught:
        read_stats(folder, checkpoint=folder)
    assert caught.value.__notes__ == ["fix: measure them anew: mogul calibrate MODEL"]
    assert read_stats(folder, checkpoint=other) is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.down_inputs"), "of one matmul only"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.inputs"), "says nothing of 1 layers"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3)}), "lm_head.weight is no statistic"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.inputs": torch.ones(48)}),
            r"o_proj has inputs \[\(32,\)\], but statistics of \[\(48,\)\]",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.inputs": -torch.ones(32)}),
            "o_proj has statistics that are no mean squares",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_inputs": torch.ones(8, 17)}),
            r"experts has inputs \[\(8, 32\), \(8, 16\)\]",
        ),
    ],
)
def test_statistics_of_another_shape_are_refused(folder, change, words) -> None:
    from safetensors import safe_open

    path = measure_stats(make_model(), batches()).save(folder)
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    change(tensors)
    save_file(tensors, path, about)
    with pytest.raises(ArtifactError, match=words):
        load_quantised(folder, "fp8", linears=True, importance=read_stats(folder))


def test_a_damaged_file_and_an_empty_text_are_told(folder) -> None:
    (folder / FILE).write_bytes(b"not tensors at all")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_stats(folder)
    save_file({"a": torch.ones(2)}, folder / FILE)
    with pytest.raises(ArtifactError, match="holds no input statistics"):
        read_stats(folder)
    for about in ({}, {"num_tokens": "many", "weights": "", "unseen": "[]", "sources": "[]"}):
        save_file({"a.inputs": torch.ones(2)}, folder / FILE, {"format": "1", **about})
        with pytest.raises(ArtifactError, match="says not what it was measured on"):
            read_stats(folder)
    with pytest.raises(ConfigError, match="no tokens to measure"):
        measure_stats(make_model(), [])
    assert InputStats({}, 0, "").unseen == ()
