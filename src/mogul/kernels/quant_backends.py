"""Quantised experts in plain torch, and the list of all backends.

Decides the arithmetic every other backend must match. fp8: each token's row and, after the
activation, each slot's row is rounded to e4m3 with a scale of its own; products of e4m3 values are
summed in fp32 and scaled once. fp8-w8a16: what that rounding leaves of a row is rounded and
multiplied too. int4: weights are dequantised to the dtype of x and multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mogul.kernels.cpu import why_not_cpu
from mogul.kernels.cpu.blocks import combine
from mogul.kernels.cpu.order import order_by_expert
from mogul.kernels.quant import (
    MOE_QUANTISED,
    QuantisedExperts,
    QuantisedFacts,
    QuantisedWeight,
    moe_forward_quantised,
)
from mogul.kernels.quant_format import expert_format, quantise_rows, split_rows
from mogul.kernels.triton.linear import linear_fp8
from mogul.kernels.triton.quant import (
    moe_quantised_triton,
    why_not_triton_quantised,
)


def moe_quantised_reference(
    x: Tensor, experts: QuantisedExperts, ids: Tensor, weights: Tensor
) -> Tensor:
    """A loop anyone can check, summed in float32."""
    y_TD = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(experts.sizes[0]):
        token_R, pick_R = (ids == expert).nonzero(as_tuple=True)
        out_RD = _expert(x[token_R], experts, expert)
        y_TD.index_add_(0, token_R, out_RD.float() * weights[token_R, pick_R, None].float())
    return y_TD.to(x.dtype)


def moe_quantised_cpu(x: Tensor, experts: QuantisedExperts, ids: Tensor, weights: Tensor) -> Tensor:
    """Only the experts that have rows are dequantised, one after the other."""
    order = order_by_expert(ids, experts.sizes[0])
    x_RD = x.index_select(0, order.token_R())
    out_RD = torch.empty_like(x_RD)
    for expert, start, stop in order.blocks:
        out_RD[start:stop] = _expert(x_RD[start:stop], experts, expert)
    return combine(out_RD, order, weights)


def _expert(x_RD: Tensor, experts: QuantisedExperts, expert: int) -> Tensor:
    """Rows through one expert."""
    hidden_RF = _product(x_RD, experts, experts.gate_up, expert)
    if experts.gate_up_bias is not None:
        hidden_RF = hidden_RF + experts.gate_up_bias[expert].float()
    active_RF = experts.layout.activate(hidden_RF).to(x_RD.dtype)
    out_RD = _product(active_RF, experts, experts.down, expert)
    if experts.down_bias is not None:
        out_RD = out_RD + experts.down_bias[expert].float()
    return out_RD.to(x_RD.dtype)


def _product(
    rows_RC: Tensor, experts: QuantisedExperts, weight: QuantisedWeight, expert: int
) -> Tensor:
    """Rows times the matrix of one expert, float32 [R, N]."""
    if experts.format.kind == "int4":
        matrix_NC = weight.dequantise(experts.format, rows_RC.dtype, expert)
        return (rows_RC @ matrix_NC.T).float()
    if experts.format.weight_only:
        both_RC, scale_R = split_rows(rows_RC)
        first_RC, rest_RC = both_RC.float().chunk(2, -1)
        wide_RC = first_RC + rest_RC  # exact
    else:
        value_RC, scale_R = quantise_rows(rows_RC)
        wide_RC = value_RC.float()
    out_RN = wide_RC @ weight.value[expert].float().T
    return out_RN * scale_R[:, None] * weight.scale[expert]


def takes_shared(experts: QuantisedExperts, dtype: torch.dtype) -> bool:
    """Whether a GPU can run these experts and a shared one as one operator."""
    has_bias = experts.gate_up_bias is not None or experts.down_bias is not None
    gated_silu = experts.layout.has_gate and experts.layout.activation == "silu"
    if experts.format.name != "fp8" or has_bias or not gated_silu:
        return False
    facts = QuantisedFacts(experts.device, dtype, experts.format, *experts.sizes, experts.layout)
    if MOE_QUANTISED.reasons(**facts._asdict())["triton"] is not None:
        return False
    from mogul.kernels.triton import quant_shared  # it registers the operator

    return bool(quant_shared)


def moe_with_shared(
    x: Tensor,
    experts: Sequence[Tensor],
    ids: Tensor,
    weights: Tensor,
    shared: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """What routed fp8 experts and a shared one give, [T, D] each; gate rows before up rows.

    On a GPU one operator that rounds the rows once and runs both side by side where that pays; the
    caller has asked `takes_shared`. Elsewhere one after the other. Nothing here hides a graph from
    a compiler: tensors only, no choice among backends.

    Args:
        x: rows [T, D].
        experts: gate_up [E, 2F, D] in e4m3, its scales, down [E, D, F], its scales.
        ids: picks [T, K].
        weights: of the picks.
        shared: gate and up [2S, D] in e4m3, their scales, down [D, S], its scales.
    """
    if x.is_cuda:
        return torch.ops.mogul.moe_quantised_shared(x, *experts, ids, weights, *shared)
    gate_up, gate_up_scale, down, down_scale = experts
    first, last = QuantisedWeight(gate_up, gate_up_scale), QuantisedWeight(down, down_scale)
    routed = QuantisedExperts(expert_format("fp8"), first, last)
    both, both_scale, narrow, narrow_scale = shared
    gate, up = linear_fp8(*quantise_rows(x), both, both_scale, x.dtype).chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    beside = linear_fp8(*quantise_rows(act), narrow, narrow_scale, x.dtype)
    return moe_forward_quantised(x, routed, ids.to(torch.int64), weights), beside


MOE_QUANTISED.add("triton", moe_quantised_triton, why_not=why_not_triton_quantised)
MOE_QUANTISED.add("cpu", moe_quantised_cpu, why_not=why_not_cpu)
MOE_QUANTISED.add("reference", moe_quantised_reference)
