"""From a kernel's demand to its time: a curve, corrected by what was measured nearby.

The time is the curve's (`curves.py`) times a correction: the geometric mean of measured / curve
over the nearest measured calls, weighed by nearness. Which measurements count is a ladder: same
device, arithmetic and engine; another engine; another device of the architecture; another
arithmetic of the same width. Where no engine is preferred the fastest measured one counts: the
tables hold one kernel of several an engine chooses from. Every answer says its rung, its spread
and its sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mogul.core.errors import ArtifactError
from mogul.simulate import curves, physics
from mogul.simulate.estimate import Estimate
from mogul.simulate.measurements import KernelTable, load_shipped, read_table
from mogul.simulate.physics import Demand
from mogul.spec.hardware import Hardware, hardware

NEIGHBOURS = 4
NEAR = 0.35
"""Feature distance within which a neighbour counts as measured."""

ASIDE = 1.0
"""Feature distance within which a table is asked before tables of other engines or devices."""

REACH = 2.5
"""Feature distance at which a neighbour says nothing any more."""

MANY_ROWS = 1024
"""Rows an expert from which grouped products are as good as any."""

SIGMA = {"measured": 0.08, "interpolated": 0.15, "transferred": 0.25}
_KIN = {
    "fp8_block": ("fp8",),
    "fp8-w8a16": ("fp8",),
    "fp8": ("fp8_block", "int8"),
    "int8": ("fp8", "fp8_block"),
    "fp16": ("bf16",),
    "bf16": ("fp16",),
    "fp4": ("mxfp4",),
    "mxfp4": ("fp4",),
}


@dataclass(frozen=True)
class _Slice:
    """Measured calls of one kind, device, engine and arithmetic."""

    table: KernelTable
    features: np.ndarray
    log_ratio: np.ndarray
    """log(measured / curve on its own device)."""

    def distances(self, demand: Demand) -> np.ndarray:
        """How far every call is from another."""
        point = np.asarray(demand.features, dtype=float)
        return np.sqrt(((self.features - point) ** 2).sum(axis=1))


def _slice(table: KernelTable) -> _Slice:
    device = hardware(table.device)
    demand = physics.demand(table.kind, table.dims)
    curve = curves.curve(device.architecture, table.kind, table.dtype)
    ratio = np.log(table.seconds / curve.seconds(demand, device, table.dtype))
    return _Slice(table, np.asarray(demand.features), ratio)


@dataclass
class Calibration:
    """Measured tables, ready to be asked; the shipped ones unless others are given."""

    tables: tuple[KernelTable, ...]
    engine: str = ""
    """Whose kernels to prefer; empty means any."""

    _slices: dict[tuple[str, str], list[_Slice]] = field(default_factory=dict, repr=False)
    _known: dict[Any, Estimate] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for table in self.tables:
            if table.is_reference and table.engine != self.engine:
                continue
            self._slices.setdefault((table.kind, table.dtype), []).append(_slice(table))

    def estimate(
        self, kind: str, dims: Mapping[str, float], device: Hardware, dtype: str
    ) -> Estimate:
        """Time of one call; equal calls are answered from memory."""
        key = (kind, device.name, dtype, *dims.values())
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._estimate(kind, dims, device, dtype)
        return known

    def _estimate(
        self, kind: str, dims: Mapping[str, float], device: Hardware, dtype: str
    ) -> Estimate:
        demand = physics.demand(kind, dims)
        curve = curves.curve(device.architecture, kind, dtype)
        base_s = float(curve.seconds(demand, device, dtype))
        unmeasured = Estimate(
            base_s, curve.sigma, "guess" if curve.is_generic else "curve", (curve.source,)
        )
        found = self._rung(kind, device, dtype, demand)
        plain_s = many_rows_s(dims, device, dtype) if kind == "moe" else float("inf")
        if found is None:
            return replace(unmeasured, seconds=min(base_s, plain_s))
        rung, slices = found
        engines = {one.table.engine for one in slices}
        candidates = [
            _corrected(unmeasured, demand, [s for s in slices if s.table.engine == name], rung)
            for name in sorted(engines)
        ]
        best = min(candidates, key=lambda one: one.seconds)
        if rung == "measured" or self.engine in engines:
            return best
        return replace(best, seconds=min(best.seconds, plain_s))

    def _rung(
        self, kind: str, device: Hardware, dtype: str, demand: Demand
    ) -> tuple[str, list[_Slice]] | None:
        """The first rung with a call beside this one, else the first with any call."""
        same_dtype = self._slices.get((kind, dtype), [])
        kin = [s for other in _KIN.get(dtype, ()) for s in self._slices.get((kind, other), [])]
        home = [s for s in same_dtype if s.table.device == device.name]
        siblings = [s for s in same_dtype if _is_sibling(s, device)]
        ladder = (
            ("measured", [s for s in home if s.table.engine == self.engine]),
            ("measured", home),
            ("transferred", [s for s in siblings if s.table.engine == self.engine]),
            ("transferred", siblings),
            ("transferred", [s for s in kin if s.table.device == device.name]),
        )
        for rung, slices in ladder:
            near = {s.table.engine for s in slices if s.distances(demand).min() < ASIDE}
            if near:  # a table that is far from the call knows no better than the curve
                return rung, [one for one in slices if one.table.engine in near]
        return next((step for step in ladder if step[1]), None)


def many_rows_s(dims: Mapping[str, float], device: Hardware, dtype: str) -> float:
    """Time of experts with many rows each, at the speed of a plain product; else infinity."""
    if dims["rows"] < MANY_ROWS * dims["distinct"]:
        return float("inf")
    plain = curves.curve(device.architecture, "gemm", dtype)
    return float(plain.seconds(physics.demand("moe", dims), device, dtype))


def _is_sibling(candidate: _Slice, device: Hardware) -> bool:
    return hardware(candidate.table.device).architecture == device.architecture


def _corrected(plain: Estimate, demand: Demand, slices: Iterable[_Slice], rung: str) -> Estimate:
    near: list[tuple[float, float, str]] = []
    for one in slices:
        distance = one.distances(demand)
        count = min(NEIGHBOURS, len(distance))
        nearest = np.argpartition(distance, count - 1)[:count]
        near += [(float(distance[i]), float(one.log_ratio[i]), one.table.source) for i in nearest]
    near.sort()
    near = [one for one in near[:NEIGHBOURS] if one[0] < REACH]
    if not near:
        return plain
    weights = np.array([1 / (distance + 0.02) for distance, _, _ in near])
    ratios = np.array([ratio for _, ratio, _ in near])
    trust = min(1.0, (REACH - near[0][0]) / (REACH - 1.0))
    correction = trust * float(weights @ ratios / weights.sum())
    tier = rung if rung == "transferred" or near[0][0] < NEAR else "interpolated"
    sigma = max(SIGMA[tier], (1 - trust) * plain.sigma)
    sources = tuple(dict.fromkeys(source for _, _, source in near))
    return Estimate(plain.seconds * float(np.exp(correction)), sigma, tier, sources)


@cache
def shipped(engine: str = "") -> Calibration:
    """Mogul's own measurements and constants; kernels of `engine` are preferred."""
    return Calibration(load_shipped(), engine=engine)


