"""Fused-MoE tables, one model left out at a time: what a shape nobody measured costs.

The curve under the correction is the generic one or stems from mogul's own measurements, never
from the table that is scored; the neighbours come from the other models of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mogul.simulate import aiconfigurator, curves, physics
from mogul.simulate.calibration import NEIGHBOURS
from mogul.simulate.curves import Curve
from mogul.simulate.measurements import KernelTable
from mogul.spec.hardware import hardware

TABLES = (("h100", "vllm", "fp8_block", 0.08), ("h100", "vllm", "bf16", 0.12))
"""Device, engine, arithmetic and the bar for the median error."""


@dataclass(frozen=True)
class LeftOut:
    """Errors of one table, every model predicted from the others."""

    device: str
    dtype: str
    rows: int
    models: int
    median: float
    p90: float
    curve_median: float
    """The same without neighbours."""

    bar: float


def leave_one_model_out(
    table: KernelTable, curve: Curve
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, frozenset[str]]]]:
    """Relative errors with and without neighbours, and whose rows each prediction used."""
    assert table.groups is not None
    device = hardware(table.device)
    demand = physics.demand(table.kind, table.dims)
    base = curve.seconds(demand, device, table.dtype)
    log_ratio = np.log(table.seconds / base)
    features = np.asarray(demand.features)
    guess = np.empty(len(table))
    used: list[tuple[str, frozenset[str]]] = []
    for label in np.unique(table.groups):
        held = table.groups == label
        others = features[~held]
        for index in np.nonzero(held)[0]:
            distance = np.sqrt(((others - features[index]) ** 2).sum(axis=1))
            near = np.argpartition(distance, NEIGHBOURS)[:NEIGHBOURS]
            weight = 1 / (distance[near] + 0.02)
            guess[index] = weight @ log_ratio[~held][near] / weight.sum()
        used.append((str(label), frozenset(map(str, table.groups[~held]))))
    return np.exp(guess - log_ratio) - 1, np.exp(-log_ratio) - 1, used


def scored_tables() -> list[LeftOut]:
    """All tables of TABLES; needs AIConfigurator's wheel."""
    found = []
    for device, engine, dtype, bar in TABLES:
        table = next(
            t for t in aiconfigurator.tables(device, engine) if (t.kind, t.dtype) == ("moe", dtype)
        )
        curve = curves.curve("generic", "moe")
        error, plain, _ = leave_one_model_out(table, curve)
        assert table.groups is not None
        found.append(
            LeftOut(
                device,
                dtype,
                len(table),
                len(np.unique(table.groups)),
                float(np.median(np.abs(error))),
                float(np.quantile(np.abs(error), 0.9)),
                float(np.median(np.abs(plain))),
                bar,
            )
        )
    return found
