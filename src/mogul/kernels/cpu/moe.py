"""Fast experts on the processor: three ways through the same layer, chosen by size.

Decides how rows meet weights. One token: a matrix-vector product a pick, nothing is sorted.
Several: rows sorted by expert, one matmul an expert into one buffer ("rows"), or, where blocks are
thin, with the weights as the left operand ("columns"). The combine is an embedding bag: it
gathers, weighs and sums in one pass over the rows, in float32 for 16-bit dtypes, in fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mogul.kernels.cpu.order import Order, order_by_expert
from mogul.kernels.layout import ExpertLayout

# Mean rows an expert between which a [F, D] x [D, R] product beats [R, D] x [D, F]: measured with
# benchmarks/bench_cpu_moe_layer.py (oneMKL and oneDNN, AVX-512). Weights that are stored transposed
# gain nothing.
COLUMNS_FROM = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}
COLUMNS_BELOW = 64


def why_not_cpu(*, device: torch.device, **_facts: object) -> str | None:
    """The processor only; every layout and dtype."""
    return None if device.type == "cpu" else f"the tensors are on {device}, not on the processor"


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
    tensors = (x, gate_up, down, weights, gate_up_bias, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        from mogul.kernels.cpu.grad import Experts

        return Experts.apply(x, gate_up, down, ids, weights, gate_up_bias, down_bias, layout)
    up_EDF, down_EFD = right_operands(gate_up, down, layout)
    if x.shape[0] == 1:
        return _one_token(x, up_EDF, down_EFD, ids, weights, gate_up_bias, down_bias, layout)
    order = order_by_expert(ids, gate_up.shape[0])
    if _wants_columns(order, x.dtype, layout):
        out_RD = _columns(x, gate_up, down, order, gate_up_bias, down_bias, layout)
    else:
        out_RD = rows(x, up_EDF, down_EFD, order, gate_up_bias, down_bias, layout)[1]
    return combine(out_RD, order, weights)


def right_operands(gate_up: Tensor, down: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """Views [E, D, 2F] and [E, F, D], whatever the layout."""
    return (gate_up, down) if layout.is_transposed else (gate_up.mT, down.mT)


def _one_token(
    x_1D: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    ids_1K: Tensor,
    weights_1K: Tensor,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    layout: ExpertLayout,
) -> Tensor:
    """A matrix-vector product for each pick: reads every weight once, copies none."""
    num_experts = up_EDF.shape[0]
    picks = [(k, e) for k, e in enumerate(ids_1K[0].tolist()) if 0 <= e < num_experts]
    weight_K, real_K = weights_1K[0], ids_1K[0]
    if len(picks) < weight_K.shape[0]:
        kept_R = torch.tensor([k for k, _ in picks], dtype=torch.int64)
        weight_K, real_K = weight_K[kept_R], real_K[kept_R]
    hidden_KF = x_1D.new_empty(len(picks), up_EDF.shape[2])
    for row, (_, expert) in enumerate(picks):
        torch.mv(up_EDF[expert].T, x_1D[0], out=hidden_KF[row])
    if up_bias_EF is not None:
        hidden_KF += up_bias_EF[real_K]
    hidden_KF = layout.activate(hidden_KF)
    out_KD = x_1D.new_empty(len(picks), x_1D.shape[1])
    for row, (_, expert) in enumerate(picks):
        torch.mv(down_EFD[expert].T, hidden_KF[row], out=out_KD[row])
    if down_bias_ED is not None:
        out_KD += down_bias_ED[real_K]
    return weight_K.to(out_KD.dtype)[None] @ out_KD


def rows(
    x_TD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    order: Order,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    layout: ExpertLayout,
) -> tuple[Tensor, Tensor]:
    """Return the first matmul's output [R, 2F] and the experts' unweighted output [R or R + 1, D]."""
    x_RD = x_TD.index_select(0, order.token_R())
    hidden_RF = x_TD.new_empty(order.num_rows, up_EDF.shape[2])
    multiply_blocks(x_RD, up_EDF, order, hidden_RF, up_bias_EF)
    active_RF = layout.activate(hidden_RF)
    out_RD = padded_rows(x_TD, order)
    multiply_blocks(active_RF, down_EFD, order, out_RD, down_bias_ED)
    return hidden_RF, out_RD


def multiply_blocks(
    left_RA: Tensor, right_EAB: Tensor, order: Order, out_RB: Tensor, bias_EB: Tensor | None = None
) -> None:
    """out[r] = left[r] @ right[expert of r] (+ bias)."""
    for expert, start, stop in order.blocks:
        out = out_RB[start:stop]
        if bias_EB is None:
            torch.mm(left_RA[start:stop], right_EAB[expert], out=out)
        else:
            torch.addmm(bias_EB[expert], left_RA[start:stop], right_EAB[expert], out=out)


def padded_rows(x_TD: Tensor, order: Order) -> Tensor:
    """Room for R rows of D, and one of zeros where some slots have no row."""
    if order.is_full:
        return x_TD.new_empty(order.num_rows, x_TD.shape[1])
    out_RD = x_TD.new_empty(order.num_rows + 1, x_TD.shape[1])
    out_RD[-1] = 0
    return out_RD


def _wants_columns(order: Order, dtype: torch.dtype, layout: ExpertLayout) -> bool:
    if layout.is_transposed or not order.blocks:
        return False
    mean_rows = order.num_rows / len(order.blocks)
    return COLUMNS_FROM.get(dtype, COLUMNS_BELOW) <= mean_rows < COLUMNS_BELOW


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
    out_RD = padded_rows(x_TD, order)
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


def combine(rows_RD: Tensor, order: Order, weights_TK: Tensor | None) -> Tensor:
    """Sum each token's rows, times the weights where given: [T, D]."""
    if weights_TK is not None:
        weights_TK = weights_TK.to(rows_RD.dtype)
        if not order.is_full:
            weights_TK = weights_TK.masked_fill(order.place_TK == order.num_rows, 0)
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(order.place_TK.shape[0], rows_RD.shape[1])
    return F.embedding_bag(order.place_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
