"""Products of a compiled layer in fewer passes over memory: the router's, and attention's three.

Modules get a subclass of their own class for the time of a training; weights and names stay. Where
a product would not be what the module computes (float8 or adapters in place of plain layers), the
module is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("mogul::router_logits", mutates_args=())
def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in float32, of bfloat16 factors as they are: no wide copy of the tokens.

    A product of two bfloat16 numbers is exact in float32, so the logits are those of wide factors;
    in backward the gradient of the logits is rounded to bfloat16.
    """
    if x_TD.device.type == "cpu":
        return x_TD.float() @ weight_ED.float().t()
    return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)


@router_logits.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return x_TD.new_empty((len(x_TD), len(weight_ED)), dtype=torch.float32)


@torch.library.custom_op("mogul::router_gradients", mutates_args=())
def _router_gradients(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    narrow_TE = grad_TE.to(x_TD.dtype)
    if x_TD.device.type == "cpu":
        dweight_ED = narrow_TE.float().t() @ x_TD.float()
    else:
        dweight_ED = torch.mm(narrow_TE.t(), x_TD, out_dtype=torch.float32)
    return narrow_TE @ weight_ED, dweight_ED.to(weight_ED.dtype)


@_router_gradients.register_fake
def _(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TD), torch.empty_like(weight_ED)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TE: Tensor) -> Any:
    return _router_gradients(grad_TE, *ctx.saved_tensors)


router_logits.register_autograd(_backward, setup_context=_keep)


class NarrowRouter:
    """Mixed in before a router's class: logits without a wide copy of the tokens."""

    weight: Tensor

    def product(self, x_TD: Tensor) -> Tensor:
        """Logits in float32."""
        if x_TD.dtype is torch.bfloat16 and self.weight.dtype is torch.bfloat16:
            return router_logits(x_TD, self.weight)
        return super().product(x_TD)  # pyright: ignore[reportAttributeAccessIssue]


class JointAttention:
    """Mixed in before an attention's class: queries, keys and values in one product."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of [..., D]."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).split([layer.out_features for layer in layers], -1)


@contextmanager
def joined_products(model: nn.Module) -> Iterator[None]:
    """Inside the block, routers and attention that allow it multiply as above."""
    changed: list[tuple[nn.Module, type]] = []
    try:
        for module in list(model.modules()):
            mixin = _mixin_for(module)
            if mixin is not None:
                changed.append((module, type(module)))
                module.__class__ = _mixed(mixin, type(module))
        yield
    finally:
        for module, before in changed:
            module.__class__ = before


def _mixin_for(module: nn.Module) -> type | None:
    if hasattr(module, "product") and isinstance(getattr(module, "weight", None), nn.Parameter):
        return NarrowRouter
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if not hasattr(module, "project") or any(type(layer) is not nn.Linear for layer in layers):
        return None
    has_bias = {layer.bias is not None for layer in layers if isinstance(layer, nn.Linear)}
    return JointAttention if len(has_bias) == 1 else None


@cache
def _mixed(mixin: type, base: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__})
