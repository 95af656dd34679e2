"""Number formats of quantised expert weights: 8-bit floats, and 4-bit integers in groups.

Decides scales and packing of a matrix [N, C] (C is contracted). fp8 is e4m3 with one fp32 scale a
row, w = q * scale; fp8-w8a16 stores the same and multiplies rows whose numbers are sums of two in
e4m3. int4 has groups of columns, the last of which may be short: w = q * scale + offset with q in
0..15; byte j of a row holds q[2j] in its low half and q[2j + 1] in its high half, and scales
[groups, N, 2] hold (scale, offset) in bf16, so that one word serves a group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mogul.core.errors import ConfigError, nearest

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT4_GROUPS = (32, 64, 128)
CLIPS = tuple(1 - 0.05 * step for step in range(8))
"""Shares of a group's range that int4 tries."""
FP8_SCALES = 32
"""Scales that an fp8 row tries when the importance of its inputs is known."""
REFITS = 2
"""Times that scale and offset are fitted to the rounded values."""
_TINY = 1e-12


@dataclass(frozen=True)
class ExpertFormat:
    """How the weights of experts are stored."""

    kind: Literal["fp8", "int4"]
    group: int = 0
    """Weights that share a scale, int4 only."""

    weight_only: bool = False
    """fp8 only: rows keep what 16 bits hold. int4 is always so."""

    def __post_init__(self) -> None:
        if self.kind == "int4" and self.group not in INT4_GROUPS:
            raise ConfigError(
                f"int4 groups of {self.group} weights are unknown", fix=f"use one of {INT4_GROUPS}"
            )
        if self.kind == "int4" and self.weight_only:
            raise ConfigError("int4 is always weight-only", fix="leave weight_only out")

    @property
    def name(self) -> str:
        """fp8, fp8-w8a16, int4-32, int4-64 or int4-128."""
        if self.kind == "int4":
            return f"int4-{self.group}"
        return "fp8-w8a16" if self.weight_only else "fp8"

    @property
    def bits(self) -> float:
        """Bits a weight takes, scales and offsets included (fp8: scales are lost in rows)."""
        return 8.0 if self.kind == "fp8" else 4 + 32 / self.group


FORMATS = {
    spec.name: spec
    for spec in (
        ExpertFormat("fp8"),
        ExpertFormat("fp8", weight_only=True),
        *(ExpertFormat("int4", group) for group in INT4_GROUPS),
    )
}


def expert_format(name: str | ExpertFormat) -> ExpertFormat:
    """Look a format up: fp8, fp8-w8a16, int4-32, int4-64, int4-128; int4 alone is int4-32."""
    if isinstance(name, ExpertFormat):
        return name
    if name == "int4":
        return FORMATS["int4-32"]
    if name not in FORMATS:
        known = sorted(FORMATS)
        fix = f"use one of {', '.join(known)}" if re.match("int|w4", name) else nearest(name, known)
        raise ConfigError(f"experts have no format {name!r}", fix=fix)
    return FORMATS[name]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4m3 values and one fp32 scale a row: how fp8 treats both activations and weights."""
    wide, scale = _over_scale(x)
    return wide.to(FP8), scale


def _over_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in fp32 over a scale each, which takes the largest number of a row to e4m3's."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp(min=_TINY) / FP8_MAX
    return (wide / scale[..., None]).clamp(-FP8_MAX, FP8_MAX), scale


def split_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4m3 values [R, 2C] and a scale a row: rounded rows, then what rounding left, rounded too.

    Their sum keeps 8 significant bits, as bf16 does, of all that is above 2^-11 of a row's largest.
    """
    wide, scale = _over_scale(x)
    first = wide.to(FP8)
    return torch.cat((first, (wide - first.float()).to(FP8)), -1), scale


