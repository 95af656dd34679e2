"""Routed experts and a shared one in fp8 as one operator, `mogul::moe_quantised_shared`.

Both read the same rows, which are rounded once. In captured steps, and where the work outlasts its
launches, the shared expert runs on a second stream: a step of few tokens is a chain of short
launches, and the reading of the shared weights fills the gaps of the other chain. With the router
inside (`mogul::moe_routed_shared`) it fills those of the routing as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.side_by_side import side_by_side
from mogul.kernels.triton import quant_kernels
from mogul.kernels.triton.launch import Launch, aligned, device_index, next_power_of_2
from mogul.kernels.triton.linear import has_pdl, linear_fp8
from mogul.kernels.triton.quant_layer import SILU, Weights, rounded_rows, run_quantised

_COLUMNS = 8192


def _run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """What the routed experts give and what the shared one gives, [T, D] each.

    `tensors` are the experts' (gate_up, its scale, down, its scale), ids, weights and the shared
    expert's, as the experts'.
    """
    ids, weights = tensors[4:6]
    return _beside(x, tensors[:4], tensors[6:], lambda: (ids, weights))


def _run_routed(
    x: Tensor,
    rows: Tensor,
    router: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rule: list[int],
    factor: float,
    *tensors: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same, picking first: `router` multiplies `rows`, the rest is as in `mogul::route`."""

    def pick() -> tuple[Tensor, Tensor]:
        logits = torch.ops.mogul.linear(rows, router, torch.float32)
        ids, weights, _, _ = torch.ops.mogul.route(logits, bias, scale, rule, factor)
        return ids, weights

    return _beside(x, tensors[:4], tensors[4:], pick)


def _beside(
    x: Tensor,
    experts: Sequence[Any],
    shared: Sequence[Any],
    pick: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    x = aligned(x)
    if not len(x):
        return torch.empty_like(x), torch.empty_like(x)
    rows = rounded_rows(x)

    def of_picked() -> Tensor:
        return run_quantised(x, _weights(experts), *pick(), rows)

    return side_by_side(of_picked, lambda: _of_all(x, rows, shared), x)


def parts(
    x: Tensor,
    rounded: tuple[Tensor, Tensor],
    experts: Sequence[Any],
    shared: Sequence[Any],
    pick: Callable[[], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every pick gives [T * K, D], what the shared expert gives, ids, weights of the picks."""
    picks: list[tuple[Tensor, Tensor]] = []

    def of_picked() -> Tensor:
        picks.append(pick())
        return run_quantised(x, _weights(experts), *picks[0], rounded, summed=False)

    out, more = side_by_side(of_picked, lambda: _of_all(x, rounded, shared), x)
    return out, more, *picks[0]


def _weights(experts: Sequence[Any]) -> Weights:
    up, up_scale, down, down_scale = experts
    return Weights(up, up_scale, down, down_scale, None, None, 0, SILU, 0.0, 0.0)


def _of_all(x: Tensor, rounded: tuple[Tensor, Tensor], shared: Sequence[Any]) -> Tensor:
    """The shared expert."""
    up, up_scale, last, last_scale = shared
    both = linear_fp8(*rounded, up, up_scale, x.dtype)
    return linear_fp8(*gated_rows(both), last, last_scale, x.dtype)


def gated_rows(both: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of rows [T, 2F], gate first, as e4m3 [T, F] with a scale each."""
    count, inner = both.shape[0], both.shape[1] // 2
    value = torch.empty((count, inner), dtype=torch.float8_e4m3fn, device=both.device)
    scale = torch.empty(count, dtype=torch.float32, device=both.device)
    device = device_index(both)
    _gated(inner, both.dtype, device)((count, 1), device, both, value, scale)
    return value, scale


@cache
def _gated(inner: int, _dtype: torch.dtype, device: int) -> Launch:
    pdl = device >= 0 and has_pdl(device)
    block = min(_COLUMNS, next_power_of_2(inner))
    constants = {"F": inner, "BLOCK_F": block, "PDL": pdl}
    return Launch(quant_kernels.round_gated, constants, warps=8, pdl=pdl)


_LIB = torch.library.Library("mogul", "FRAGMENT")
_EXPERTS = "Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale"
_SHARED = "Tensor up, Tensor up_scale, Tensor last, Tensor last_scale"
_LIB.define(
    f"moe_quantised_shared(Tensor x, {_EXPERTS}, Tensor ids, Tensor weights, {_SHARED}) "
    "-> (Tensor, Tensor)"
)
_LIB.define(
    "moe_routed_shared(Tensor x, Tensor rows, Tensor router, Tensor? bias, Tensor? scale, "
    f"int[] rule, float factor, {_EXPERTS}, {_SHARED}) -> (Tensor, Tensor)"
)


def _empty(x: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    kind = torch.contiguous_format
    return torch.empty_like(x, memory_format=kind), torch.empty_like(x, memory_format=kind)


for _name, _function in (("moe_quantised_shared", _run), ("moe_routed_shared", _run_routed)):
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter's path
        _LIB.impl(_name, _function, _key)
    torch.library.register_fake(f"mogul::{_name}", _empty, lib=_LIB)
