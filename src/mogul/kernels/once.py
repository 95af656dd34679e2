"""Derivatives that do not exist: whoever asks for one is told.

Gradients made by hand have none of their own, and operators for inference none at all. PyTorch
would take either for constants and give wrong numbers, at best with a warning.
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


def refuse_any(ctx: Any, *_: Any) -> NoReturn:
    """The derivative of an operator for inference, which only an exported program can ask for."""
    raise BackendError(
        "this exported model has no gradient of its experts", fix="train the model it was made of"
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
