"""The experts layer in steps, for callers that move rows between devices around them.

Picks can be sorted before their tokens have arrived, and each token's sum is written straight into
the memory of the device that it came from: no sum is stored here to be read and sent again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton.launch import aligned, cdiv, device_index, even_block
from mogul.kernels.triton.layer import Layer, layer_of
from mogul.kernels.triton.plans import Plan, plan_for
from mogul.kernels.triton.push_kernels import push_sums, take_picks
from mogul.kernels.triton.sorting import Sorted

_TAKEN = 1024


@dataclass(frozen=True)
class Picks:
    """What is known of a call before its tokens: the picks of these experts, sorted.

    Very few picks are not: each then reads its expert on its own.
    """

    layer: Layer
    plan: Plan
    ids: Tensor
    weights: Tensor
    sort: Sorted | None


def take(ids: Tensor, weights: Tensor, columns: slice, first: int, gate_up: Tensor) -> Picks:
    """The picks [T, A] in some columns of all ranks' picks [T, K], of the experts from `first` on.

    `weights` are float32, `gate_up` [E, 2F, D] is of the dtype that tokens will have.
    """
    ids, weights = ids.contiguous(), weights.contiguous()
    tokens, width = ids.shape
    share = len(range(width)[columns])
    layer = _layer(gate_up.dtype, gate_up, share)
    local = torch.empty((tokens, share), dtype=torch.int32, device=ids.device)
    taken = torch.empty_like(local, dtype=weights.dtype)
    kernel: Any = take_picks
    kernel[(cdiv(local.numel(), _TAKEN),)](
        ids, weights, local, taken, local.numel(), first, columns.indices(width)[0],
        K=width, A=share, E=gate_up.shape[0], BLOCK=_TAKEN,
    )  # fmt: skip
    plan = plan_for(layer.shape, tokens)
    sort = None if layer.shape.uses_few(tokens) else layer.sort(local, plan.rows)
    return Picks(layer, plan, local, taken, sort)


def few(picks: Picks, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sums [T, D] of picks that are not sorted."""
    return picks.layer.few(aligned(x), gate_up, down, picks.ids, picks.weights)


def products(picks: Picks, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each slot's output [T * A, D], not yet weighted."""
    layer, slots = picks.layer, picks.ids.numel()
    assert picks.sort is not None
    x = aligned(x)
    act = x.new_empty((slots, layer.shape.inner))
    layer.up(picks.plan, x, gate_up, act, act, picks.sort, save=False)
    y = x.new_empty((slots, layer.shape.width))
    layer.product(picks.plan, picks.plan.down, act, down, y, picks.sort, transposed=False)
    return y


def push(
    picks: Picks, y: Tensor, more: Tensor | None, addresses: Tensor, own: Tensor, rank: int
) -> None:
    """Sum each token's outputs (and its row of `more`) into the memory of its rank, or `own`."""
    tokens, width = own.shape
    ranks = picks.ids.shape[0] // tokens
    block = even_block(width)
    plus = y if more is None else more.contiguous()
    kernel: Any = push_sums
    kernel[(ranks * tokens, cdiv(width, block))](
        y, picks.ids, picks.weights, plus, addresses, own, rank, tokens,
        D=width, K=picks.ids.shape[1], E=picks.layer.shape.experts, RANKS=ranks, BLOCK_D=block,
        MORE=more is not None, num_warps=max(1, block // 256),
    )  # fmt: skip


def _layer(dtype: torch.dtype, gate_up: Tensor, picks: int) -> Layer:
    experts, double, width = gate_up.shape
    device = device_index(gate_up)
    dtypes = (dtype, torch.int32, torch.float32)
    return layer_of(experts, picks, width, double // 2, dtypes, device)
