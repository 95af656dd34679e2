"""Products with what stands before and behind them in a decoder layer, in one launch for few rows.

`mogul::normed_linear` norms its rows first, `mogul::added_linear` adds a residual,
`mogul::normed_route` norms, multiplies by a router and picks experts, and `mogul::added_route` does
both. Compiled decoder layers call them (`serve/passes.py`). Many rows take the same steps one after
the other; a residual that a router follows is then added by the norm.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton import linear
from mogul.kernels.triton.launch import (
    Launch,
    aligned,
    cdiv,
    counters,
    device_index,
    next_power_of_2,
)
from mogul.kernels.triton.topk import softmax_topk

MOST_ROUTED, MOST_INNER = 256, 4096
"""Columns of a router and numbers of a row that one launch norms, multiplies and picks from."""

one_columns = 1
"""Columns that one program computes of one row: more were measured slower."""

added_rows = 16
"""Rows up to which a residual is added by the kernel that only reads fast."""

_LIB = torch.library.Library("mogul", "FRAGMENT")
_NORM = "Tensor norm, Tensor? eps_number, float eps"
_LIB.define(f"normed_linear(Tensor x, {_NORM}, Tensor weight) -> Tensor")
_LIB.define("added_linear(Tensor x, Tensor weight, Tensor residual) -> Tensor")
_ROUTE = f"{_NORM}, Tensor router, int k, bool renormalise, ScalarType dtype"
_LIB.define(f"normed_route(Tensor x, {_ROUTE}) -> (Tensor, Tensor, Tensor)")
_LIB.define(
    f"added_route(Tensor x, Tensor weight, Tensor residual, {_ROUTE}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def eps_of(eps_number: Tensor | None, eps: float) -> float:
    """The eps of a norm: a compiler hands numbers of modules over as tensors on the host."""
    return eps if eps_number is None else float(eps_number)


def norm_host(x: Tensor, norm: Tensor, eps_number: Tensor | None, eps: float) -> Tensor:
    """The definition of a norm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps_of(eps_number, eps))
    return norm * wide.to(x.dtype)


def _normed_linear_host(x: Tensor, norm: Tensor, n: Tensor | None, eps: float, w: Tensor) -> Tensor:
    return norm_host(x, norm, n, eps) @ w.T


