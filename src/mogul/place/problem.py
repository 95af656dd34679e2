"""The placement problem of one layer, the load of a solution, and what no solution can beat.

A solution is `slots_DS`: the expert in every slot of every device, -1 for an empty slot. Replicas
of an expert share its rows evenly (EPLB, vLLM and SGLang do so). Letters: E experts, D devices,
S slots a device, P = D*S slots in all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mogul.core.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """Experts with loads, devices with slots."""

    load_E: np.ndarray
    """Rows of every expert."""

    num_devices: int
    slots: int
    """Slots on every device."""

    num_nodes: int = 1
    coactivation_EE: np.ndarray | None = None
    """Tokens that pick both experts of a pair."""

    node_groups: int = 1
    """Consecutive equal groups of experts of which each must stay on one node."""

    def __post_init__(self) -> None:
        experts, devices = self.num_experts, self.num_devices
        if devices < 1 or devices * self.slots < experts:
            raise ConfigError(
                f"{devices} devices with {self.slots} slots cannot hold {experts} experts",
                fix=f"use at least {-(-experts // max(devices, 1))} slots a device, or "
                f"{-(-experts // max(self.slots, 1))} devices",
            )
        if devices % self.num_nodes:
            raise ConfigError(
                f"{devices} devices cannot stand on {self.num_nodes} nodes in equal numbers",
                fix="make the devices a multiple of the nodes",
            )
        if not np.isfinite(self.load_E).all() or (self.load_E < 0).any():
            raise ConfigError(
                "the loads of the experts must be finite and not negative",
                fix="make the trace again with `mogul trace`",
            )

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return len(self.load_E)

    @property
    def num_slots(self) -> int:
        """Slots on all devices."""
        return self.num_devices * self.slots

    @property
    def num_spare(self) -> int:
        """Slots beyond one an expert: replicas (or empty slots)."""
        return self.num_slots - self.num_experts


def replica_counts(slots_DS: np.ndarray, num_experts: int) -> np.ndarray:
    """How many slots every expert has."""
    return np.bincount(slots_DS[slots_DS >= 0], minlength=num_experts)


def slot_load(slots_DS: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Rows of every slot [D, S]; an empty slot has none."""
    share_E = load_E / np.maximum(replica_counts(slots_DS, len(load_E)), 1)
    return np.where(slots_DS >= 0, share_E[slots_DS], 0.0)


def device_load(slots_DS: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """Rows of every device [D]."""
    return slot_load(slots_DS, load_E).sum(axis=1)


def contiguous(problem: Problem) -> np.ndarray:
    """Expert e in slot e: what everyone does without a placement; spare slots stay empty.

    The first devices hold one expert more where the experts don't divide.
    """
    slots_DS = np.full((problem.num_devices, problem.slots), -1)
    for device, experts in enumerate(
        np.array_split(np.arange(problem.num_experts), problem.num_devices)
    ):
        slots_DS[device, : len(experts)] = experts
    return slots_DS


def lower_bound(problem: Problem) -> float:
    """No solution has a busiest device below this many rows.

    The mean; the smallest largest share that the replicas allow; and, when every slot holds
    another expert, counting bounds: of the kD+1 heaviest some k+1 share a device, which is filled
    up with the lightest; the j heaviest stand on j devices, whose other slots hold at best the
    lightest of all, or two of them share a device.
    """
    heavy_E = np.sort(problem.load_E.astype(np.float64))[::-1]
    devices = problem.num_devices
    best = max(float(heavy_E.sum()) / devices, _largest_share(problem))
    if problem.num_spare == 0:
        light = np.concatenate([[0.0], np.cumsum(heavy_E[::-1])])
        best = max(best, _pigeonhole(heavy_E, light, problem), _apart(heavy_E, light, problem))
    return best


def _pigeonhole(heavy_E: np.ndarray, light: np.ndarray, problem: Problem) -> float:
    devices, slots = problem.num_devices, problem.slots
    return max(
        float(heavy_E[k * devices - k : k * devices + 1].sum() + light[slots - k - 1])
        for k in range(slots)
    )


def _apart(heavy_E: np.ndarray, light: np.ndarray, problem: Problem) -> float:
    slots = problem.slots
    best = 0.0
    for j in range(1, problem.num_devices + 1):
        apart = float(heavy_E[:j].sum() + light[(slots - 1) * j]) / j
        shared = np.inf
        if j > 1 and slots > 1:
            shared = float(heavy_E[j - 1] + heavy_E[j - 2] + light[slots - 2])
        best = max(best, min(apart, shared))
    return best


def _largest_share(problem: Problem) -> float:
    """The least v such that replicas within the slots bring every share to v or below."""
    load_E = problem.load_E.astype(np.float64)
    replicas_E = replicate(load_E, problem.num_slots, most=problem.num_devices)
    return float((load_E / replicas_E).max())


def replicate(load_E: np.ndarray, num_slots: int, *, most: int) -> np.ndarray:
    """Replicas of every expert: the spare slots go, one by one, to the largest share.

    Optimal for the largest share. No expert gets more than `most` (one a device); slots nobody
    can use stay empty.
    """
    import heapq

    replicas_E = np.ones(len(load_E), dtype=np.int64)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    for _ in range(num_slots - len(load_E) if most > 1 else 0):
        if not heap:
            break
        _, expert = heapq.heappop(heap)
        replicas_E[expert] += 1
        if replicas_E[expert] < most:
            heapq.heappush(heap, (-load_E[expert] / replicas_E[expert], expert))
    return replicas_E
