"""Balance of one model at one batch size on one number of devices: what acts 2 and 3 measure.

One decode step of a batch of B is the routing of B tokens, one of each of B sequences, in one
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mogul.bench.demo.cast import DemoSettings, Name
from mogul.spec.balance import (
    delta,
    distinct_per_device,
    imbalance_score,
    rho,
    rows_per_device,
)
from mogul.spec.grouping import Grouping

MAX_STEPS_MEASURED = 960
"""Enough for stable means; more steps are thinned out evenly."""


@dataclass(frozen=True)
class Spread:
    """A statistic over all steps and layers."""

    mean: float
    low: float
    """5th percentile."""
    high: float
    """95th percentile."""
    worst: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Mean, 5th and 95th percentile, largest."""
        low, high = np.percentile(values, [5, 95])
        return Spread(float(np.mean(values)), float(low), float(high), float(np.max(values)))


@dataclass(frozen=True)
class Cell:
    """Balance of one model at one batch size on one number of devices."""

    model: Name
    picks: str
    """Who picked: the random routers of step 0, trained routers, or uniform chance."""
    batch: int
    devices: int
    by_construction: bool
    """Rows are equal for any router: the devices hold whole groups."""
    steps: int
    """Steps times layers the numbers stand on."""
    mean_rows: float
    """Rows of a device and step, mean over devices."""
    busiest_rows: float
    """Rows of the busiest device of each step, mean over steps."""
    mean_distinct: float
    busiest_distinct: float
    rho: Spread
    delta: Spread
    imbalance: Spread


def device_counts(name: Name, settings: DemoSettings) -> tuple[int, ...]:
    """More than one device, equal numbers of experts: whole groups for the MoGE."""
    grouping = settings.grouping_of(name)
    if name == "MoGE":
        return tuple(count for count in grouping.legal_devices() if count > 1)
    return tuple(n for n in range(2, grouping.num_experts + 1) if grouping.num_experts % n == 0)


def decode_steps(
    ids: Int[np.ndarray, "layers N steps K"], batch: int
) -> Iterator[Int[np.ndarray, "batch K"]]:
    """The picks of every layer, batch and step, thinned evenly to what is measured."""
    layers, sequences, steps, _ = ids.shape
    places = [
        (layer, first, step)
        for layer in range(layers)
        for first in range(0, sequences - batch + 1, batch)
        for step in range(steps)
    ]
    count = min(len(places), MAX_STEPS_MEASURED)
    for index in np.linspace(0, len(places) - 1, count).round().astype(int):
        layer, first, step = places[index]
        yield ids[layer, first : first + batch, step]


def spread_experts(grouping: Grouping, num_devices: int) -> np.ndarray:
    """Contiguous placement, equal numbers of experts a device; int [E]."""
    return np.arange(grouping.num_experts) // (grouping.num_experts // num_devices)


def measure(
    name: Name,
    picks: str,
    ids: Int[np.ndarray, "layers N steps K"],
    batch: int,
    num_devices: int,
    grouping: Grouping,
) -> Cell:
    """Balance over all decode steps of one batch size on one number of devices."""
    device_E = spread_experts(grouping, num_devices)
    rows, distinct, scores = [], [], []
    for ids_BK in decode_steps(ids, batch):
        rows.append(rows_per_device(ids_BK, device_E, num_devices))
        distinct.append(distinct_per_device(ids_BK, device_E, num_devices))
        scores.append(imbalance_score(rows[-1], batch))
    return Cell(
        model=name,
        picks=picks,
        batch=batch,
        devices=num_devices,
        by_construction=num_devices in grouping.legal_devices(),
        steps=len(rows),
        mean_rows=float(np.mean(rows)),
        busiest_rows=float(np.mean([part.max() for part in rows])),
        mean_distinct=float(np.mean(distinct)),
        busiest_distinct=float(np.mean([part.max() for part in distinct])),
        rho=Spread.of([rho(part) for part in rows]),
        delta=Spread.of([delta(part) for part in distinct]),
        imbalance=Spread.of(scores),
    )
