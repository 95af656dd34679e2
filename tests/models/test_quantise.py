"""Models with quantised experts: in place, streamed from disk, with measured importance."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mogul.core.errors import ArtifactError, ConfigError
from mogul.kernels import dequantise_experts
from mogul.models import MogeConfig, MogeForCausalLM, load_model
from mogul.models.expert_inputs import expert_inputs
from mogul.models.quantise import PackedExperts, experts_modules, quantise_model
from mogul.models.quantise_head import quantise_head
from mogul.models.quantise_linears import quantise_linears
from mogul.models.quantise_load import _settle, load_quantised

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Moge": {"num_experts": 8, "moe_intermediate_size": 24, "router_n_groups": 2},
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "GptOss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
}
TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2, 7], [8, 8, 40, 3, 3, 21, 12]])


def build(family: str):
    torch.manual_seed(0)
    if family == "Moge":
        model = MogeForCausalLM(MogeConfig(**SMALL | FAMILIES[family]))
    else:
        config = getattr(transformers, family + "Config")(**SMALL | FAMILIES[family])
        model = getattr(transformers, family + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


def relative(got, want) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_int4_in_place_equals_the_model_with_dequantised_weights(family):
    model, twin = build(family), build(family)
    before = logits(model)
    assert quantise_model(model, "int4-32") is model
    after = logits(model)
    assert 1e-3 < relative(after, before) < 0.3
    modules = [m for m in model.modules() if isinstance(m, PackedExperts)]
    for (_, experts), quantised in zip(experts_modules(twin), modules, strict=True):
        gate_up, down = dequantise_experts(quantised.experts, torch.float32)
        if family == "GptOss":
            half = gate_up.shape[1] // 2
            gate_up = torch.stack((gate_up[:, :half], gate_up[:, half:]), 2).flatten(1, 2).mT
            down = down.mT
        with torch.no_grad():
            experts.gate_up_proj.copy_(gate_up)
            experts.down_proj.copy_(down)
    torch.testing.assert_close(after, logits(twin), atol=1e-4, rtol=1e-4)


def test_only_experts_change_and_casts_keep_the_packing():
    model = build("Moge")
    untouched = {n: p.clone() for n, p in model.named_parameters() if ".experts." not in n}
    quantise_model(model, "fp8")
    assert untouched.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(untouched[n], p) for n, p in model.named_parameters())
    experts = model.model.layers[0].mlp.experts
    assert "fp8, 8 experts, 32 -> 24 -> 32" in repr(model)
    before = experts.experts.tensors()
    model.bfloat16()
    for name, tensor in experts.experts.tensors().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.float(), before[name].float())
    assert relative(logits(model).float(), logits(build("Moge"))) < 0.3


def test_importance_is_the_mean_square_of_what_experts_see():
    model = build("Moge")
    seen = {}
    name, module = next(experts_modules(model))
    module.register_forward_pre_hook(
        lambda _m, a, k: seen.update(v=(*a, *k.values())), with_kwargs=True
    )
    found = expert_inputs(model, [TOKENS])
    assert found.keys() == {n for n, _ in experts_modules(model)}
    x, ids = seen["v"][:2]
    expert = int(ids.flatten()[0])
    rows = x[(ids == expert).any(1)]
    mean = (
        torch.stack([x[(ids == e).any(1)].square().sum(0) for e in range(8)]).sum(0) / ids.numel()
    )
    want = (rows.square().sum(0) + 32 * mean) / (len(rows) + 32)
    torch.testing.assert_close(found[name].gate_up[expert], want)
    assert found[name].down.shape == (8, 24)
    assert (found[name].down > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_name", ["fp8", "int4-64"])
def test_streaming_gives_the_same_model(family, format_name, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    importance = expert_inputs(model, [TOKENS])
    streamed = load_quantised(tmp_path, format_name, importance=importance)
    assert type(streamed) is type(model)
    want = logits(quantise_model(load_model(tmp_path), format_name, importance=importance))
    assert torch.equal(logits(streamed), want)
    assert not any(p.is_meta for p in streamed.parameters())
    assert not list(experts_modules(streamed))
    assert type(load_model(tmp_path)) is type(model)  # the class builds experts again
    assert list(experts_modules(load_model(tmp_path)))


def test_a_missing_expert_is_named(tmp_path):
    build("Qwen3Moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="1 tensors of the experts are missing"):
        load_quantised(tmp_path, "fp8")


@pytest.mark.parametrize("way", ["in place", "linears", "head", "loaded"])
def test_packed_weights_are_not_saved_as_a_checkpoint(way, tmp_path):
    model = build("Qwen3Moe")
    model.save_pretrained(tmp_path / "whole")
    if way == "loaded":
        model = load_quantised(tmp_path / "whole", "fp8")
    else:
        pack = {"in place": partial(quantise_model, format="fp8"), "linears": quantise_linears}
        pack.get(way, quantise_head)(model)
    with pytest.raises(ConfigError, match="Qwen3MoeForCausalLM holds packed weights") as caught:
        model.save_pretrained(tmp_path / "packed")
    assert "`mogul quantise` writes a checkpoint in fp8" in caught.value.__notes__[0]
    assert not (tmp_path / "packed").exists()


def test_a_whole_quantised_model_can_be_written_and_copied(tmp_path):
    model = quantise_model(build("GptOss"), "fp8")
    want = logits(model)
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(logits(again), want)
        with pytest.raises(ConfigError, match="GptOssForCausalLM holds packed weights"):
            again.save_pretrained(tmp_path / "packed")


def test_a_quantised_model_is_freed_at_once():
    model = build("Qwen3Moe")
    quantise_model(model, "fp8")
    quantise_head(model)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_dense_model_is_refused(tmp_path):
    config = transformers.LlamaConfig(**{k: v for k, v in SMALL.items() if "expert" not in k})
    dense = transformers.LlamaForCausalLM(config)
    with pytest.raises(ConfigError, match="has no routed experts"):
        quantise_model(dense, "fp8")
    dense.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no routed experts"):
        load_quantised(tmp_path, "fp8")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_kept_weights_leave_the_blocks_that_quantising_took(monkeypatch):
    done = []

    class OnDevice(torch.nn.Module):
        def buffers(self, recurse=True):
            return iter([torch.empty(1, device="meta") if self.is_meta else Somewhere()])

        def _apply(self, fn, recurse=True):
            done.append(fn)
            return self

    class Somewhere:
        device = type("Device", (), {"type": "accelerator"})

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: done.append("empty"))
    module = OnDevice()
    module.is_meta = True
    _settle(module)
    assert done == []
    module.is_meta = False
    _settle(module)
    assert done == ["empty", torch.clone], "first what is free, or the copy would take a hole"
