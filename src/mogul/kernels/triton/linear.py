"""Linear layers of few rows, whose time is the reading of their weight; fp8 weights for any rows.

`mogul::linear_fp8` multiplies rows in e4m3 with a scale each by e4m3 weights. It takes rows that
are rounded already (`quant_format.quantise_rows`), because compiled code then rounds them in the
launch that makes them. `mogul::linear` is a plain product that may give fp32. On a GPU few rows go
through `linear_few`, more to PyTorch's products; other devices have the definition.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.log import log
from mogul.kernels.triton.launch import (
    INTERPRETED,
    Launch,
    aligned,
    cdiv,
    device_index,
    next_power_of_2,
)

BLOCK_ROWS = 64
"""Rows that one program multiplies at most."""

FEW_ROWS_FP8 = 64
few_rows = 16
"""Rows up to which 16-bit products are read by mogul's kernels."""

NARROW = 256
"""Columns of a router at most: more programs than columns then share the work."""

WIDE, WIDE_ROWS = 4096, 64
"""Products of so many columns are read by `linear_few` up to so many rows."""

_FP8_CAPABILITY = (8, 9)
NARROW_BLOCK = 4

FETCHED_BYTES, _LINE_BYTES = 24 << 20, 128
"""Of a weight that the kernel before lets into the L2 cache; a whole large one would not fit."""

Tile = tuple[int, int, int, int]
"""Columns, contracted numbers, warps, stages."""

few_tile: Tile | None = None
"""Used instead of the rule where set."""

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "linear_fp8(Tensor rows, Tensor row_scale, Tensor weight, Tensor weight_scale, "
    "ScalarType dtype) -> Tensor"
)
_LIB.define("linear(Tensor x, Tensor weight, ScalarType dtype) -> Tensor")


