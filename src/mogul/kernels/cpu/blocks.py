"""Matrix products of blocks of rows with the matrix of their expert, and the sum back to tokens.

Decides which operator multiplies: `grouped_mm` loops over the experts outside of Python, but knows
neither float64 nor rows that are no multiple of 16 bytes; the loop here does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mogul.kernels.cpu.order import Block, Order

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_ROW_BYTES = 16


def multiply_blocks(
    left_RA: Tensor, right_EAB: Tensor, order: Order, bias_EB: Tensor | None = None
) -> Tensor:
    """left[r] @ right[expert of r] (+ bias): [R, B]."""
    if not _fits_grouped_mm(left_RA, right_EAB):
        out_RB = left_RA.new_empty(order.num_rows, right_EAB.shape[2])
        multiply_into(out_RB, left_RA, right_EAB.unbind(), order.blocks)
    else:
        out_RB = F.grouped_mm(left_RA, right_EAB, offs=order.ends_E)
    if bias_EB is not None:
        add_bias(out_RB, bias_EB, order.blocks)
    return out_RB


def multiply_into(
    out_RB: Tensor, left_RA: Tensor, right: Sequence[Tensor], blocks: Sequence[Block]
) -> None:
    """The same for consecutive blocks into rows that exist; row 0 is the first block's first.

    `right` has the matrix [A, B] of every expert.
    """
    sizes = [block.stop - block.start for block in blocks]
    for block, left, out in zip(blocks, left_RA.split(sizes), out_RB.split(sizes), strict=True):
        torch.mm(left, right[block.expert], out=out)


def add_bias(out_RB: Tensor, bias_EB: Tensor, blocks: Sequence[Block]) -> None:
    """Add to each row the bias of its expert, in place."""
    first = blocks[0].start if blocks else 0
    for expert, start, stop in blocks:
        out_RB[start - first : stop - first] += bias_EB[expert]


def _fits_grouped_mm(left_RA: Tensor, right_EAB: Tensor) -> bool:
    if left_RA.dtype not in GROUPED_DTYPES or left_RA.shape[0] == 0:
        return False
    row = GROUPED_ROW_BYTES // left_RA.element_size()
    _, num_in, num_out = right_EAB.shape
    strides = sorted(right_EAB.stride()[1:])
    return (
        left_RA.is_contiguous()
        and num_in % row == num_out % row == 0
        and strides[0] == 1
        and strides[1] % row == right_EAB.stride(0) % row == 0
    )


def combine(rows_RD: Tensor, order: Order, weights_TK: Tensor | None) -> Tensor:
    """Sum each token's rows, times the weights where given: [T, D].

    An embedding bag gathers, weighs and sums in one pass, in fixed order and in float32 for 16-bit
    dtypes. A slot without a row points to one of zeros.
    """
    if weights_TK is not None:
        weights_TK = weights_TK.to(rows_RD.dtype)
    if not order.is_full:
        rows_RD = torch.cat((rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])))
        if weights_TK is not None:
            weights_TK = weights_TK.masked_fill(order.place_TK == order.num_rows, 0)
    if rows_RD.shape[0] == 0:
        return rows_RD.new_zeros(order.place_TK.shape[0], rows_RD.shape[1])
    return F.embedding_bag(order.place_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