def with_measured(folder: Path, engine: str = "") -> Calibration:
    """The tables of a folder (`mogul simulate calibrate`) with the shipped ones behind them.

    Shipped tables of the same machine, kind and arithmetic make way, but for what one engine alone
    runs so and the folder does not hold. Kernels of `engine` are preferred.

    Raises:
        ArtifactError: the folder holds no table, or a broken one.
    """
    found = tuple(read_table(path) for path in sorted(folder.glob("*.csv")))
    if not found:
        raise ArtifactError(
            f"{folder} holds no measured tables", fix="make them with `mogul simulate calibrate`"
        )
    known = {(one.kind, one.device, one.dtype) for one in found}
    engines = {(one.kind, one.device, one.dtype, one.engine) for one in found}
    others = [
        one
        for one in load_shipped()
        if (one.kind, one.device, one.dtype) not in known
        or (one.is_reference and (one.kind, one.device, one.dtype, one.engine) not in engines)
    ]
    return Calibration((*found, *others), engine=engine)


@cache
def with_aiconfigurator(device: str, engine: str = "") -> Calibration:
    """AIConfigurator's tables of a device with mogul's own; those of `engine` preferred.

    Raises:
        ArtifactError: its wheel is not installed.
    """
    from mogul.simulate import aiconfigurator

    if device not in aiconfigurator.DEVICES:
        return shipped(engine)
    found: list[KernelTable] = list(load_shipped())
    for name in aiconfigurator.ENGINES:
        found += [table for table in aiconfigurator.tables(device, name) if not _is_hosts(table)]
    return Calibration(tuple(found), engine=engine)


def _is_hosts(table: KernelTable) -> bool:
    """Whether a table times launches instead of kernels (vLLM's block-fp8 products)."""
    return (table.kind, table.dtype, table.engine) == ("gemm", "fp8_block", "vllm")
