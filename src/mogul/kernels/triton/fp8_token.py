"""Products and experts in fp8 with what stands before and behind them in a decoder layer.

`mogul::rows_linear_fp8` takes rows in 16 bits, norms them where asked, rounds them, multiplies, and
adds a bias and a residual. `mogul::moe_normed_shared` norms rows, picks one expert of each group,
runs the picked experts and a shared one and adds both to the rows. One token is not rounded: it is
multiplied by plain sums, the experts in two launches without a sort. Compiled decoder layers call
them (`serve/rewrites_fp8.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogul.kernels.triton import quant_shared, routing
from mogul.kernels.triton.launch import (
    Launch,
    aligned,
    cdiv,
    counters,
    device_index,
    even_block,
    next_power_of_2,
)
from mogul.kernels.triton.linear import (
    FETCHED_BYTES,
    FEW_ROWS_FP8,
    has_pdl,
    linear_few,
    multiplies_fp8,
    scaled_product,
)
from mogul.kernels.triton.normed import eps_of, norm_host
from mogul.kernels.triton.quant_layer import rounded_rows

one_token = True
"""Whether a single token goes by plain sums."""

MOST_NORMED = 8192
"""Numbers of a row that one program holds."""


class OneTile(NamedTuple):
    """Columns and contracted numbers of one program's step, warps."""

    n: int
    k: int
    warps: int = 4
    held: int = 0
    """Blocks of the shared down weight that are read before the launch before has ended."""


linear_tile, up_tile, down_tile = OneTile(8, 1024), OneTile(8, 1024), OneTile(8, 1024, held=2)

Norm = tuple[Tensor, float]
"""Weight and eps."""


