"""This rank's experts as a dispatcher runs them: at once, or in steps where the kernels allow it.

In steps a window can sort picks while tokens travel, and send each sum as it is made. Decides which
experts that is true of: plain bf16 or fp16 weights in mogul's own layout, on mogul's GPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.kernels import ExpertLayout, choose_backend
from mogul.models import experts as implementation
from mogul.models.expert_layout import read_layout

Matrices = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class LocalExperts:
    """(rows [R, D], local ids [R, K], weights [R, K]) -> [R, D]."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    matrices: Callable[[], Matrices | None]
    """Both stacks of weights, where mogul's default layout is what `run` computes."""
    beside: Callable[[Tensor], Tensor] | None = None
    """Rows to rows that are added: a shared expert cut over the same ranks."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The sum over the picks of each row."""
        y = self.run(x, ids, weights)
        return y if self.beside is None else y + self.beside(x)

    def in_steps(self, x: Tensor, picks: int) -> Matrices | None:
        """The weights, if `mogul.kernels.triton.steps` can run rows like x with so many picks."""
        found = self.matrices()
        if found is None or x.shape[0] == 0 or torch.compiler.is_compiling():
            return None
        gate_up, down = found
        if not x.dtype == gate_up.dtype == down.dtype or torch.is_autocast_enabled(x.device.type):
            return None
        if any(not one.is_contiguous() or one.data_ptr() % 16 for one in found):
            return None  # `moe_forward` says what is wrong with them
        experts, hidden_size, expert_width = down.shape
        name = choose_backend(
            x.device,
            x.dtype,
            num_experts=experts,
            hidden_size=hidden_size,
            expert_width=expert_width,
            top_k=picks,
        )
        return found if name == "triton" else None


def local_experts(module: Any, beside: Callable[[Tensor], Tensor] | None = None) -> LocalExperts:
    """Those of an experts module of Transformers."""
    return LocalExperts(module.local_forward, lambda: matrices_of(module), beside)


def matrices_of(module: Any) -> Matrices | None:
    """Both stacks of a module that runs on mogul's kernels as they like it best, else None."""
    if getattr(module.config, "_experts_implementation", None) != implementation.NAME:
        return None
    if module.has_bias or implementation._backend not in ("auto", "triton"):
        return None
    try:
        layout = read_layout(module)
    except BackendError:
        return None
    return (module.gate_up_proj, module.down_proj) if layout == ExpertLayout() else None
