"""Leave a local minimum: kick a stuck solution, improve it again, keep what is better.

A kick exchanges a few experts at random; where there are replicas it may also take a replica from
one expert and give it to another, because with few slots a device the replica counts decide.
"""

from __future__ import annotations

import numpy as np

from mogul.place.greedy import greedy, pack
from mogul.place.problem import Problem, device_load, lower_bound, replica_counts
from mogul.place.swap import swap


def solve_for_load(
    problem: Problem, *, gap: float = 1e-3, tries: int = 40, seed: int = 0
) -> np.ndarray:
    """Greedy, swaps, then kicks until the busiest device is within `gap` of the lower bound.

    Never worse than greedy alone. Deterministic for a seed.
    """
    target = lower_bound(problem) * (1 + gap / 10)
    best = swap(greedy(problem), problem, target=target)
    best_load = float(device_load(best, problem.load_E).max())
    rng = np.random.default_rng(seed)
    for attempt in range(tries):
        if best_load <= target * (1 + gap * 9 / 10):
            break
        if problem.num_spare and attempt % 2 == 0:
            start = _move_replica(best, problem, rng)
        else:
            start = _kick(best, problem, rng)
        found = swap(start, problem, target=target)
        load = float(device_load(found, problem.load_E).max())
        if load < best_load:
            best, best_load = found, load
    return best


def _kick(slots_DS: np.ndarray, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Repack the busiest device and three others in random order of their experts."""
    load_D = device_load(slots_DS, problem.load_E)
    others = rng.permutation(problem.num_devices)
    chosen = [int(load_D.argmax()), *(int(d) for d in others if d != load_D.argmax())][:4]
    expert_P = slots_DS[chosen].ravel()
    expert_P = expert_P[expert_P >= 0]
    replicas_E = replica_counts(slots_DS, problem.num_experts)
    share_P = (problem.load_E / np.maximum(replicas_E, 1))[expert_P]
    noise_P = share_P * rng.lognormal(0.0, 0.3, len(share_P))
    kicked_DS = slots_DS.copy()
    kicked_DS[chosen] = pack(expert_P, noise_P, len(chosen), problem.slots)
    return kicked_DS


def _move_replica(slots_DS: np.ndarray, problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Give a replica to an expert of the busiest device; take it where that costs least."""
    load_E, most = problem.load_E, problem.num_devices
    replicas_E = replica_counts(slots_DS, problem.num_experts)
    busiest = slots_DS[int(device_load(slots_DS, load_E).argmax())]
    can_gain = [int(e) for e in busiest if e >= 0 and replicas_E[e] < most]
    can_lose = np.flatnonzero(replicas_E > 1)
    if not can_gain or not len(can_lose):
        return slots_DS
    after = load_E[can_lose] / (replicas_E[can_lose] - 1)
    order = can_lose[np.argsort(after, kind="stable")]
    loser = int(order[min(int(rng.exponential(2.0)), len(order) - 1)])
    winner = can_gain[int(rng.integers(len(can_gain)))]
    if winner == loser:
        return slots_DS
    replicas_E[winner] += 1
    replicas_E[loser] -= 1
    expert_P = np.repeat(np.arange(problem.num_experts), replicas_E)
    return pack(expert_P, (load_E / replicas_E)[expert_P], most, problem.slots)
