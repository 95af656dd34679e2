"""Statistics of what linear layers multiply, and what they mend."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mogul.models.quantise_linears import linear_inputs, linear_modules, quantise_linears


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_means_are_over_all_tokens_of_all_batches() -> None:
    model = tiny()
    batches = list(torch.randint(0, 64, (3, 2, 9)))
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].flatten(0, 1)))
    found = linear_inputs(model, batches)
    hook.remove()
    assert set(found) == {name for name, _ in linear_modules(model)}
    want = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], want)
    assert not layer._forward_pre_hooks


def test_large_inputs_meet_better_rounded_weights() -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[7] = 60.0
    batches = list(torch.randint(0, 64, (2, 4, 16)))
    importance = linear_inputs(model, batches)
    errors = []
    for given in (None, importance):
        packed = copy.deepcopy(model)
        quantise_linears(packed, given)
        error = 0.0
        for name, linear in linear_modules(model):
            twin = packed.get_submodule(name)
            rounded = twin.value.float() * twin.scale[:, None]
            error += float((importance[name] * (rounded - linear.weight.detach()).square()).sum())
        errors.append(error)
    assert errors[1] < 0.8 * errors[0]
