"""The root-mean-square norm without autograd, in five operators that make one large tensor.

torch's own is a chain of operators on the processor, with a fresh tensor each: 12 us for one token
and, at 512, pages that come new from the system.
"""

from __future__ import annotations

import torch
from torch import Tensor

_eps: dict[tuple[float, torch.dtype], Tensor] = {}


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, both of one dtype."""
    if (eps_1 := _eps.get((eps, x.dtype))) is None:
        with torch.inference_mode(False):
            eps_1 = _eps[eps, x.dtype] = torch.full((1,), eps, dtype=x.dtype)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = torch.addcmul(eps_1, length, length, value=1 / x.shape[-1]).rsqrt_()
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