def rows_linear_fp8(
    x: Tensor,
    norm: Tensor | None,
    eps_number: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """norm(x) @ weight.T + bias + residual."""
    if x.is_cuda and not multiplies_fp8(x.device):
        return _linear_host(x, norm, eps_number, eps, weight, scale, bias, residual)
    eps = eps_of(eps_number, eps)
    if not len(x):
        return x.new_empty((0, len(weight)))
    if len(x) == 1 and one_token:
        return product_one(x, None if norm is None else (norm, eps), weight, scale, bias, residual)
    if norm is None:
        rows, row_scale = rounded_rows(aligned(x))
    else:
        _, rows, row_scale = normed_rows(x, (norm, eps), keep=False)
    if len(x) <= FEW_ROWS_FP8:
        scales = (row_scale, scale)
        return linear_few(rows, weight, x.dtype, scales, residual=residual, bias=bias)
    out = scaled_product(rows, row_scale, weight, scale, x.dtype, bias)
    return out if residual is None else out.add_(residual)


def product_one(
    x: Tensor,
    norm: Norm | None,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """One row by plain sums."""
    columns, inner = weight.shape
    x, out = aligned(x), x.new_empty((1, columns))
    more = [x if some is None else aligned(some) for some in (bias, residual)]
    flags = (norm is not None, bias is not None, residual is not None)
    weights, eps = (x, 0.0) if norm is None else (aligned(norm[0]), norm[1])
    dtypes = tuple(one.dtype for one in (x, weights, *more))
    launch = _one(columns, inner, eps, flags, linear_tile, dtypes, device_index(x))
    grid = (cdiv(columns, linear_tile.n), 1)
    launch(grid, device_index(x), x, weights, aligned(weight), scale, *more, out)
    return out


def normed_rows(x: Tensor, norm: Norm, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows in 16 bits (with `keep`), in e4m3, and their scales."""
    x, weight = aligned(x), aligned(norm[0])
    normed = torch.empty_like(x) if keep else x
    value = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if len(x):
        launch = _normed(x.shape[1], norm[1], keep, (x.dtype, weight.dtype), device_index(x))
        launch((len(x), 1), device_index(x), x, weight, normed, value, scale)
    return normed, value, scale


def moe_normed_shared(
    x: Tensor,
    norm: Tensor,
    eps_number: Tensor | None,
    eps: float,
    router: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rule: list[int],
    factor: float,
    *tensors: Tensor,
) -> Tensor:
    """Rows and what experts and a shared one give for them, normed.

    `tensors` are those of `mogul::moe_routed_shared`.
    """
    eps = eps_of(eps_number, eps)
    route = (bias, scale, rule, factor)
    if not len(x):
        return torch.empty_like(x)
    if len(x) == 1 and one_token and takes_one(router, rule):
        return _moe_one(x, (norm, eps), router, route, tensors)
    normed, rows, row_scale = normed_rows(x, (norm, eps), keep=True)

    def pick() -> tuple[Tensor, Tensor]:
        logits = torch.ops.mogul.linear(normed, router, torch.float32)
        return torch.ops.mogul.route(logits, *route)[:2]

    picked, shared, ids, weights = quant_shared.parts(
        normed, (rows, row_scale), tensors[:4], tensors[4:], pick
    )
    return _sum(picked, ids, weights, shared, x, rule[0])


def takes_one(router: Tensor, rule: list[int]) -> bool:
    """Whether one launch can pick: one expert of each group, groups of a power of two."""
    experts, picks, groups, nulls, limit = rule[:5]
    powers = all(n == next_power_of_2(n) for n in (experts, picks))
    return powers and picks == groups and not nulls and not limit and router.shape[1] <= MOST_NORMED


def _moe_one(
    x: Tensor, norm: Norm, router: Tensor, route: tuple[Any, ...], tensors: Sequence[Tensor]
) -> Tensor:
    """Three launches: norm, router and picks; up of all; down of all and the sums."""
    up, up_scale, down, down_scale, both, both_scale, last, last_scale = map(aligned, tensors)
    x, device = aligned(x), device_index(x)
    normed, ids, weights = pick_one(x, norm, router, *route)
    (experts, width, inner), picks = down.shape, ids.shape[1]
    wide = last.shape[1]
    sizes = (width, inner, wide, picks, experts)
    act = x.new_empty(picks * inner + wide)
    launch = _launch("up_one", sizes, up_tile, width, x.dtype, device)
    blocks = cdiv(wide, up_tile.n) + picks * cdiv(inner, up_tile.n)
    launch((blocks, 1), device, normed, up, up_scale, both, both_scale, ids, act)
    out = torch.empty_like(x)
    launch = _launch("down_one", sizes, down_tile, wide, x.dtype, device)
    parts = (act, down, down_scale, last, last_scale, ids, weights, x, out)
    launch((cdiv(width, down_tile.n), 1), device, *parts)
    return out


def pick_one(
    x: Tensor,
    norm: Norm,
    router: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rule: list[int],
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed row, and ids and weights of its picks."""
    weight, router = aligned(norm[0]), aligned(router)
    normed, logits = torch.empty_like(x), x.new_empty(rule[0], dtype=torch.float32)
    ids = x.new_empty((1, rule[1]), dtype=torch.int64)
    weights = x.new_empty((1, rule[1]), dtype=torch.float32)
    some = [logits if one is None else aligned(one) for one in (bias, scale)]
    num_bias = 0 if bias is None else bias.numel()
    dtypes = tuple(one.dtype for one in (x, weight, router, *some))
    inner = router.shape[1]
    facts = (num_bias, scale is not None, norm[1], factor)
    launch = _route(inner, tuple(rule), facts, dtypes, device_index(x))
    done = counters(x.device)
    parts = (x, weight, router, *some, normed, logits, done, ids, weights)
    launch((rule[0], 1), device_index(x), *parts)
    return normed, ids, weights


def _sum(
    y: Tensor, ids: Tensor, weights: Tensor, more: Tensor, plus: Tensor, experts: int
) -> Tensor:
    """The weighted sum over picks, and two more terms."""
    out = torch.empty_like(more)
    if len(out):
        block, width = even_block(out.shape[1]), out.shape[1]
        dtypes = (y.dtype, ids.dtype, weights.dtype)
        launch = _summing(width, ids.shape[1], experts, block, dtypes, device_index(y))
        grid = (len(out), cdiv(width, block))
        launch(grid, device_index(y), y, ids, weights, more, aligned(plus), out)
    return out


def _made(name: str, constants: dict[str, Any], warps: int, device: int) -> Launch:
    from mogul.kernels.triton import fp8_token_kernels

    pdl = device >= 0 and has_pdl(device)
    kernel = getattr(fp8_token_kernels, name)
    return Launch(kernel, {**constants, "PDL": pdl}, warps=warps, stages=1, pdl=pdl)


def _lines(rows: int) -> int:
    """Of each of so many weights' rows that come into the cache ahead."""
    return max(1, FETCHED_BYTES // (rows * 128))


@cache
def _one(
    columns: int,
    inner: int,
    eps: float,
    flags: tuple[bool, bool, bool],
    tile: OneTile,
    _dtypes: tuple[torch.dtype, ...],
    device: int,
) -> Launch:
    constants = {
        "N": columns, "K": inner, "BLOCK_N": tile.n,
        "BLOCK_K": min(tile.k, next_power_of_2(inner)), "EPS": eps, "NORM": flags[0],
        "BIAS": flags[1], "ADD": flags[2], "LINES": _lines(columns),
    }  # fmt: skip
    return _made("product_one_fp8", constants, tile.warps, device)


@cache
def _normed(
    columns: int, eps: float, keep: bool, _dtypes: tuple[torch.dtype, ...], device: int
) -> Launch:
    constants = {"C": columns, "BLOCK_C": next_power_of_2(columns), "EPS": eps, "KEEP": keep}
    return _made("norm_rounded", constants, 4 if columns <= 2048 else 8, device)


@cache
def _launch(
    name: str,
    sizes: tuple[int, int, int, int, int],
    tile: OneTile,
    contracted: int,
    _dtype: torch.dtype,
    device: int,
) -> Launch:
    dims = dict(zip("DFSKE", sizes, strict=True))
    block = min(tile.k, next_power_of_2(contracted))
    columns = 2 * dims["S"] if name == "up_one" else dims["D"]
    constants = {**dims, "BLOCK_N": tile.n, "BLOCK_K": block, "LINES": _lines(columns)}
    if name == "down_one":
        constants["HELD"] = min(tile.held, cdiv(contracted, block))
    return _made(name, constants, tile.warps, device)


@cache
def _route(
    inner: int,
    rule: tuple[int, ...],
    facts: tuple[int, bool, float, float],
    _dtypes: tuple[torch.dtype, ...],
    device: int,
) -> Launch:
    num_bias, scaled, eps, factor = facts
    constants = {
        "E": rule[0], "K": inner, "BLOCK_K": next_power_of_2(inner), "PICKS": rule[1], "EPS": eps,
        "SCORE": rule[5], "WEIGHTING": rule[6], "FACTOR": factor, "NUM_BIAS": num_bias,
        "SCALED": scaled,
    }  # fmt: skip
    return _made("route_one", constants, 8, device)


@cache
def _summing(
    width: int,
    picks: int,
    experts: int,
    block: int,
    _dtypes: tuple[torch.dtype, ...],
    device: int,
) -> Launch:
    constants = {"D": width, "K": picks, "E": experts, "BLOCK_D": block}
    return _made("sum_added", constants, max(1, block // 256), device)


def _linear_host(
    x: Tensor,
    norm: Tensor | None,
    eps_number: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The definition."""
    from mogul.kernels.quant_format import quantise_rows

    rows = x if norm is None else norm_host(x, norm, eps_number, eps)
    out = torch.ops.mogul.linear_fp8(*quantise_rows(rows), weight, scale, x.dtype)
    out = out if bias is None else out + bias
    return out if residual is None else residual + out


def _moe_host(
    x: Tensor,
    norm: Tensor,
    eps_number: Tensor | None,
    eps: float,
    router: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    rule: list[int],
    factor: float,
    *tensors: Tensor,
) -> Tensor:
    """The definition."""
    from mogul.kernels.quant_backends import moe_with_shared
    from mogul.kernels.reference.route import route_reference

    rows = norm_host(x, norm, eps_number, eps)
    spec = routing.spec_of(rule, factor)
    ids, weights, _ = route_reference(rows.float() @ router.float().T, spec, bias, scale)
    out, shared = moe_with_shared(rows, tensors[:4], ids, weights, tensors[4:])
    return x + (out + shared)


_LIB = torch.library.Library("mogul", "FRAGMENT")
_NORM = "Tensor? eps_number, float eps"
_LIB.define(
    f"rows_linear_fp8(Tensor x, Tensor? norm, {_NORM}, Tensor weight, Tensor scale, Tensor? bias, "
    "Tensor? residual) -> Tensor"
)
_LIB.define(
    f"moe_normed_shared(Tensor x, Tensor norm, {_NORM}, Tensor router, Tensor? bias, "
    "Tensor? scale, int[] rule, float factor, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
    "Tensor down_scale, Tensor up, Tensor up_scale, Tensor last, Tensor last_scale) -> Tensor"
)
for _name, _on_device, _on_host in (
    ("rows_linear_fp8", rows_linear_fp8, _linear_host),
    ("moe_normed_shared", moe_normed_shared, _moe_host),
):
    _LIB.impl(_name, _on_device, "CUDA")
    _LIB.impl(_name, _on_host, "CPU")


@torch.library.register_fake("mogul::rows_linear_fp8", lib=_LIB)
def _(x: Tensor, _norm: Any, _number: Any, _eps: float, weight: Tensor, *_more: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mogul::moe_normed_shared", lib=_LIB)
def _(x: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
