"""The root-mean-square norm without autograd, in few operators and tensors.

torch's own is a chain of operators on the processor, with a fresh tensor each: 12 us for one token
and, at 512, pages that come new from the system.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, both of one dtype."""
    # A mean sums more exactly than `vector_norm`, which would take 7 in place of 10 us.
    inverse = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (x * inverse).mul_(weight)


def takes_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether these may take this way."""
    return (
        x.is_cpu
        and x.dtype is weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and type(x) is Tensor  # no stand-in of a tracer
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
