"""Split experts into equal parts by who is picked together.

`place` wants experts of one token on few devices (affinity kept inside a part); `regroup` wants
them in different groups (affinity between parts). Both are one local search: swap the pair of
experts that gains most, under a cap on the load of a part.
"""

from __future__ import annotations

import numpy as np

from mogul.place.problem import Problem, device_load

_MAX_SWAPS = 5_000


def swap_for_affinity(
    affinity_EE: np.ndarray,
    part_E: np.ndarray,
    *,
    num_parts: int,
    load_E: np.ndarray | None = None,
    cap: float = np.inf,
) -> np.ndarray:
    """Raise the affinity inside parts by swaps, best first, until none gains.

    Sizes of the parts stay. A swap may leave no part with a load above `cap`, except one that was
    above already and gets lighter. Pass the negative affinity to spread instead of gather.
    """
    part_E = part_E.copy()
    affinity_EE = affinity_EE.astype(np.float64)
    affinity_EE = (affinity_EE + affinity_EE.T) / 2
    np.fill_diagonal(affinity_EE, 0.0)
    load_E = np.zeros(len(part_E)) if load_E is None else load_E.astype(np.float64)
    to_part_EM = affinity_EE @ np.eye(num_parts)[part_E]
    load_M = np.bincount(part_E, weights=load_E, minlength=num_parts)
    expert_E = np.arange(len(part_E))
    scale = max(float(np.abs(affinity_EE).sum()), 1e-30)
    for _ in range(_MAX_SWAPS):
        gain_EE = _gains(affinity_EE, to_part_EM, part_E, expert_E)
        if np.isfinite(cap):
            gain_EE[_too_heavy(load_E, load_M, part_E, cap)] = -np.inf
        best = int(gain_EE.argmax())
        a, b = divmod(best, len(part_E))
        if gain_EE.flat[best] <= 1e-12 * scale:
            break
        part_a, part_b = part_E[a], part_E[b]
        moved_E = affinity_EE[:, b] - affinity_EE[:, a]
        to_part_EM[:, part_a] += moved_E
        to_part_EM[:, part_b] -= moved_E
        load_M[part_a] += load_E[b] - load_E[a]
        load_M[part_b] += load_E[a] - load_E[b]
        part_E[a], part_E[b] = part_b, part_a
    return part_E


def _gains(
    affinity_EE: np.ndarray, to_part_EM: np.ndarray, part_E: np.ndarray, expert_E: np.ndarray
) -> np.ndarray:
    """Affinity inside parts that swapping each pair adds; -inf for pairs of one part."""
    own_E = to_part_EM[expert_E, part_E]
    to_other_EE = to_part_EM[:, part_E]  # [a, b]: affinity of a to the part of b
    gain_EE = to_other_EE + to_other_EE.T - own_E[:, None] - own_E[None, :] - 2 * affinity_EE
    gain_EE[part_E[:, None] == part_E[None, :]] = -np.inf
    return gain_EE


def _too_heavy(
    load_E: np.ndarray, load_M: np.ndarray, part_E: np.ndarray, cap: float
) -> np.ndarray:
    """Pairs whose swap lifts a part above the cap (or further above it)."""
    now_E = load_M[part_E]
    after_EE = now_E[:, None] - load_E[:, None] + load_E[None, :]
    limit_E = np.maximum(cap, now_E)
    return (after_EE > limit_E[:, None] + 1e-9) | (limit_E[None, :] + 1e-9 < after_EE.T)


def gather(slots_DS: np.ndarray, problem: Problem, *, slack: float = 0.03) -> np.ndarray:
    """Bring co-activated experts of a solution without replicas together, within a load cap.

    The busiest device may take up to `slack` more rows than in the solution given. Nobody leaves
    his node.
    """
    if problem.coactivation_EE is None or problem.num_spare:
        return slots_DS
    part_E = np.empty(problem.num_experts, dtype=np.int64)
    part_E[slots_DS] = np.arange(problem.num_devices)[:, None]
    cap = float(device_load(slots_DS, problem.load_E).max()) * (1 + slack)
    per_node = problem.num_devices // problem.num_nodes
    for first in range(0, problem.num_devices, per_node):
        own = np.flatnonzero(part_E // per_node == first // per_node)
        part_E[own] = first + swap_for_affinity(
            problem.coactivation_EE[np.ix_(own, own)],
            part_E[own] - first,
            num_parts=per_node,
            load_E=problem.load_E[own],
            cap=cap,
        )
    return np.argsort(part_E, kind="stable").reshape(slots_DS.shape)
