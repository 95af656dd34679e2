"""What it costs to move data between devices: formulas by default, measured tables where given.

A number of ranks that no table holds takes the formula times what the nearest one measured is off.

n ranks, `num_bytes` the whole buffer of one rank (gathered size for a gather). Inside a domain
the scale-up link counts, beyond it the network, in two stages. Sources of the formulas: ring and
two-stage collectives as in NCCL; two-level all-to-all of arXiv 2206.03382.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mogul.simulate.estimate import Estimate
from mogul.spec.hardware import Hardware

REACHED = 0.8
"""Share of a link's bandwidth large messages reach (NCCL tables, H100: 0.75 to 0.99)."""

FORMULA_SIGMA = 0.25
NEAR_SIGMA = 0.15
"""Of a number of ranks nobody measured, corrected by one that was."""

TABLE_SIGMA = 0.1

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class CollectiveTables:
    """Measured times by (device, operation, ranks): bytes ascending, seconds."""

    curves: Mapping[tuple[str, str, int], Curve] = field(default_factory=dict)
    source: str = ""

    def seconds(self, device: str, name: str, ranks: int, num_bytes: float) -> float | None:
        """Log-log interpolation; None where nothing was measured."""
        found = self.curves.get((device, name, ranks))
        if found is None:
            return None
        sizes, times = found
        if num_bytes > sizes[-1]:
            return float(times[-1] * num_bytes / sizes[-1])
        return float(np.exp(np.interp(np.log(max(num_bytes, 1)), np.log(sizes), np.log(times))))

    def nearest_ranks(self, device: str, name: str, ranks: int) -> int | None:
        """The measured number of ranks nearest to this one."""
        known = [key[2] for key in self.curves if key[:2] == (device, name)]
        return min(known, key=lambda one: abs(math.log(one / ranks)), default=None)


def collective(
    name: str,
    ranks: int,
    num_bytes: float,
    device: Hardware,
    tables: CollectiveTables | None = None,
    far_bytes: float | None = None,
) -> Estimate:
    """Time of "all_reduce", "all_gather", "reduce_scatter" or "all_to_all".

    `far_bytes` is what an all-to-all sends over the network; None means an even share.
    """
    if ranks <= 1 or num_bytes <= 0:
        return Estimate(0.0, 0.0, "measured")
    if tables is not None and ranks <= device.link_devices:
        measured = tables.seconds(device.name, name, ranks, num_bytes)
        if measured is not None:
            return Estimate(measured, TABLE_SIGMA, "measured", (tables.source,))
        if near := tables.nearest_ranks(device.name, name, ranks):
            known = tables.seconds(device.name, name, near, num_bytes)
            assert known is not None
            plain, there = (_formula(name, n, num_bytes, device, None) for n in (ranks, near))
            return Estimate(known * plain / there, NEAR_SIGMA, "interpolated", (tables.source,))
    return Estimate(
        _formula(name, ranks, num_bytes, device, far_bytes), FORMULA_SIGMA, "curve", ("formula",)
    )


def _formula(
    name: str, ranks: int, num_bytes: float, device: Hardware, far_bytes: float | None
) -> float:
    inside = min(ranks, device.link_devices)
    outside = math.ceil(ranks / device.link_devices)
    if outside == 1:
        return _stage(name, inside, num_bytes, device.link_latency_s, device.link_bytes_per_s)
    network = device.network_bytes_per_s or device.link_bytes_per_s
    near = _stage(name, inside, num_bytes, device.link_latency_s, device.link_bytes_per_s)
    if name == "all_to_all":
        if far_bytes is None:
            far_bytes = num_bytes * (1 - inside / ranks)
        return near + device.network_latency_s * outside + far_bytes / (REACHED * network)
    far = _stage(name, outside, num_bytes / inside, device.network_latency_s, network)
    return near + far


def _stage(name: str, ranks: int, num_bytes: float, latency_s: float, bandwidth: float) -> float:
    steps = 1 + math.log2(ranks)
    share = (ranks - 1) / ranks
    passes = 2 if name == "all_reduce" else 1
    return latency_s * steps + passes * num_bytes * share / (REACHED * bandwidth)


def point_to_point_s(num_bytes: float, device: Hardware, *, is_far: bool = False) -> float:
    """Time to hand activations to the next pipeline stage."""
    network = device.network_bytes_per_s or device.link_bytes_per_s
    if is_far:
        return device.network_latency_s + num_bytes / (REACHED * network)
    return device.link_latency_s + num_bytes / (REACHED * device.link_bytes_per_s)
