"""Which tile sizes a layer runs with: a measured table for known shapes, a rule for the others.

A plan is chosen from the shape alone; nothing is tuned inside a request.
The table is `plans.json` beside this file; the finest match on (device, E, K, D, F) and the
smallest `tokens` bound that holds wins; rows with a `device` only count on GPUs of that name.
An even share of a known layer (a part of its experts and of each token's picks) runs as the layer,
but in row tiles of 64: with as many rows an expert but fewer experts those were measured slower.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mogul.core.log import log


@dataclass(frozen=True)
class Tile:
    """One grouped product: block sizes and how it is launched."""

    n: int
    k: int
    m: int = 128
    """Rows of the output, in weight gradients only (`k` is then tokens a step)."""
    group: int = 8
    warps: int = 8
    stages: int = 3
    tma: bool = False
    swap: bool = False
    flatten: bool = False
    stream: bool = False
    split: bool = False
    """Hopper kernels with a loader and two multipliers; `stages` is the length of their ring."""
    counted: bool = False
    """Split row products take tiles in order from a counter, not by fixed turns."""
    sync: bool = False
    """Split kernels start the tiles of fixed turns in step, where operands outgrow the cache."""
    slack: int = 0
    """Programs that may lag behind when the others go on (`sync`)."""
    patience: int = 64
    """Looks at the counter before a program goes on alone (`sync`)."""
    narrow: bool = False
    """Split kernels compute only what is needed of a last column tile. Up that keeps its products
    for backward does not: there it was measured slower."""
    per_sm: int = 0
    """Programs a multiprocessor for a persistent grid; 0 = one program a tile."""


def last_width(width: int, block: int) -> int:
    """Columns that a narrow last tile of `width` computes: 64, 128 or the whole block."""
    left = width % block
    return 64 if 0 < left <= 64 else 128 if 64 < left <= 128 else block


@dataclass(frozen=True)
class Plan:
    """How one layer runs for one token count. `rows` is the row tile shared by all row products."""

    rows: int
    up: Tile
    down: Tile
    down_grad: Tile | None = None
    up_grad: Tile | None = None
    gate_up_weight: Tile | None = None
    down_weight: Tile | None = None


@dataclass(frozen=True)
class FewPlan:
    """The sort-free path for a handful of slots."""

    up_n: int = 8
    up_k: int = 512
    down_n: int = 8
    down_k: int = 256
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Shape:
    """What a plan may depend on besides the number of tokens."""

    experts: int
    picks: int
    width: int
    inner: int
    capability: int = 90
    sms: int = 132
    device: str = ""
    """Name of the GPU, as its driver says it."""

    def uses_few(self, tokens: int) -> bool:
        """True where a sort costs more than reading an expert twice."""
        return tokens == 1 or tokens * self.picks * 4 <= self.experts


def _hopper(shape: Shape) -> bool:
    return shape.capability == 90


def _small(rows: int, shape: Shape) -> Plan:
    stages = 4 if shape.capability in (90, 100) else 3
    k = 128 if rows <= 32 else 64
    tile = Tile(n=64, k=k, group=1, warps=4, stages=stages, stream=True)
    return Plan(rows=rows, up=replace(tile, n=32 if rows <= 32 else 64), down=tile)


def _large(rows: int, shape: Shape) -> Plan:
    if not _hopper(shape):
        tile = Tile(n=64, k=32, warps=4, stages=3, tma=False)
        return Plan(rows=min(rows, 64), up=replace(tile, n=64), down=replace(tile, n=128))
    big = 4 * shape.inner * shape.width > 16 << 20
    tile = Tile(n=256, k=64, group=4, stages=4, split=True, per_sm=1, counted=True)
    return Plan(rows=rows, up=replace(tile, n=128, group=8 if big else 4), down=tile)


def rule(shape: Shape, tokens: int) -> Plan:
    """Plan from the mean rows an expert gets."""
    mean = tokens * shape.picks / shape.experts
    if mean <= 12:
        plan = _small(16, shape)
    elif mean <= 28:
        plan = _small(32, shape)
    elif mean <= 96:
        plan = _small(64, shape)
    else:
        plan = _large(128, shape)
    return _with_backward(plan, shape)


@cache
def _with_backward(plan: Plan, shape: Shape) -> Plan:
    """Equal plans are one object: launches are kept by it."""
    if plan.down_grad is not None:
        return plan
    if _hopper(shape) and plan.rows >= 128:
        tile = Tile(n=256, k=64, group=8, stages=4, split=True, per_sm=1)
        return replace(
            plan,
            down_grad=replace(tile, n=128, counted=True),
            up_grad=replace(tile, counted=True),
            gate_up_weight=tile,
            down_weight=tile,
        )
    tile = Tile(n=64, k=32, warps=4, stages=3)
    square = replace(tile, m=64)
    return replace(plan, down_grad=tile, up_grad=tile, gate_up_weight=square, down_weight=square)


SHARES = (1, 2, 4, 8)
"""Devices that a known layer may be spread over by groups."""
USER_PLANS = "MOGUL_PLANS"
"""Environment variable: a file of further plans."""


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    tokens: int
    plan: Plan | None
    few: FewPlan | None = None
    device: str = ""
    """Only for GPUs with this in their name; of equal bounds such a row comes first."""
    note: str = field(default="", compare=False)
    by_rule: bool = False
    """Up to so many tokens the rule holds, not `plan`."""


def _tile(row: dict[str, Any] | None) -> Tile | None:
    return None if row is None else Tile(**row)


_SHARED_BYTES = 232_448
"""Shared memory that a program may have on Hopper."""


def split_bytes(kind: str, rows: int, tile: Tile) -> int:
    """Shared memory of a split kernel: its ring, `pre` in the backward of down, and a scratch."""
    if kind in ("gate_up_weight", "down_weight"):
        return 2 * tile.k * (tile.m + tile.n) * tile.stages + 16_384
    wide = 2 * tile.n if kind == "up" else tile.n
    pre = 2 * rows * 2 * tile.n if kind == "down_grad" else 0
    return 2 * tile.k * (rows + wide) * tile.stages + pre + 16_384


def why_too_large(plan: Plan) -> str | None:
    """The first product of a plan whose split kernel would not fit a multiprocessor, in words."""
    for kind in ("up", "down", "down_grad", "up_grad", "gate_up_weight", "down_weight"):
        tile = getattr(plan, kind)
        size = split_bytes(kind, plan.rows, tile) if tile and tile.split else 0
        if size > _SHARED_BYTES:
            return f"{kind} needs {size:,} bytes of shared memory, a program has {_SHARED_BYTES:,}"
    return None


def _plan(row: dict[str, Any]) -> Plan:
    tiles = {name: _tile(row[name]) for name in row if isinstance(row[name], dict)}
    plain = {f.name: row[f.name] for f in fields(Plan) if f.name in row and f.name not in tiles}
    return Plan(**plain, **tiles)  # type: ignore[arg-type]


@cache
def table(capability: int = 90, path: Path | None = None) -> dict[Any, list[Entry]]:
    """Measured plans by (experts, picks, width, inner), each list by rising token bound.

    Rows of another compute capability are left out; those that ship with mogul are Hopper's. So are
    rows of older files whose tiles no longer fit, with a line that says so.
    """
    path = path or Path(__file__).with_name("plans.json")
    out: dict[tuple[int, int, int, int], list[Entry]] = {}
    for row in json.loads(path.read_text()) if path.exists() else []:
        if row.get("capability", 90) != capability:
            continue
        key = (row["experts"], row["picks"], row["width"], row["inner"])
        few = FewPlan(**row["few"]) if "few" in row else None
        plan = _plan(row["plan"]) if "plan" in row else None
        if plan and (reason := why_too_large(plan)):
            log.warning(
                f"{path}: tiles of {key} up to {row['tokens']} tokens are left out: {reason}; "
                "`mogul bench kernels --tune` finds others"
            )
            continue
        out.setdefault(key, []).append(Entry(row["tokens"], plan, few, row.get("device", "")))
    return {
        key: sorted(entries, key=lambda e: (e.tokens, not e.device)) for key, entries in out.items()
    }


def _entries(shape: Shape) -> list[Entry]:
    """Rows of the user's own file (MOGUL_PLANS, from `mogul bench kernels --tune`), then ours."""
    own = table(shape.capability, Path(os.environ[USER_PLANS])) if USER_PLANS in os.environ else {}
    every: list[Entry] = []
    for parts in SHARES:  # as many rows an expert as in the whole layer
        key = (parts * shape.experts, parts * shape.picks, shape.width, shape.inner)
        found = own.get(key, []) + table(shape.capability).get(key, [])
        known = [entry for entry in found if entry.device in shape.device]
        every += known if parts == 1 else map(_of_share, known)
    return every


