"""The tensors of an upcycled layer, each as a pure function of one dense matrix.

A dense FFN computes down(act(gate x) * up x), a sum over its I inner columns. Cut in M shards of
F = I/M columns, shard g is a small FFN of its own, and the sum of all M shards is the dense FFN.
Every expert of group g gets a copy of shard g; a router that picks one expert in each group, each
with weight 1, therefore computes the dense function whatever its logits are.

Drop-upcycling (arXiv 2502.19261) gives up that equality for diversity: in every expert a share r
of the inner columns is drawn anew from a normal distribution with the mean and the standard
deviation of the entries it replaces. Everything random follows from (seed, layer, expert), so
layers can be built alone, in any order, with the same result.

Legend: I dense inner columns, F inner columns of an expert, D hidden, E experts, R redrawn columns.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mogul.models.upcycle.plan import UpcyclePlan


class Part(IntEnum):
    """What is drawn at random; the numbers enter the seeds and never change."""

    COLUMNS = 0
    GATE = 1
    UP = 2
    DOWN = 3
    ROUTER = 4


_DRAWN: Any = {"dtype": torch.float32, "device": "cpu"}
"""The same numbers whatever PyTorch's defaults are."""
_PARTS = {"gate_proj": Part.GATE, "up_proj": Part.UP, "down_proj": Part.DOWN}
_FFN_NAME = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")


def ffn_part(name: str) -> tuple[int, Part] | None:
    """Tell layer and part of a dense FFN matrix by its tensor name; None for other tensors."""
    match = _FFN_NAME.fullmatch(name)
    return (int(match[1]), _PARTS[match[2]]) if match else None


def router_name(layer: int) -> str:
    """Name the router matrix of a layer, on disk and in memory."""
    return f"model.layers.{layer}.mlp.gate.weight"


def expert_matrix(
    weight: Float[Tensor, "A B"], part: Part, *, layer: int, expert: int, plan: UpcyclePlan
) -> Float[Tensor, "a b"]:
    """Cut one matrix of one expert out of the dense matrix of the same part.

    Args:
        weight: the dense gate or up matrix [I, D], or the down matrix [D, I].
        part: which of the three it is.
        layer: index of the layer.
        expert: index of the expert; it stands in group expert // (E/M).
        plan: how many experts and groups, seed and noise.

    Returns:
        [F, D] for gate and up, [D, F] for down; a view of `weight` unless there is noise.
    """
    inner_dim = 1 if part is Part.DOWN else 0
    width = plan.expert_width(weight.shape[inner_dim])
    group = expert // plan.group_size
    shard = weight.narrow(inner_dim, group * width, width)
    if not plan.noise:
        return shard
    column_R = redrawn_columns(width, layer=layer, expert=expert, plan=plan).to(shard.device)
    old = shard.index_select(inner_dim, column_R).float()
    rng = _generator(plan.seed, layer, expert, part)
    new = torch.randn(old.shape, generator=rng, **_DRAWN).to(old.device)
    new = new * old.std(correction=0) + old.mean()
    return shard.index_copy(inner_dim, column_R, new.to(shard.dtype))


def redrawn_columns(width: int, *, layer: int, expert: int, plan: UpcyclePlan) -> Tensor:
    """Inner columns that noise draws anew in one expert, ascending, int64 [R]."""
    rng = _generator(plan.seed, layer, expert, Part.COLUMNS)
    column_F = torch.randperm(width, generator=rng, device="cpu")
    return column_F[: plan.redrawn_width(width)].sort().values


def router_weight(
    hidden_size: int, std: float, *, layer: int, plan: UpcyclePlan
) -> Float[Tensor, "E D"]:
    """Draw the router rows of one layer from N(0, std^2), in fp32."""
    rng = _generator(plan.seed, layer, 0, Part.ROUTER)
    return torch.randn(plan.num_experts, hidden_size, generator=rng, **_DRAWN) * std


def _generator(seed: int, layer: int, expert: int, part: Part) -> torch.Generator:
    state = np.random.SeedSequence([seed, layer, expert, int(part)]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
