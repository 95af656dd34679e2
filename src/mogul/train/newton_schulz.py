"""Orthogonalise matrices: the step of Muon, batched over the leading axes.

Five quintic iterations with the coefficients of Polar Express (arXiv 2505.16932), each chosen for
the interval that the one before leaves. Every matrix of a stack is treated alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02
"""Keeps the largest singular value below 1 after the first division, also in bfloat16."""


def orthogonalise(stack: Float[Tensor, "*N R C"]) -> Float[Tensor, "*N R C"]:
    """The nearest orthogonal matrix of each, roughly: singular values from about 0.9 to 1.1."""
    is_tall = stack.shape[-2] > stack.shape[-1]
    x = stack.reshape(-1, *stack.shape[-2:])
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_wide(x.dtype))
    x = x * (1 / (norm * SAFETY + 1e-7)).to(x.dtype)
    for a, b, c in COEFFICIENTS:
        gram = x.mT @ x if is_tall else x @ x.mT  # the smaller side; nothing is transposed
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        poly.diagonal(dim1=-2, dim2=-1).add_(a)
        x = x @ poly if is_tall else poly @ x
    return x.reshape(stack.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
