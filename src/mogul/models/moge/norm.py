"""The norm of hidden states, queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.kernels.cpu.norm import rms_norm_cpu, takes_rms_norm


class MogeRMSNorm(nn.Module):
    """Root-mean-square norm with float32 statistics."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] to [..., size]."""
        if takes_rms_norm(x, self.weight):
            return rms_norm_cpu(x, self.weight, self.variance_epsilon)
        at_least_32 = torch.promote_types(x.dtype, torch.float32)
        wide = F.rms_norm(x.to(at_least_32), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * wide.to(x.dtype)
