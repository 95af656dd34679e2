"""Numbers of the routing while a model trains, from counts and a few sampled picks.

Everything is what `spec.balance` defines, for the counts of an interval [L, E] and the picks of
its last tokens [L, S, K]. `add_sample` feeds the picks to the arrays of a trace, so that a
training leaves the same record as `mogul trace`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mogul.observe.accumulate import RoutingCounts
from mogul.observe.sample import TokenSample
from mogul.spec import balance
from mogul.spec.grouping import Grouping
from mogul.spec.picks import BATCH_SIZES, SAMPLE_LIMIT
from mogul.spec.trace import ModelStamp, Trace, TraceMeta

DELTA_BATCH = 16
"""Tokens of a decode step for which delta is told."""


@dataclass(frozen=True)
class LiveNumbers:
    """One interval; means over layers unless the name says otherwise."""

    max_vio: float
    """Busiest expert over the mean, minus 1."""
    max_vio_in_groups: float
    """The same within the group, largest group of each layer."""
    worst_layer: int
    """Index of the layer with the largest MaxVio in groups."""
    dead_experts: int
    """Experts without a row in the interval, all layers."""
    rho: dict[int, float]
    """By number of devices, contiguous placement."""
    delta: dict[int, float]
    """The same for distinct experts of a batch of 16 tokens; empty without a sample."""

    def flat(self) -> dict[str, float]:
        """For a metrics line: one number a key."""
        flat: dict[str, float] = {
            "max_vio": self.max_vio,
            "max_vio_in_groups": self.max_vio_in_groups,
            "worst_layer": self.worst_layer,
            "dead_experts": self.dead_experts,
        }
        flat |= {f"rho_{devices}": value for devices, value in self.rho.items()}
        return flat | {f"delta_{devices}": value for devices, value in self.delta.items()}


def device_counts(grouping: Grouping) -> tuple[int, ...]:
    """Numbers of devices that are told: legal ones, or powers of two for plain top-k."""
    if grouping.num_groups > 1:
        return tuple(count for count in grouping.legal_devices() if count > 1)
    return tuple(d for d in (2, 4, 8) if grouping.num_experts % d == 0)


def live_numbers(
    counts: Int[np.ndarray, "L E"], sample: Int[np.ndarray, "L S K"], grouping: Grouping
) -> LiveNumbers:
    """The numbers of one interval."""
    in_groups = [balance.max_violation_in_groups(row, grouping.num_groups) for row in counts]
    devices = device_counts(grouping)
    return LiveNumbers(
        max_vio=float(np.mean([balance.max_violation(row) for row in counts])),
        max_vio_in_groups=float(np.mean(in_groups)),
        worst_layer=int(np.argmax(in_groups)),
        dead_experts=int((counts == 0).sum()),
        rho={d: float(np.mean([_rho(row, d) for row in counts])) for d in devices},
        delta={d: _delta(sample, d, grouping.num_experts) for d in devices}
        if sample.shape[1] >= DELTA_BATCH
        else {},
    )


def _rho(rows_E: np.ndarray, devices: int) -> float:
    return balance.rho(rows_E.reshape(devices, -1).sum(1))


def _delta(sample: np.ndarray, devices: int, experts: int) -> float:
    """Mean over layers and batches of 16 sampled tokens."""
    device_of_expert = np.arange(experts) // (experts // devices)
    batches = sample.shape[1] // DELTA_BATCH
    cut = sample[:, : batches * DELTA_BATCH].reshape(len(sample) * batches, DELTA_BATCH, -1)
    found = [balance.distinct_per_device(ids, device_of_expert, devices) for ids in cut]
    return float(np.mean([balance.delta(one) for one in found]))


class LiveTrace:
    """A trace that grows by sampled picks while a model trains."""

    def __init__(self, stamp: ModelStamp, layers: tuple[int, ...], *, seed: int = 0) -> None:
        self.stamp, self.layers, self.seed = stamp, layers, seed
        self._counts = RoutingCounts(
            len(layers),
            stamp.num_experts,
            device=torch.device("cpu"),
            batch_sizes=BATCH_SIZES,
            num_tasks=1,
        )
        self._sample = TokenSample(SAMPLE_LIMIT, seed=seed, salt="training")

    def add_sample(self, ids: Int[Tensor, "L S K"]) -> None:
        """Count the picks of some tokens."""
        wide = ids.to("cpu", torch.int64)
        self._counts.add(wide, None, None)
        self._sample.add(wide, None)

    def trace(self) -> Trace:
        """The record so far; weights and scores are not in it."""
        arrays = self._counts.arrays() | self._sample.arrays(len(self.layers), self.stamp.top_k)
        meta = TraceMeta(
            model=self.stamp,
            layers=self.layers,
            num_tokens=self._counts.num_tokens,
            batch_sizes=BATCH_SIZES,
            sample_limit=SAMPLE_LIMIT,
            tasks=("training",),
            data=("training batches",),
            seed=self.seed,
        )
        return Trace(meta, arrays)
