"""What each kind of kernel must compute and move: FLOP, bytes and the axes it varies along.

Every function takes numbers or arrays of numbers (a whole measured table at once), so prediction
and calibration use one definition. `features` are the coordinates in which two calls of a kind
are near each other; they are logarithms, scaled so that a step of 1 matters equally everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Dims = Mapping[str, Any]


@dataclass(frozen=True)
class Demand:
    """FLOP, bytes and features of one kernel call, or of a table of them."""

    flop: Any
    moved_bytes: Any
    features: Any
    """Shape [..., F]."""

    tiled_flop: Any = None
    """FLOP with the rows that fill up tiles; None means like `flop`."""

    @property
    def padded_flop(self) -> Any:
        """What the arithmetic units see."""
        return self.flop if self.tiled_flop is None else self.tiled_flop


def _log(*columns: Any) -> np.ndarray:
    logs = [np.log(np.maximum(column, 1e-9)) for column in columns]
    return np.stack(np.broadcast_arrays(*logs), axis=-1)


def gemm(d: Dims) -> Demand:
    """A matrix product [m, k] x [k, n]; weights in `weight_bytes`, inputs in `input_bytes`."""
    m, n, k = d["m"], d["n"], d["k"]
    moved = n * k * d["weight_bytes"] + m * k * d["input_bytes"] + m * n * 2
    flop = 2.0 * m * n * k
    return Demand(flop, moved, _log(m, n, k))


MOE_TILE_ROWS = 64
"""Rows an expert's tile holds at least: what a nearly empty expert costs in arithmetic."""


def moe(d: Dims) -> Demand:
    """Routed experts of one rank: `rows` rows over `distinct` experts of width `width`."""
    rows, distinct = d["rows"], np.maximum(d["distinct"], 1e-3)
    hidden, width = d["hidden"], d["width"]
    weights = distinct * 3.0 * hidden * width * d["weight_bytes"]
    moved = weights + rows * (hidden * (d["input_bytes"] + 2) + width * (4 + d["input_bytes"]))
    tiled = 6.0 * (rows + distinct * MOE_TILE_ROWS / 2) * hidden * width
    features = _log(rows / distinct, distinct, hidden, width, rows)
    return Demand(6.0 * rows * hidden * width, moved, features * [1.0, 0.5, 0.5, 1.0, 0.3], tiled)


def attention_decode(d: Dims) -> Demand:
    """One query a sequence against `context` cached tokens, grouped-query heads."""
    pairs = d["batch"] * d["context"]
    widths = d["key_dim"] + d["value_dim"]
    flop = 2.0 * pairs * d["heads"] * widths
    moved = pairs * d["kv_heads"] * widths * d["kv_bytes"] + d["batch"] * d["heads"] * widths * 2
    ratio = d["heads"] / d["kv_heads"]
    features = _log(d["batch"], d["context"], d["kv_heads"], ratio, d["key_dim"])
    return Demand(flop, moved, features * [1.0, 1.0, 0.7, 0.5, 0.5])


def attention_prefill(d: Dims) -> Demand:
    """`tokens` new tokens a sequence after `prior` cached ones, causal."""
    tokens, prior = d["tokens"], d.get("prior", 0)
    pairs = d["batch"] * tokens * (prior + tokens / 2)
    widths = d["key_dim"] + d["value_dim"]
    flop = 2.0 * pairs * d["heads"] * widths
    cached = d["batch"] * (prior + tokens) * d["kv_heads"] * widths * 2
    moved = cached + d["batch"] * tokens * d["heads"] * widths * 2
    features = _log(d["batch"], tokens + prior, d["heads"], d["key_dim"])
    return Demand(flop, moved, features * [0.7, 1.0, 0.7, 0.5])


def mla_decode(d: Dims) -> Demand:
    """One query a sequence against a cached latent shared by all heads (absorbed MLA)."""
    pairs = d["batch"] * d["context"]
    latent, rope = d["latent"], d["rope"]
    flop = 2.0 * pairs * d["heads"] * (2 * latent + rope)
    moved = pairs * (latent + rope) * d["kv_bytes"] + d["batch"] * d["heads"] * 2 * latent * 2
    return Demand(flop, moved, _log(d["batch"], d["context"], d["heads"]) * [1.0, 1.0, 0.7])


def elementwise(d: Dims) -> Demand:
    """Norms, rotations, activations, residual adds: bytes only."""
    moved = np.asarray(d["moved_bytes"], dtype=float)
    return Demand(np.zeros_like(moved), moved, _log(moved))


KINDS: Mapping[str, Callable[[Dims], Demand]] = {
    "gemm": gemm,
    "moe": moe,
    "attention_decode": attention_decode,
    "attention_prefill": attention_prefill,
    "mla_decode": mla_decode,
    "elementwise": elementwise,
}


def demand(kind: str, dims: Dims) -> Demand:
    """FLOP, bytes and features of a kernel kind."""
    return KINDS[kind](dims)