def _added_linear_host(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return residual + x @ weight.T


def _normed_route_host(
    x: Tensor,
    norm: Tensor,
    eps_number: Tensor | None,
    eps: float,
    weight: Tensor,
    k: int,
    renormalise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    normed = norm_host(x, norm, eps_number, eps)
    return normed, *torch.ops.mogul.softmax_topk(normed @ weight.T, k, renormalise, dtype)


def _added_route_host(
    x: Tensor, weight: Tensor, residual: Tensor, *route: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = _added_linear_host(x, weight, residual)
    return total, *_normed_route_host(total, *route)


def norm_rows(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Rows over their root mean square, times a weight."""
    return _norm_launched(aligned(x), None, norm, eps)[1]


def norm_sums(x: Tensor, residual: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows and a residual, and the same normed."""
    return _norm_launched(aligned(x), aligned(residual), norm, eps)


def _norm_launched(
    x: Tensor, residual: Tensor | None, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The rows, with the residual where there is one, and their norm."""
    norm, out = aligned(norm), torch.empty_like(x)
    plus, total = (x, x) if residual is None else (residual, torch.empty_like(x))
    if len(x):
        dtypes = (x.dtype, plus.dtype, norm.dtype)
        launch = _norm(x.shape[1], eps, residual is not None, dtypes, device_index(x))
        launch((len(x), 1), device_index(x), x, plus, norm, total, out)
    return total, out


def normed_linear(
    x: Tensor, norm: Tensor, eps_number: Tensor | None, eps: float, weight: Tensor
) -> Tensor:
    """Products of rows that are normed first."""
    eps = eps_of(eps_number, eps)
    if len(x) == 1:
        return product_one(x, weight, norm=norm, eps=eps)
    return linear.product(norm_rows(x, norm, eps), weight, x.dtype)


def added_linear(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """Products of rows, and a residual."""
    if len(x) == 1:
        return product_one(x, weight, residual=residual)
    if len(x) <= added_rows:
        return linear.linear_few(x, weight, x.dtype, residual=residual)
    return torch.addmm(residual, x, weight.T)


def product_one(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """One program a few columns of one row, by plain sums."""
    columns, inner = weight.shape
    x, weight = aligned(x), aligned(weight)
    out = x.new_empty((len(x), columns))
    flags = (norm is not None, residual is not None)
    more = [x if some is None else aligned(some) for some in (norm, residual)]
    dtypes = tuple(tensor.dtype for tensor in (x, weight, *more))
    launch = _one(columns, inner, eps, flags, dtypes, one_columns, device_index(x))
    launch((cdiv(columns, one_columns), len(x)), device_index(x), x, more[0], weight, more[1], out)
    return out


def normed_route(
    x: Tensor,
    norm: Tensor,
    eps_number: Tensor | None,
    eps: float,
    weight: Tensor,
    k: int,
    renormalise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows, values and ids of their picks."""
    eps = eps_of(eps_number, eps)
    rows, (columns, inner) = len(x), weight.shape
    if not 0 < rows <= linear.few_rows or columns > MOST_ROUTED or inner > MOST_INNER:
        normed = norm_rows(x, norm, eps)
        logits = linear.product(normed, weight, x.dtype)
        return normed, *softmax_topk(logits, k, renormalise, dtype)
    x, norm, weight = aligned(x), aligned(norm), aligned(weight)
    normed, logits = torch.empty_like(x), x.new_empty((rows, columns), dtype=torch.float32)
    values, ids = x.new_empty((rows, k), dtype=dtype), x.new_empty((rows, k), dtype=torch.int64)
    dtypes = (x.dtype, norm.dtype, weight.dtype, dtype)
    launch = _route(columns, inner, k, renormalise, eps, dtypes, device_index(x))
    grid = (cdiv(columns, linear.NARROW_BLOCK), rows)
    parts = (x, norm, weight, normed, logits, counters(x.device), values, ids)
    launch(grid, device_index(x), *parts)
    return normed, values, ids


def added_route(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps_number: Tensor | None,
    eps: float,
    router: Tensor,
    k: int,
    renormalise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of rows and a residual; these normed; values and ids of their picks."""
    eps = eps_of(eps_number, eps)
    if len(x) <= max(added_rows, linear.few_rows):
        total = added_linear(x, weight, residual)
        return total, *normed_route(total, norm, None, eps, router, k, renormalise, dtype)
    product = linear.product(x, weight, x.dtype)
    total, normed = norm_sums(product, residual, norm, eps)
    logits = linear.product(normed, router, x.dtype)
    return total, normed, *softmax_topk(logits, k, renormalise, dtype)


@cache
def _norm(
    inner: int, eps: float, adds: bool, _dtypes: tuple[torch.dtype, ...], device: int
) -> Launch:
    from mogul.kernels.triton.normed_kernels import norm_rows as kernel

    pdl = linear.has_pdl(device)
    constants: dict[str, Any] = {
        "K": inner, "BLOCK_K": next_power_of_2(inner), "EPS": eps, "ADD": adds, "PDL": pdl
    }  # fmt: skip
    return Launch(kernel, constants, warps=4 if inner <= 2048 else 8, stages=1, pdl=pdl)


@cache
def _one(
    columns: int,
    inner: int,
    eps: float,
    flags: tuple[bool, bool],
    _dtypes: tuple[torch.dtype, ...],
    block: int,
    device: int,
) -> Launch:
    from mogul.kernels.triton.normed_kernels import product_one as kernel

    pdl = linear.has_pdl(device)
    constants: dict[str, Any] = {
        "N": columns, "K": inner, "BLOCK_N": block, "BLOCK_K": min(2048, next_power_of_2(inner)),
        "EPS": eps, "NORM": flags[0], "ADD": flags[1], "PDL": pdl,
    }  # fmt: skip
    return Launch(kernel, constants, warps=4, stages=1, pdl=pdl)


@cache
def _route(
    columns: int,
    inner: int,
    k: int,
    renormalise: bool,
    eps: float,
    _dtypes: tuple[torch.dtype, ...],
    device: int,
) -> Launch:
    from mogul.kernels.triton.normed_kernels import route_few as kernel

    pdl = linear.has_pdl(device)
    constants: dict[str, Any] = {
        "N": columns, "K": inner, "BLOCK_N": linear.NARROW_BLOCK,
        "BLOCK_K": next_power_of_2(inner), "WIDTH": next_power_of_2(columns), "PICKS": k,
        "SLOTS": next_power_of_2(k), "EPS": eps, "RENORMALISE": renormalise, "PDL": pdl,
    }  # fmt: skip
    return Launch(kernel, constants, warps=4, stages=1, pdl=pdl)


for _name, _device_path, _host in (
    ("normed_linear", normed_linear, _normed_linear_host),
    ("added_linear", added_linear, _added_linear_host),
    ("normed_route", normed_route, _normed_route_host),
    ("added_route", added_route, _added_route_host),
):
    _LIB.impl(_name, _device_path, "CUDA")
    _LIB.impl(_name, _host, "CPU")


@torch.library.register_fake("mogul::normed_linear", lib=_LIB)
def _(x: Tensor, _norm: Tensor, _number: Tensor | None, _eps: float, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mogul::added_linear", lib=_LIB)
def _(x: Tensor, weight: Tensor, _residual: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mogul::normed_route", lib=_LIB)
def _(
    x: Tensor,
    _norm: Tensor,
    _number: Tensor | None,
    _eps: float,
    _weight: Tensor,
    k: int,
    _renormalise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], k)
    ids = x.new_empty(shape, dtype=torch.int64)
    return torch.empty_like(x), x.new_empty(shape, dtype=dtype), ids


@torch.library.register_fake("mogul::added_route", lib=_LIB)
def _(
    x: Tensor,
    _weight: Tensor,
    residual: Tensor,
    _norm: Tensor,
    _number: Tensor | None,
    _eps: float,
    _router: Tensor,
    k: int,
    _renormalise: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total, shape = residual.new_empty(residual.shape), (x.shape[0], k)
    ids = x.new_empty(shape, dtype=torch.int64)
    return total, torch.empty_like(total), x.new_empty(shape, dtype=dtype), ids
