"""The few largest of each short row in one launch: what routers do, without a sort.

`mogul::topk` and `mogul::softmax_topk` stand in compiled decoder layers where the model says
`torch.topk`, the second also for the softmax before and the renormalising behind it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from mogul.kernels.triton.launch import INTERPRETED, Launch, device_index, next_power_of_2

MOST_COLUMNS = 1024
MOST_PICKS = 32
RANKED_COLUMNS, ranked_rows = 128, 512
"""Columns and rows up to which the rank of every number is quicker than one search a pick: more
rows wait for each other, and a search takes the square less arithmetic."""

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define("topk(Tensor rows, int k) -> (Tensor, Tensor)")
_LIB.define(
    "softmax_topk(Tensor rows, int k, bool renormalise, ScalarType dtype) -> (Tensor, Tensor)"
)


def topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Largest values [T, k] of rows [T, E] with their columns (int64), falling; ties: the left."""
    return _pick(rows, k, rows.dtype, softmax=False, renormalise=False)


def softmax_topk(
    rows: Tensor, k: int, renormalise: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same of softmax(rows) in fp32, the chosen divided by their sum where wanted."""
    return _pick(rows, k, dtype, softmax=True, renormalise=renormalise)


def _pick(
    rows: Tensor, k: int, dtype: torch.dtype, *, softmax: bool, renormalise: bool
) -> tuple[Tensor, Tensor]:
    num_rows, columns = rows.shape
    rows = rows.contiguous()
    values = torch.empty((num_rows, k), dtype=dtype, device=rows.device)
    ids = torch.empty((num_rows, k), dtype=torch.int64, device=rows.device)
    if num_rows:
        device = device_index(rows)
        ranked = columns <= RANKED_COLUMNS and num_rows <= ranked_rows
        kind = (rows.dtype, dtype, rows.data_ptr() % 16 == 0)
        launch = _launch(columns, k, softmax, renormalise, ranked, kind, device)
        launch((num_rows, 1), device, rows, values, ids, num_rows)
    return values, ids


@cache
def _launch(
    columns: int,
    k: int,
    softmax: bool,
    renormalise: bool,
    ranked: bool,
    _kind: tuple[torch.dtype, torch.dtype, bool],
    device: int,
) -> Launch:
    """The launch of one rule; dtypes and alignment only tell launches apart."""
    from mogul.kernels.triton.topk_kernels import pick_largest

    pdl = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    constants = {
        **{"COLUMNS": columns, "K": k, "SLOTS": next_power_of_2(k)},
        **{"WIDTH": next_power_of_2(columns), "SOFTMAX": softmax},
        **{"RENORMALISE": renormalise, "RANKED": ranked, "PDL": pdl},
    }
    warps = 4 if ranked else 1
    return Launch(pick_largest, constants, warps=warps, stages=1, pdl=pdl)


def _topk_host(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = rows.topk(k, -1)
    return found.values, found.indices


def _softmax_topk_host(
    rows: Tensor, k: int, renormalise: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values, ids = _topk_host(rows.float().softmax(-1), k)
    values = values / values.sum(-1, keepdim=True) if renormalise else values
    return values.to(dtype), ids


_LIB.impl("topk", topk, "CUDA")
_LIB.impl("topk", _topk_host, "CPU")
_LIB.impl("softmax_topk", softmax_topk, "CUDA")
_LIB.impl("softmax_topk", _softmax_topk_host, "CPU")


@torch.library.register_fake("mogul::topk", lib=_LIB)
def _(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], k)
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("mogul::softmax_topk", lib=_LIB)
def _(rows: Tensor, k: int, renormalise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (rows.shape[0], k)
    return rows.new_empty(shape, dtype=dtype), rows.new_empty(shape, dtype=torch.int64)
