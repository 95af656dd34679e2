"""The experts layer as a loop anyone can check: y_t = sum_k w_tk * expert_{id_tk}(x_t).

Decides the numbers that every other backend must match, for all layouts; autograd differentiates
it. Slots whose id is no expert (negative, or from E on) are never touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.layout import ExpertLayout


def moe_forward_reference(
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
    """Slow, obvious, differentiable; see `mogul.kernels.moe_forward` for the shapes."""
    accumulated = torch.promote_types(gate_up.dtype, torch.float32)
    y_TD = x.new_zeros(x.shape, dtype=accumulated)
    for expert in range(gate_up.shape[0]):
        token_R, pick_R = (ids == expert).nonzero(as_tuple=True)
        up_DF, down_FD = gate_up[expert], down[expert]
        if not layout.is_transposed:
            up_DF, down_FD = up_DF.T, down_FD.T
        hidden_RF = x[token_R].to(gate_up.dtype) @ up_DF
        if gate_up_bias is not None:
            hidden_RF = hidden_RF + gate_up_bias[expert]
        out_RD = layout.activate(hidden_RF) @ down_FD
        if down_bias is not None:
            out_RD = out_RD + down_bias[expert]
        weighted_RD = out_RD.to(accumulated) * weights[token_R, pick_R, None].to(accumulated)
        y_TD = y_TD.index_add(0, token_R, weighted_RD)
    return y_TD.to(x.dtype)
