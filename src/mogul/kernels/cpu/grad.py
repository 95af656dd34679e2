"""The experts layer for training on the processor: one autograd node, backward by hand.

Decides what is kept for the backward pass (the first matmul's output) and what is computed again
(the gathered tokens and the activation, which are cheap beside the matmuls). The gradient of a
pick's weight is <activation, grad_out @ down^T>, so the experts' outputs need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mogul.kernels.cpu.blocks import combine, multiply_blocks
from mogul.kernels.cpu.order import Order, order_by_expert
from mogul.kernels.cpu.rows import right_operands, rows
from mogul.kernels.layout import ExpertLayout
from mogul.kernels.once import once


class Experts(torch.autograd.Function):
    """Differentiable in every float tensor; gradients nobody asks for are not computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        layout: ExpertLayout,
    ) -> Tensor:
        """The experts layer, keeping what the backward pass needs."""
        up_EDF, down_EFD = right_operands(gate_up, down, layout)
        order = order_by_expert(ids, gate_up.shape[0])
        hidden_RF, out_RD = rows(
            x, up_EDF, down_EFD, order, gate_up_bias, down_bias, layout, keep_hidden=True
        )
        ctx.save_for_backward(x, gate_up, down, weights, down_bias, hidden_RF, *order[:3])
        ctx.blocks, ctx.layout = order.blocks, layout
        return combine(out_RD, order, weights)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        """One gradient for each argument of `forward`, None where none is needed."""
        with torch.no_grad():
            grads = _gradients(ctx, grad_y)
        return once(grads)


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_up, down, weights, down_bias, hidden_RF, *rest = ctx.saved_tensors
    slot_R, place_TK, ends_E = rest
    order, layout = Order(slot_R, place_TK, ends_E, ctx.blocks), ctx.layout
    want_x, want_up, want_down, _, want_weights, want_up_bias, want_down_bias, _ = (
        ctx.needs_input_grad
    )
    up_EDF, down_EFD = right_operands(gate_up, down, layout)
    token_R = order.token_R()
    weight_R1 = weights.reshape(-1)[order.slot_R].to(x.dtype)[:, None]
    grad_RD = grad_y.index_select(0, token_R)
    grad_active_RF = multiply_blocks(grad_RD, down_EFD.mT, order)
    active_RF, hidden_grad = _activate_again(hidden_RF, layout)

    grads: list[Tensor | None] = [None] * 8
    if want_weights:
        grads[4] = _weight_grad(active_RF, grad_active_RF, grad_RD, down_bias, order, weights)
    if want_down:
        weighted_RF = active_RF * weight_R1
        grads[2] = _expert_grad(weighted_RF, grad_RD, order, down, layout)
    if want_down_bias:
        grads[6] = _bias_grad(grad_RD * weight_R1, order, gate_up.shape[0])
    if want_x or want_up or want_up_bias:
        grad_hidden_RF = hidden_grad(grad_active_RF.mul_(weight_R1))
        if want_up:
            grads[1] = _expert_grad(
                x.index_select(0, token_R), grad_hidden_RF, order, gate_up, layout
            )
        if want_up_bias:
            grads[5] = _bias_grad(grad_hidden_RF, order, gate_up.shape[0])
        if want_x:
            grad_x_RD = multiply_blocks(grad_hidden_RF, up_EDF.mT, order)
            grads[0] = combine(grad_x_RD, order, None)
    return tuple(grads)


def _activate_again(hidden_RF: Tensor, layout: ExpertLayout) -> tuple[Tensor, Any]:
    """The activation, and the function from its gradient to that of `hidden_RF`."""
    with torch.enable_grad():
        leaf_RF = hidden_RF.detach().requires_grad_()
        active_RF = layout.activate(leaf_RF)

    def hidden_grad(grad_active_RF: Tensor) -> Tensor:
        return torch.autograd.grad(active_RF, leaf_RF, grad_active_RF)[0]

    return active_RF.detach(), hidden_grad


def _weight_grad(
    active_RF: Tensor,
    grad_active_RF: Tensor,
    grad_RD: Tensor,
    down_bias_ED: Tensor | None,
    order: Order,
    weights_TK: Tensor,
) -> Tensor:
    """<expert output, grad_y> of every slot; 0 for a slot without a row."""
    grad_R = (active_RF * grad_active_RF).sum(1, dtype=weights_TK.dtype)
    if down_bias_ED is not None:
        for expert, start, stop in order.blocks:
            grad_R[start:stop] += (grad_RD[start:stop] @ down_bias_ED[expert]).to(grad_R.dtype)
    grad_S = grad_R.new_zeros(weights_TK.numel()).index_copy_(0, order.slot_R, grad_R)
    return grad_S.view(weights_TK.shape)


def _expert_grad(
    left_RA: Tensor, grad_RB: Tensor, order: Order, weight: Tensor, layout: ExpertLayout
) -> Tensor:
    """left^T grad of each expert in the layout of `weight`; zeros for experts without rows."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    untouched = set(range(weight.shape[0]))
    for expert, start, stop in order.blocks:
        untouched.discard(expert)
        left, right = left_RA[start:stop], grad_RB[start:stop]
        if not layout.is_transposed:
            left, right = right, left
        torch.mm(left.T, right, out=grad[expert])
    for expert in untouched:
        grad[expert].zero_()
    return grad


def _bias_grad(grad_RB: Tensor, order: Order, num_experts: int) -> Tensor:
    grad_EB = grad_RB.new_zeros(num_experts, grad_RB.shape[1])
    for expert, start, stop in order.blocks:
        torch.sum(grad_RB[start:stop], dim=0, out=grad_EB[expert])
    return grad_EB
