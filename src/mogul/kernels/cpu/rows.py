"""Rows sorted by expert through both matmuls: the way of prefill and of training.

Decides the chunks in which the rows pass and which buffers are kept. Used by `moe.py` for
inference and by `grad.py`, which needs the first matmul's output again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.cpu.blocks import add_bias, multiply_blocks, multiply_into
from mogul.kernels.cpu.order import Order
from mogul.kernels.cpu.workspace import WORKSPACE
from mogul.kernels.layout import ExpertLayout

# Rows handled together. Buffers of all rows at once outgrow what the allocator keeps: the fresh
# pages of every call took 8 of 34 ms (512 tokens, upcycled SmolLM2-135M, one thread).
CHUNK_ROWS = 1024


def right_operands(gate_up: Tensor, down: Tensor, layout: ExpertLayout) -> tuple[Tensor, Tensor]:
    """Views [E, D, 2F] and [E, F, D], whatever the layout."""
    return (gate_up, down) if layout.is_transposed else (gate_up.mT, down.mT)


def rows(
    x_TD: Tensor,
    up_EDF: Tensor,
    down_EFD: Tensor,
    order: Order,
    up_bias_EF: Tensor | None,
    down_bias_ED: Tensor | None,
    layout: ExpertLayout,
    *,
    keep_hidden: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Return the first matmul's output [R, 2F] (if kept) and the experts' outputs [R, D].

    The outputs may lie in the workspace: combine them before the next call.
    """
    token_R = order.token_R()
    if order.num_rows <= CHUNK_ROWS:
        hidden_RF = multiply_blocks(x_TD.index_select(0, token_R), up_EDF, order, up_bias_EF)
        active_RF = layout.activate(hidden_RF)
        return hidden_RF, multiply_blocks(active_RF, down_EFD, order, down_bias_ED)
    kept_RF = x_TD.new_empty(order.num_rows, up_EDF.shape[2]) if keep_hidden else None
    out_RD = WORKSPACE.take("out", (order.num_rows, x_TD.shape[1]), x_TD)
    up, down = up_EDF.unbind(), down_EFD.unbind()
    for blocks in order.chunks(CHUNK_ROWS):
        chunk = slice(blocks[0].start, blocks[-1].stop)
        num_rows = chunk.stop - chunk.start
        x_RD = WORKSPACE.take("x", (num_rows, x_TD.shape[1]), x_TD)
        torch.index_select(x_TD.detach(), 0, token_R[chunk], out=x_RD)
        if kept_RF is None:
            hidden_RF = WORKSPACE.take("hidden", (num_rows, up_EDF.shape[2]), x_TD)
        else:
            hidden_RF = kept_RF[chunk]
        multiply_into(hidden_RF, x_RD, up, blocks)
        if up_bias_EF is not None:
            add_bias(hidden_RF, up_bias_EF, blocks)
        active_RF = WORKSPACE.take("active", (num_rows, down_EFD.shape[1]), x_TD)
        layout.activate_into(hidden_RF, active_RF)
        multiply_into(out_RD[chunk], active_RF, down, blocks)
        if down_bias_ED is not None:
            add_bias(out_RD[chunk], down_bias_ED, blocks)
    return kept_RF, out_RD
