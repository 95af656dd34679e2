"""Gradients by hand have no derivative of their own: whoever asks for one is told.

PyTorch would take such gradients for constants and give wrong second derivatives without a word.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from mogul.core.errors import BackendError


def refuse_second(ctx: Any, *_: Any) -> NoReturn:
    """The derivative of the experts' gradients."""
    raise BackendError(
        "the gradients of experts cannot be differentiated again on this backend",
        fix="force the slow one that can: backend='reference', or for a whole model "
        "experts_backend('reference')",
    )


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, _anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    backward = staticmethod(refuse_second)


def once(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same gradients; where a graph of them is made, differentiating it is refused."""
    if not torch.is_grad_enabled():
        return grads
    anchor = torch.zeros((), device="cpu", requires_grad=True)  # so that all have a derivative
    return _Once.apply(anchor, *grads)  # type: ignore[no-any-return]
