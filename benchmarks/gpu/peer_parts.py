"""What several peers need around their products: SiLU with product, and sorting by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, D], ids [T, K], weights [T, K]) -> out [T, D]."""


@triton.jit
def _silu_mul(h_ptr, out_ptr, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h_ptr + row * 2 * F + cols, mask=cols < F).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F + F + cols, mask=cols < F).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + cols, value.to(out_ptr.dtype.element_ty), mask=cols < F)


def silu_mul(h: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half."""
    rows, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(rows, width) if out is None else out
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul[(rows, triton.cdiv(width, block))](h, out, width, block)
    return out


def sorted_slots(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots in the order of their experts, and where each expert ends."""
    flat = ids.flatten()
    order = flat.sort(stable=True).indices
    ones = torch.ones_like(flat, dtype=torch.int32)
    count = torch.zeros(experts, device=ids.device, dtype=torch.int32).scatter_add_(0, flat, ones)
    return order, count.cumsum(0, dtype=torch.int32)