def _of_share(entry: Entry) -> Entry:
    """What a layer's row says of a share of it."""
    return replace(entry, by_rule=entry.plan is not None and entry.plan.rows == 64)


def is_measured(shape: Shape) -> bool:
    """Whether the table, or the user's own, knows this shape."""
    return bool(_entries(shape))


@cache
def few_plan(shape: Shape) -> FewPlan:
    """Block sizes of the sort-free path."""
    for entry in _entries(shape):
        if entry.few is not None:
            return entry.few
    return few_rule(shape)


def few_rule(shape: Shape) -> FewPlan:
    """Block sizes where nothing was measured."""
    small = shape.width * shape.inner < 1 << 21
    return FewPlan(up_n=4 if small else 8, down_n=4 if small else 16)


@lru_cache(maxsize=4096)
def plan_for(shape: Shape, tokens: int) -> Plan:
    """Table row whose bound holds, else the rule."""
    for entry in _entries(shape):
        if entry.plan is not None and tokens <= entry.tokens:
            return rule(shape, tokens) if entry.by_rule else _with_backward(entry.plan, shape)
    return rule(shape, tokens)


@cache
def tell_of_rule(shape: Shape) -> None:
    """Say once why the first calls of a shape wait and may be slower than they could."""
    if not is_measured(shape):
        log.warning(
            f"{shape.experts} experts of {shape.width} x {shape.inner}, {shape.picks} picks a "
            "token: no measured tiles for this GPU; the first calls compile tiles by rule, some "
            "seconds each (`mogul bench kernels --tune` measures better ones)"
        )
