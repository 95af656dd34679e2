"""Routed experts and a shared one in fp8 as one operator, `mogul::moe_quantised_shared`.

Both read the same rows, which are rounded once. In captured steps, and where the work outlasts its
launches, the shared expert runs on a second stream: a step of few tokens is a chain of short
launches, and the reading of the shared weights fills the gaps of the other chain.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mogul.kernels.side_by_side import side_by_side
from mogul.kernels.triton import quant_kernels
from mogul.kernels.triton.launch import INTERPRETED, Launch, aligned, next_power_of_2
from mogul.kernels.triton.linear import linear_fp8
from mogul.kernels.triton.quant_layer import SILU, Weights, rounded_rows, run_quantised

_COLUMNS = 2048


def _run(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    ids: Tensor,
    weights: Tensor,
    shared_up: Tensor,
    shared_up_scale: Tensor,
    shared_down: Tensor,
    shared_down_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """What the routed experts give and what the shared one gives, [T, D] each."""
    x = aligned(x)
    if not len(x):
        return torch.empty_like(x), torch.empty_like(x)
    experts = (gate_up, gate_up_scale, down, down_scale, None, None, 0, SILU, 0.0, 0.0)
    rows, scale = rounded_rows(x)

    def shared() -> Tensor:
        both = linear_fp8(rows, scale, shared_up, shared_up_scale, x.dtype)
        return linear_fp8(*gated_rows(both), shared_down, shared_down_scale, x.dtype)

    def routed() -> Tensor:
        return run_quantised(x, Weights(*experts), ids, weights, (rows, scale))

    return side_by_side(routed, shared, x)


def gated_rows(both: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of rows [T, 2F], gate first, as e4m3 [T, F] with a scale each."""
    count, inner = both.shape[0], both.shape[1] // 2
    value = torch.empty((count, inner), dtype=torch.float8_e4m3fn, device=both.device)
    scale = torch.empty(count, dtype=torch.float32, device=both.device)
    device = both.device.index if both.is_cuda else -1
    _gated(inner, both.dtype, device)((count, 1), device, both, value, scale)
    return value, scale


@cache
def _gated(inner: int, _dtype: torch.dtype, device: int) -> Launch:
    pdl = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    block = min(_COLUMNS, next_power_of_2(inner))
    constants = {"F": inner, "BLOCK_F": block, "PDL": pdl}
    return Launch(quant_kernels.round_gated, constants, warps=8, pdl=pdl)


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "moe_quantised_shared(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale, Tensor ids, Tensor weights, Tensor shared_up, Tensor shared_up_scale, "
    "Tensor shared_down, Tensor shared_down_scale) -> (Tensor, Tensor)"
)
for _key in ("CUDA", "CPU"):  # CPU: the interpreter's path
    _LIB.impl("moe_quantised_shared", _run, _key)


@torch.library.register_fake("mogul::moe_quantised_shared", lib=_LIB)
def _(x: Tensor, *_args: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
