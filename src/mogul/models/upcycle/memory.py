"""Upcycle a dense model that is loaded: a new model beside it, filled tensor by tensor."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from mogul.models.moge.modeling_moge import MogeForCausalLM
from mogul.models.upcycle.algebra import Part, expert_matrix, ffn_part, router_name, router_weight
from mogul.models.upcycle.plan import UpcyclePlan, check_dense, moge_config


def upcycle(
    model: PreTrainedModel,
    *,
    num_experts: int,
    num_groups: int,
    top_k: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
) -> MogeForCausalLM:
    """Turn a dense language model into a MoGE that computes the same function for any router.

    The FFN is cut in `num_groups` shards; shard g is copied to every expert of group g; every
    token picks one expert a group, with weight 1. Routers start random and learn from the first
    step (`router_gradient="straight_through"`). `num_groups=1` copies the whole FFN: top-1.

    Args:
        model: Llama, Mistral, Qwen2 or Qwen3 for causal language modelling; left untouched.
        num_experts: experts in every layer (E), at least two a group.
        num_groups: groups (M); must divide E and the FFN width.
        top_k: picks a token; only `num_groups` is possible.
        seed: seed of router rows and noise.
        noise: share of each expert's inner columns drawn anew (drop-upcycling, arXiv
            2502.19261); above 0 the function is no longer the dense one.

    Raises:
        ConfigError: the model or the numbers do not fit; the message names the legal ones.
    """
    plan = UpcyclePlan(
        num_experts=num_experts, num_groups=num_groups, top_k=top_k, seed=seed, noise=noise
    )
    check_dense(model.config, type(model).__name__)
    config = moge_config(model.config, plan)
    with no_init_weights():
        moge = MogeForCausalLM._from_config(
            config,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            experts_implementation="mogul",
        )
    moge.to(model.device)  # pyright: ignore[reportArgumentType]
    moge.tie_weights()
    _fill(moge, dict(model.named_parameters()), plan)
    moge.generation_config = copy.deepcopy(model.generation_config)
    return moge.train(model.training)


@torch.no_grad()
def _fill(moge: MogeForCausalLM, dense: dict[str, Tensor], plan: UpcyclePlan) -> None:
    own: dict[str, Tensor] = dict(moge.named_parameters())
    filled = set()
    for name, weight in dense.items():
        if place := ffn_part(name):
            filled.add(_fill_experts(own, weight, *place, plan))
        else:
            own[name].copy_(weight)
            filled.add(name)
    std = moge.config.initializer_range
    for layer in range(moge.config.num_hidden_layers):
        router = own[router_name(layer)]
        router.copy_(router_weight(router.shape[1], std, layer=layer, plan=plan))
        filled.add(router_name(layer))
    assert filled == own.keys(), f"left uninitialised: {sorted(own.keys() - filled)}"


def _fill_experts(
    own: dict[str, Tensor], weight: Tensor, layer: int, part: Part, plan: UpcyclePlan
) -> str:
    """Copy the shards of one dense matrix into the fused tensor of its layer; return its name."""
    fused = "down_proj" if part is Part.DOWN else "gate_up_proj"
    name = f"model.layers.{layer}.mlp.experts.{fused}"
    experts = own[name]
    if part is not Part.DOWN:
        experts = experts.chunk(2, dim=1)[0 if part is Part.GATE else 1]
    for expert in range(plan.num_experts):
        experts[expert].copy_(expert_matrix(weight, part, layer=layer, expert=expert, plan=plan))
    return name