def linear_fp8(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Products [T, N] of rounded rows [T, C] and weights [N, C], with one scale a row of each."""
    return torch.ops.mogul.linear_fp8(rows, row_scale, weight, weight_scale, dtype)


def check_linear(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    """Refuse tensors that do not belong together."""
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"rows {tuple(rows.shape)} do not fit weight {tuple(weight.shape)}",
            fix="pass rows [T, C] and a weight [N, C]; flatten batches",
        )
    if row_scale.shape != rows.shape[:1] or weight_scale.shape != weight.shape[:1]:
        raise ConfigError(
            f"scales {tuple(row_scale.shape)} and {tuple(weight_scale.shape)} are not one a row of "
            f"{tuple(rows.shape)} and of {tuple(weight.shape)}",
            fix="pass the two results of quantise_rows for each side",
        )


@cache
def _tell_of_definition() -> None:
    log.warning(
        "fp8 linear layers run by their definition on the processor: it saves memory, not time"
    )


def _fp8_on_host(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition: fp32 products of the rounded numbers, scaled by row and by column."""
    check_linear(rows, row_scale, weight, weight_scale)
    _tell_of_definition()
    product = rows.float() @ weight.float().T
    return (product * row_scale[:, None] * weight_scale).to(dtype)


def _fp8_on_device(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same on a GPU; where it multiplies no fp8, from dequantised numbers."""
    check_linear(rows, row_scale, weight, weight_scale)
    if not multiplies_fp8(rows.device):
        wide = (weight.float() * weight_scale[:, None]).to(dtype)
        return (rows.float() * row_scale[:, None]).to(dtype) @ wide.T
    if len(rows) <= FEW_ROWS_FP8:
        return linear_few(rows, weight, dtype, (row_scale, weight_scale))
    return scaled_product(rows, row_scale, weight, weight_scale, dtype)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a GPU has products of fp8."""
    return torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def scaled_product(
    rows: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Many rows in e4m3, by PyTorch."""
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rows,
        weight.T,
        scale_a=row_scale[:, None],
        scale_b=weight_scale[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


def _on_host(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(dtype) @ weight.to(dtype).T).to(dtype)


def product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain product [T, N] of 16-bit numbers, in their dtype or in fp32."""
    columns = len(weight)
    most = WIDE_ROWS if few_rows and columns > WIDE else few_rows
    if len(x) <= most and torch.cuda.get_device_capability(x.device) >= (8, 0):
        few = linear_narrow if columns <= NARROW else linear_few
        return few(x, weight, dtype)
    if dtype == x.dtype:
        return torch.mm(x, weight.T)
    return torch.mm(x, weight.T, out_dtype=dtype)


def linear_narrow(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """One program four columns of one row."""
    columns, inner = weight.shape
    x, weight = aligned(x), aligned(weight)
    out = torch.empty((len(x), columns), dtype=dtype, device=x.device)
    if len(x):
        device = device_index(x)
        launch = _narrow(columns, inner, (x.dtype, weight.dtype, dtype), device)
        launch((cdiv(columns, NARROW_BLOCK), len(x)), device, x, weight, out)
    return out


def linear_few(
    rows: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    scales: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """One program a block of columns; all rows of a block of rows at once."""
    count, (columns, inner) = len(rows), weight.shape
    rows, weight = aligned(rows), aligned(weight)
    out = torch.empty((count, columns), dtype=dtype, device=rows.device)
    if not count:
        return out
    device = device_index(rows)
    block_t = min(BLOCK_ROWS, max(16, next_power_of_2(count)))
    tile = few_tile or tile_of(columns, block_t, weight.itemsize)
    adds = (residual is not None, bias is not None)
    row_scale, weight_scale = scales or (out, out)
    plus, more = (out if one is None else aligned(one) for one in (residual, bias))
    dtypes = (rows.dtype, weight.dtype, dtype, plus.dtype, more.dtype)
    launch = _launch(columns, inner, block_t, tile, dtypes, adds, device)
    launch(
        (cdiv(columns, tile[0]), cdiv(count, block_t)), device,
        rows, row_scale, weight, weight_scale, plus, more, out, count,
    )  # fmt: skip
    return out


def tile_of(columns: int, block_t: int, item_bytes: int) -> Tile:
    """Measured on an H100, see the ledger; 64 columns are a warp group's, and take 64 rows too."""
    if item_bytes == 1:
        return (64, 256, 4, 4) if columns > WIDE + 2048 else (64, 128, 4, 5)
    return (64, 128, 4, 4) if columns > WIDE else (16, 256, 4, 4)


@cache
def _launch(
    columns: int,
    inner: int,
    block_t: int,
    tile: Tile,
    dtypes: tuple[torch.dtype, ...],
    adds: tuple[bool, bool],
    device: int,
) -> Launch:
    """The launch of one shape; the dtypes of all tensors, rows first, tell launches apart."""
    from mogul.kernels.triton.linear_kernels import linear_few as kernel

    block_n, block_k, warps, stages = tile
    pdl = has_pdl(device)
    constants: dict[str, Any] = {
        "N": columns, "K": inner, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "STAGES": stages, "SCALED": dtypes[0].itemsize == 1, "ADD": adds[0], "BIAS": adds[1],
        "LINES": max(1, FETCHED_BYTES // (columns * _LINE_BYTES)), "PDL": pdl,
    }  # fmt: skip
    return Launch(kernel, constants, warps=warps, stages=stages, pdl=pdl)


@cache
def _narrow(columns: int, inner: int, _dtypes: tuple[torch.dtype, ...], device: int) -> Launch:
    from mogul.kernels.triton.linear_kernels import linear_narrow as kernel

    pdl = has_pdl(device)
    block_k = min(1024, next_power_of_2(inner))
    constants = {"N": columns, "K": inner, "BLOCK_N": NARROW_BLOCK, "BLOCK_K": block_k, "PDL": pdl}
    return Launch(kernel, constants, warps=4, stages=1, pdl=pdl)


def has_pdl(device: int) -> bool:
    """Whether a launch may begin while the one before it ends."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


for _name, _device, _host in (
    ("linear_fp8", _fp8_on_device, _fp8_on_host),
    ("linear", product, _on_host),
):
    _LIB.impl(_name, _device, "CUDA")
    _LIB.impl(_name, _host, "CPU")


@torch.library.register_fake("mogul::linear_fp8", lib=_LIB)
def _(rows: Tensor, _scale: Tensor, weight: Tensor, _scales: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)


@torch.library.register_fake("mogul::linear", lib=_LIB)
def _(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)
