"""Products of bfloat16 factors whose sums stay in float32, without wide copies of the factors.

A product of two bfloat16 numbers is exact in float32, so the router's logits are those of wide
factors; gradients that are factors are rounded to bfloat16, as those of every other layer are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def multiplies_wide(x: Tensor, weight: Tensor) -> bool:
    """Whether the device multiplies these two into float32; CPUs do not, nor AMD's through it."""
    is_narrow = x.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16
    return is_narrow and x.is_cuda and torch.version.hip is None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """The product a @ b in float32."""
    if a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def add_wide_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a float32 total, in one pass."""
    product: Any = torch.addmm
    product(total, a, b, out_dtype=torch.float32, out=total)


@torch.library.custom_op("mogul::router_logits", mutates_args=())
def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The product x @ weight.T in float32."""
    return wide_product(x_TD, weight_ED.t())


@router_logits.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty((len(x_TD), len(weight_ED)), dtype=torch.float32)


@torch.library.custom_op("mogul::router_gradients", mutates_args=())
def _router_gradients(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    narrow_TE = grad_TE.to(x_TD.dtype)
    return narrow_TE @ weight_ED, wide_product(narrow_TE.t(), x_TD).to(weight_ED.dtype)


@_router_gradients.register_fake
def _(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> Any:
    return _router_gradients(grad_TE, *ctx.saved_tensors)


router_logits.register_autograd(_backward, setup_context=_keep)
