"""Fast experts on the processor: three ways through the same layer, chosen by size.

Decides how rows meet weights. One token: a matrix-vector product a pick, nothing is sorted.
Several: rows sorted by expert, one matmul an expert ("rows"), or, where blocks are thin, with the
weights as the left operand ("columns"). Training is in `grad.py`. A compiler sees one operator,
`mogul::moe_cpu`, without a gradient.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.checks import needs_grad
from mogul.kernels.cpu.blocks import combine
from mogul.kernels.cpu.grad import Experts
from mogul.kernels.cpu.order import Order, order_by_expert
from mogul.kernels.cpu.rows import right_operands, rows
from mogul.kernels.cpu.workspace import WORKSPACE, matrices
from mogul.kernels.layout import ExpertLayout
from mogul.kernels.once import refuse_any

# Mean rows an expert between which a [F, D] x [D, R] product beats [R, D] x [D, F], where one
# expert outgrows the cache: 409 against 481 ms (Qwen3-30B-A3B, 256 tokens, float32, one thread).
# Weights that are stored transposed gain nothing.
COLUMNS_FROM = {torch.float32: 8, torch.bfloat16: 1, torch.float16: 1}
COLUMNS_BELOW = 64
COLUMNS_EXPERT_BYTES = 2**21


def moe_forward_cpu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    layout: ExpertLayout,
) -> Tensor:
    """Fast and differentiable; see `mogul.kernels.moe_forward` for the shapes."""
    tensors = (x, gate_up, down, ids, weights, gate_up_bias, down_bias)
    if not torch.compiler.is_compiling():
        return _run(*tensors, layout)
    if needs_grad(*tensors) and not torch.compiler.is_exporting():
        return _run_uncompiled(*tensors, layout)
    return torch.ops.mogul.moe_cpu(*tensors, *astuple(layout))


def _run(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: ExpertLayout,
) -> Tensor:
    if needs_grad(x, gate_up, down, weights, gate_up_bias, down_bias):
        return Experts.apply(x, gate_up, down, ids, weights, gate_up_bias, down_bias, layout)
    if x.shape[0] == 1:
        return _one_token(x, gate_up, down, ids, weights, gate_up_bias, down_bias, layout)
    order = order_by_expert(ids, gate_up.shape[0])
    if _wants_columns(order, gate_up, layout):
        out_RD = _columns(x, gate_up, down, order, gate_up_bias, down_bias, layout)
    else:
        up_EDF, down_EFD = right_operands(gate_up, down, layout)
        out_RD = rows(x, up_EDF, down_EFD, order, gate_up_bias, down_bias, layout)[1]
    return combine(out_RD, order, weights)


# Sizes of blocks are known only when it runs: in training torch.compile breaks its graph here,
# once, instead of compiling each routing anew.
_run_uncompiled: Any = torch.compiler.disable(
    _run,
    reason="on a processor experts are trained outside of the compiled graph; "
    "compile without fullgraph=True",
)

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "moe_cpu(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor? gate_up_bias, Tensor? down_bias, bool is_transposed, bool is_concatenated, "
    "bool has_gate, str activation, float alpha, float limit) -> Tensor"
)


def _operator(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, *args: Any) -> Tensor:
    weights, up_bias, down_bias, *layout = args
    return _run(x, gate_up, down, ids, weights, up_bias, down_bias, ExpertLayout(*layout))


_LIB.impl("moe_cpu", _operator, "CPU")
torch.library.register_fake(
    "mogul::moe_cpu",
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    lib=_LIB,
)
torch.library.register_autograd("mogul::moe_cpu", refuse_any, lib=_LIB)


def _one_token(
    x_1D: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids_1K: Tensor,
    weights_1K: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    layout: ExpertLayout,
) -> Tensor:
    """A matrix-vector product for each pick: reads every weight once, copies none."""
    up_FD, down_DF = matrices(gate_up, layout), matrices(down, layout)
    num_experts = len(up_FD)
    (experts,) = ids_1K.tolist()
    if min(experts, default=0) < 0 or max(experts, default=0) >= num_experts:
        is_real_1K = (ids_1K >= 0) & (ids_1K < num_experts)
        ids_1K, weights_1K = ids_1K[is_real_1K][None], weights_1K[is_real_1K][None]
        (experts,) = ids_1K.tolist()
    columns, width = (2, 1) if layout.is_transposed else (1, 2)
    sizes = (gate_up.shape[columns], down.shape[width], x_1D.shape[1])
    one = WORKSPACE.take_one(len(experts), sizes, x_1D)
    (x_D,) = x_1D.unbind()
    for expert, hidden_H in zip(experts, one.hidden, strict=True):
        torch.mv(up_FD[expert], x_D, out=hidden_H)
    if up_bias_EF is not None:
        one.hidden_KH.add_(up_bias_EF[ids_1K[0]])
    layout.activate_into(one.hidden_KH, one.active_KF)
    for expert, active_F, out_D in zip(experts, one.active, one.out, strict=True):
        torch.mv(down_DF[expert], active_F, out=out_D)
    if down_bias_ED is not None:
        one.out_KD.add_(down_bias_ED[ids_1K[0]])
    return torch.mm(weights_1K.to(x_1D.dtype), one.out_KD)


def _wants_columns(order: Order, gate_up: Tensor, layout: ExpertLayout) -> bool:
    if layout.is_transposed or not order.blocks or gate_up[0].nbytes < COLUMNS_EXPERT_BYTES:
        return False
    mean_rows = order.num_rows / len(order.blocks)
    return COLUMNS_FROM.get(gate_up.dtype, COLUMNS_BELOW) <= mean_rows < COLUMNS_BELOW


def _columns(
    x_TD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    order: Order,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    layout: ExpertLayout,
) -> Tensor:
    """Expert by expert with tokens as columns: the weights need no transposed packing."""
    x_RD = x_TD.index_select(0, order.token_R())
    out_RD = torch.empty_like(x_RD)
    for expert, start, stop in order.blocks:
        hidden_RF = torch.mm(gate_up[expert], x_RD[start:stop].T).T
        if up_bias_EF is not None:
            hidden_RF += up_bias_EF[expert]
        active_RF = layout.activate(hidden_RF)
        out = out_RD[start:stop]
        out.copy_(torch.mm(down[expert], active_RF.T).T)
        if down_bias_ED is not None:
            out += down_bias_ED[expert]
    return out_RD
