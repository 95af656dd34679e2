"""Linear layers with fp8 weights: rows in e4m3 with a scale each times e4m3 weights, fp32 sums.

`mogul::linear_fp8` takes rows that are rounded already (`quant_format.quantise_rows`), because
compiled code then rounds them in the launch that makes them. Few rows read the weights through
`linear_few`; more go to PyTorch's scaled product. Other devices multiply dequantised numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.kernels.triton.launch import INTERPRETED, Launch, cdiv, next_power_of_2

FEW_ROWS = 64
"""Rows up to which a product is bound by reading its weights."""

_FP8_CAPABILITY = (8, 9)

Tile = tuple[int, int, int, int]
"""Columns, contracted numbers, warps, stages."""

few_tile: Tile | None = None
"""Used instead of the rule where set."""

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "linear_fp8(Tensor rows, Tensor row_scale, Tensor weight, Tensor weight_scale, "
    "ScalarType dtype) -> Tensor"
)


def linear_fp8(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Products [T, N] of rounded rows [T, C] and weights [N, C], with one scale a row of each."""
    return torch.ops.mogul.linear_fp8(rows, row_scale, weight, weight_scale, dtype)


def check_linear(rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> None:
    """Refuse tensors that do not belong together."""
    if rows.dim() != 2 or weight.dim() != 2 or rows.shape[1] != weight.shape[1]:
        raise ConfigError(f"rows {tuple(rows.shape)} do not fit weight {tuple(weight.shape)}")
    if row_scale.shape != rows.shape[:1] or weight_scale.shape != weight.shape[:1]:
        raise ConfigError(
            f"scales {tuple(row_scale.shape)} and {tuple(weight_scale.shape)} are not one a row of "
            f"{tuple(rows.shape)} and of {tuple(weight.shape)}"
        )


def linear_on_host(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The definition: fp32 products of the rounded numbers, scaled by row and by column."""
    check_linear(rows, row_scale, weight, weight_scale)
    product = rows.float() @ weight.float().T
    return (product * row_scale[:, None] * weight_scale).to(dtype)


def linear_on_device(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same on a GPU; where it multiplies no fp8, from dequantised numbers."""
    check_linear(rows, row_scale, weight, weight_scale)
    if torch.cuda.get_device_capability(rows.device) < _FP8_CAPABILITY:
        wide = (weight.float() * weight_scale[:, None]).to(dtype)
        return (rows.float() * row_scale[:, None]).to(dtype) @ wide.T
    if len(rows) <= FEW_ROWS:
        return linear_few(rows, row_scale, weight, weight_scale, dtype)
    out = torch._scaled_mm(
        rows,
        weight.T,
        scale_a=row_scale[:, None],
        scale_b=weight_scale[None],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return out.to(dtype)


def linear_few(
    rows: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """One program a block of columns; all rows of a block of rows at once."""
    count, (columns, inner) = len(rows), weight.shape
    out = torch.empty((count, columns), dtype=dtype, device=rows.device)
    if not count:
        return out
    device = rows.device.index if rows.is_cuda else -1
    block_t = min(FEW_ROWS, max(16, next_power_of_2(count)))
    tile = few_tile or tile_of(columns, block_t)
    launch = _launch(columns, inner, block_t, tile, dtype, device)
    launch(
        (cdiv(columns, tile[0]), cdiv(count, block_t)), device,
        rows, row_scale, weight, weight_scale, out, count,
    )  # fmt: skip
    return out


def tile_of(columns: int, block_t: int) -> Tile:
    """Narrow blocks of columns while rows are few, so that every multiprocessor reads."""
    if block_t > 16:
        return (64 if columns >= 8192 else 32, 128, 4, 4)
    return (32 if columns >= 8192 else 16, 256, 4, 4)


@cache
def _launch(
    columns: int, inner: int, block_t: int, tile: Tile, dtype: torch.dtype, device: int
) -> Launch:
    """The launch of one shape; `dtype` only tells launches apart."""
    from mogul.kernels.triton.linear_kernels import linear_few as kernel

    block_n, block_k, warps, stages = tile
    pdl = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    constants: dict[str, Any] = {
        "N": columns, "K": inner, "BLOCK_T": block_t, "BLOCK_N": block_n, "BLOCK_K": block_k,
        "STAGES": stages, "PDL": pdl,
    }  # fmt: skip
    return Launch(kernel, constants, warps=warps, stages=stages, pdl=pdl)


_LIB.impl("linear_fp8", linear_on_device, "CUDA")
_LIB.impl("linear_fp8", linear_on_host, "CPU")


@torch.library.register_fake("mogul::linear_fp8", lib=_LIB)
def _(rows: Tensor, _scale: Tensor, weight: Tensor, _scales: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[0]), dtype=dtype)
