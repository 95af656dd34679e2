"""The few largest of each short row in one launch: what routers do, without a sort.

`mogul::topk` stands in compiled decoder layers where the model says `torch.topk`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_COLUMNS = 1024
MOST_PICKS = 32

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define("topk(Tensor rows, int k) -> (Tensor, Tensor)")


def topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest values [T, k] of rows [T, E] with their columns (int64), falling; ties: the left."""
    from mogul.kernels.triton.topk_kernels import pick_largest

    num_rows, columns = rows.shape
    rows = rows.contiguous()
    values = torch.empty((num_rows, k), dtype=rows.dtype, device=rows.device)
    ids = torch.empty((num_rows, k), dtype=torch.int64, device=rows.device)
    if num_rows:
        width = 1 << (columns - 1).bit_length()
        launch: Any = pick_largest[(num_rows,)]
        launch(rows, values, ids, columns, K=k, WIDTH=width, num_warps=1)
    return values, ids


def _topk_host(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = rows.topk(k, -1)
    return found.values, found.indices


_LIB.impl("topk", topk, "CUDA")
_LIB.impl("topk", _topk_host, "CPU")


@torch.library.register_fake("mogul::topk", lib=_LIB)
def _(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], k)
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int64)