def quantise_fp8_weight(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E4m3 values and fp32 scales of a matrix [N, C], row by row.

    With `importance` [C] each row takes the scale, of `FP8_SCALES` within one power of two, that
    has the least error weighted by it: where few inputs are large, their weights become exact.
    """
    value, scale = quantise_rows(weight)
    if importance is None:
        return value, scale
    wide, weights = weight.float(), importance.float().to(weight.device)

    def error(value: Tensor, scale: Tensor) -> Tensor:
        return (weights * (value.float() * scale[:, None] - wide).square()).sum(-1)

    base, best = scale, error(value, scale)
    for step in range(1, FP8_SCALES):
        other_scale = base * 2 ** (step / FP8_SCALES)
        other = (wide / other_scale[:, None]).to(FP8)
        found = error(other, other_scale)
        wins = found < best
        best = torch.where(wins, found, best)
        scale = torch.where(wins, other_scale, scale)
        # fp8 tensors know no where: the bytes are chosen
        bytes_ = torch.where(wins[:, None], other.view(torch.uint8), value.view(torch.uint8))
        value = bytes_.view(FP8)
    return value, scale


def quantise_int4(
    weight: Tensor, group: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Packed values [N, C / 2] and (scale, offset) pairs [groups, N, 2] of a matrix [N, C].

    Each group tries several ranges, each refined by least squares, and keeps the best by squared
    error, weighted by `importance` [C] (mean square of every input) where that is known.
    """
    if weight.shape[-1] % 2:
        raise ConfigError(
            f"int4 packs pairs, but rows have {weight.shape[-1]} weights",
            fix="use fp8, or pad the contracted width to an even number",
        )
    wide = _grouped(weight.float(), group, "replicate")
    weights = wide.new_ones(weight.shape[-1]) if importance is None else importance.float()
    weights = _grouped(weights.to(weight.device)[None], group, "constant")
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    best: Found | None = None
    for clip in CLIPS:
        scale = (high - low) * (clip / 15)
        offset = (low + high) / 2 - 7.5 * scale
        for _ in range(1 + REFITS):
            scale = scale.clamp(min=_TINY).bfloat16().float()
            offset = offset.bfloat16().float()
            value = ((wide - offset) / scale).round().clamp(0, 15)
            error = (weights * (value * scale + offset - wide).square()).sum(-1, keepdim=True)
            best = _better(best, (error, value, scale, offset))
            scale, offset = _least_squares(value, wide, weights)
    assert best is not None  # CLIPS is not empty
    _, value, scale, offset = best
    value = value.flatten(-2)[..., : weight.shape[-1]].to(torch.uint8)
    pairs = torch.stack((scale[..., 0], offset[..., 0]), -1).bfloat16()
    return value[..., ::2] | (value[..., 1::2] << 4), pairs.transpose(0, 1).contiguous()


def _grouped(matrix: Tensor, group: int, mode: str) -> Tensor:
    """[N, groups, group]; a short last group is filled."""
    return functional.pad(matrix, (0, -matrix.shape[-1] % group), mode=mode).unflatten(
        -1, (-1, group)
    )


Found = tuple[Tensor, Tensor, Tensor, Tensor]


def _better(old: Found | None, new: Found) -> Found:
    """Group by group the one with the smaller error (first of each)."""
    if old is None:
        return new
    wins = new[0] < old[0]
    error, value, scale, offset = (torch.where(wins, n, o) for n, o in zip(new, old, strict=True))
    return error, value, scale, offset


def _least_squares(value: Tensor, wide: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset that map these integers nearest to the weights."""
    total = weights.sum(-1, keepdim=True).clamp(min=_TINY)
    mean_value = (weights * value).sum(-1, keepdim=True) / total
    mean = (weights * wide).sum(-1, keepdim=True) / total
    spread = (weights * (value - mean_value).square()).sum(-1, keepdim=True)
    slope = (weights * (value - mean_value) * (wide - mean)).sum(-1, keepdim=True)
    scale = slope / spread.clamp(min=_TINY)
    return scale, mean - scale * mean_value


def unpack_int4(packed: Tensor) -> Tensor:
    """[..., C] values 0..15 of [..., C/2] bytes."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantise_int4(packed: Tensor, pairs: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return q * scale + offset with one rounding to `dtype`: what the kernels multiply with."""
    value = unpack_int4(packed).to(torch.float32)
    scale, offset = pairs.float().transpose(-3, -2)[..., None, :].unbind(-1)
    wide = functional.pad(value, (0, -value.shape[-1] % group)).unflatten(-1, (-1, group))
    return (wide * scale + offset).flatten(-2)[..., : value.shape[-1]].to(dtype)


def dequantise_fp8(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Value times scale, rounded to `dtype`."""
    return (value.float() * scale[..., None]).to(dtype)
