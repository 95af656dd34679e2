"""A wide linear layer, such as an output head, in whole numbers of 8 bits with one scale a column.

Rounding to 255 even steps costs a third of e4m3's three bits, so the rows of the input stay in 16
bits. `mogul::linear_bytes` reads such a weight once for up to `MOST_ROWS` rows; more rows, other
devices and fp32 rows take blocks of columns turned back into the rows' dtype.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mogul.core.errors import ConfigError
from mogul.kernels.triton.launch import Launch, aligned, cdiv, device_index, next_power_of_2
from mogul.kernels.triton.linear import has_pdl

MOST_ROWS = 256
MIDDLE, MOST = 128, 127
"""What is added to a number so that a byte holds it, and the largest number."""

_BLOCK_COLUMNS = 8192
"""Columns that are turned back at once."""


class ByteTile(NamedTuple):
    """Rows, columns and words of one program's step, warps, stages."""

    t: int
    n: int
    k: int
    warps: int = 4
    stages: int = 1


one_tile = ByteTile(1, 8, 512)
few_tiles = (
    ByteTile(16, 64, 64, stages=4),
    ByteTile(64, 128, 64, stages=3),
    ByteTile(128, 128, 64, warps=8, stages=3),
    ByteTile(MOST_ROWS, 128, 32, warps=8, stages=3),
)
"""Measured on an H200 at 8, 64 and 228 rows of Pangu Pro's head: 4.05, 2.9 and 1.04 TB/s."""


def pack_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Words [N, C / 2] and scales [N] of a weight [N, C].

    Raises:
        ConfigError: an odd number of columns.
    """
    if weight.shape[1] % 2:
        raise ConfigError(
            f"a row of {weight.shape[1]} numbers has no halves to pair",
            fix="keep this layer in 16 bits",
        )
    words, scales = [], []
    for part in weight.split(_BLOCK_COLUMNS):
        wide = part.float()
        scale = wide.abs().amax(1).clamp(min=1e-12) / MOST
        left, right = ((wide / scale[:, None]).round() + MIDDLE).to(torch.uint8).chunk(2, 1)
        words.append(torch.stack((left, right), 2).view(torch.int16)[..., 0])
        scales.append(scale)
    return torch.cat(words), torch.cat(scales)


def unpack_bytes(words: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [N, C] that words and scales stand for."""
    both = words.contiguous().view(torch.uint8).view(*words.shape, 2)
    numbers = torch.cat((both[..., 0], both[..., 1]), 1).float() - MIDDLE
    return (numbers * scale[:, None]).to(dtype)


def linear_bytes(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Products [T, N] of rows [T, C] and a weight in words, in the rows' dtype."""
    return torch.ops.mogul.linear_bytes(x, words, scale)


def _by_blocks(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """The definition, some columns at a time."""
    parts = zip(words.split(_BLOCK_COLUMNS), scale.split(_BLOCK_COLUMNS), strict=True)
    return torch.cat([functional.linear(x, unpack_bytes(*part, x.dtype)) for part in parts], 1)


def _on_device(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    is_short = x.dtype in (torch.float16, torch.bfloat16)
    if not is_short or len(x) > MOST_ROWS or torch.cuda.get_device_capability(x.device) < (8, 0):
        return _by_blocks(x, words, scale)
    return multiply(x, words, scale)


def multiply(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """One launch; one row by plain sums."""
    count, columns = len(x), len(words)
    out = x.new_empty((count, columns))
    if not count:
        return out
    x, words, scale = aligned(x), aligned(words), aligned(scale)
    device = device_index(x)
    if count == 1:
        launch = _launch("bytes_one", columns, x.shape[1], one_tile, 1, x.dtype, device)
        launch((cdiv(columns, one_tile.n), 1), device, x, words, scale, out)
        return out
    tile = next((tile for tile in few_tiles if count <= tile.t), few_tiles[-1])
    blocks = cdiv(count, tile.t)
    launch = _launch("bytes_few", columns, x.shape[1], tile, blocks, x.dtype, device)
    launch((cdiv(columns, tile.n) * blocks, 1), device, x, words, scale, out, count)
    return out


@cache
def _launch(
    name: str,
    columns: int,
    inner: int,
    tile: ByteTile,
    blocks: int,
    _dtype: torch.dtype,
    device: int,
) -> Launch:
    from mogul.kernels.triton import byte_linear_kernels

    pdl = device >= 0 and has_pdl(device)
    block_k = min(tile.k, max(16, next_power_of_2(inner // 2)))
    constants: dict[str, Any] = {
        "N": columns, "K": inner, "BLOCK_N": tile.n, "BLOCK_K": block_k, "PDL": pdl,
    }  # fmt: skip
    if name == "bytes_few":
        constants |= {"BLOCK_T": tile.t, "BLOCKS_T": blocks, "STAGES": tile.stages}
    kernel = getattr(byte_linear_kernels, name)
    return Launch(kernel, constants, warps=tile.warps, stages=tile.stages, pdl=pdl)


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define("linear_bytes(Tensor x, Tensor words, Tensor scale) -> Tensor")
_LIB.impl("linear_bytes", _on_device, "CUDA")
_LIB.impl("linear_bytes", _by_blocks, "CompositeExplicitAutograd")


@torch.library.register_fake("mogul::linear_bytes", lib=_LIB)
def _(x: Tensor, words: Tensor, _scale: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], words.shape[0]))
