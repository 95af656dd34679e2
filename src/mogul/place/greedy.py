"""Longest processing time first: the heaviest expert left goes to the emptiest device.

With replicas and equal numbers of slots, which is the packing EPLB describes. Replicas of one
expert go to different devices as long as there is one with a free slot.
"""

from __future__ import annotations

import heapq

import numpy as np

from mogul.place.problem import Problem, replicate


def greedy(problem: Problem) -> np.ndarray:
    """Replicate to the spare slots, then pack; slots [D, S]."""
    most = problem.num_devices
    replicas_E = replicate(problem.load_E.astype(np.float64), problem.num_slots, most=most)
    expert_P = np.repeat(np.arange(problem.num_experts), replicas_E)
    return pack(expert_P, (problem.load_E / replicas_E)[expert_P], most, problem.slots)


def pack(expert_P: np.ndarray, load_P: np.ndarray, num_devices: int, slots: int) -> np.ndarray:
    """Pack experts (repeated where replicated) with loads into D devices of S slots.

    Where only devices that hold the expert already have room, another expert makes way.
    """
    held: list[dict[int, float]] = [{} for _ in range(num_devices)]
    heap = [(0.0, device) for device in range(num_devices)]
    order = np.argsort(-load_P, kind="stable")
    for expert, load in zip(expert_P[order].tolist(), load_P[order].tolist(), strict=True):
        passed = []
        while heap and expert in held[heap[0][1]]:
            passed.append(heapq.heappop(heap))
        if not heap:
            total, device = passed.pop(0)
            added = _make_way(held, device, expert, load)
        else:
            total, device = heapq.heappop(heap)
            held[device][expert] = added = load
        for entry in passed:
            heapq.heappush(heap, entry)
        if len(held[device]) < slots:
            heapq.heappush(heap, (total + added, device))
    slots_DS = np.full((num_devices, slots), -1)
    for device, experts in enumerate(held):
        slots_DS[device, : len(experts)] = list(experts)
    return slots_DS


def _make_way(held: list[dict[int, float]], device: int, expert: int, load: float) -> float:
    """Put `expert` on a device without it and bring one of that device's experts to `device`.

    Both exist while an expert has at most one replica a device; returns the load `device` got.
    """
    other = next(d for d in range(len(held)) if expert not in held[d])
    moved = next(e for e in held[other] if e not in held[device])
    held[device][moved] = held[other].pop(moved)
    held[other][expert] = load
    return held[device][moved]
