"""A float32 kept as a bfloat16 and the 16 bits that it lacks: master weights for 2 bytes each.

The weight that the model uses is the float32 rounded to bfloat16 (half up); the rest is a signed
16-bit number, so that both together are the float32, exactly.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from jaxtyping import BFloat16, Float32, Int16, Int32
from torch import Tensor

HALF = 1 << 15


def join(high: BFloat16[Tensor, "*N"], low: Int16[Tensor, "*N"]) -> Float32[Tensor, "*N"]:
    """The float32 of both halves."""
    return _joined(high.view(torch.int16), low)


def split(wide: Float32[Tensor, "*N"]) -> tuple[BFloat16[Tensor, "*N"], Int16[Tensor, "*N"]]:
    """A float32 as the nearest bfloat16 and the rest; finite numbers only."""
    high, low = _parts(wide.contiguous().view(torch.int32))
    return high.view(torch.bfloat16), low


def adamw_halves(
    high: Int16[Tensor, " N"],
    low: Int16[Tensor, " N"],
    gradient: Tensor,
    average: Tensor,
    square: Tensor,
    numbers: Tensor,
) -> None:
    """One AdamW step in place on a weight in halves; one kernel when compiled.

    `numbers` (float32) holds: factor of the gradient, beta1, beta2, learning rate over the first
    bias correction, root of the second one, eps, and 1 - rate times decay.
    """
    factor, beta1, beta2, rate, root, eps, shrink = numbers.unbind()
    g = gradient.float() * factor
    m = average.float() * beta1 + g * (1 - beta1)
    v = square.float() * beta2 + g * g * (1 - beta2)
    w = _joined(high, low) * shrink - rate * m / (v.sqrt() / root + eps)
    new_high, new_low = _parts(w.view(torch.int32))
    high.copy_(new_high)
    low.copy_(new_low)
    average.copy_(m)
    square.copy_(v)


def moved_halves(
    high: Int16[Tensor, " N"], low: Int16[Tensor, " N"], step: Tensor, numbers: Tensor
) -> None:
    """Shrink a weight in halves and take `step` off it, in place; `numbers`: both factors."""
    shrink, reach = numbers.unbind()
    w = _joined(high, low) * shrink - step.float() * reach
    new_high, new_low = _parts(w.view(torch.int32))
    high.copy_(new_high)
    low.copy_(new_low)


@cache
def compiled(function: Any, compiles: bool) -> Any:
    """An elementwise update of any length, as one kernel where asked; compiled once."""
    return torch.compile(function, dynamic=True) if compiles else function


def _joined(high: Tensor, low: Tensor) -> Tensor:
    return ((high.to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


def _parts(bits: Int32[Tensor, "*N"]) -> tuple[Tensor, Tensor]:
    high = (bits + HALF) >> 16
    return high.to(torch.int16), (bits - (high << 16)).to(torch.int16)
