"""Two levels: experts to nodes first, then to the devices inside each node.

Groups of group-limited routing stay whole on a node where their number allows it (then a token's
rows cross few node borders); else co-activated experts are gathered on a node.
"""

from __future__ import annotations

import numpy as np

from mogul.core.errors import ConfigError
from mogul.place.coactivation import swap_for_affinity
from mogul.place.greedy import pack
from mogul.place.problem import Problem, device_load, lower_bound
from mogul.place.search import solve_for_load
from mogul.place.swap import swap


def by_node(problem: Problem, *, slack: float = 0.03) -> np.ndarray:
    """Slots [D, S] with experts (and all their replicas) on one node each."""
    found = [_solve_nodes(problem, node_E) for node_E in _nodes_of_experts(problem, slack)]
    return min(found, key=lambda slots_DS: device_load(slots_DS, problem.load_E).max())


def _solve_nodes(problem: Problem, node_E: np.ndarray) -> np.ndarray:
    per_node = problem.num_devices // problem.num_nodes
    slots_DS = np.full((problem.num_devices, problem.slots), -1)
    for node in range(problem.num_nodes):
        experts = np.flatnonzero(node_E == node)
        inner = Problem(problem.load_E[experts], per_node, problem.slots)
        solved = solve_for_load(inner)
        slots_DS[node * per_node : (node + 1) * per_node] = np.where(
            solved >= 0, experts[solved], -1
        )
    return slots_DS


def _nodes_of_experts(problem: Problem, slack: float) -> list[np.ndarray]:
    """Candidates for the node of every expert.

    Whole groups are spread twice: as packed, and evened by swaps. Even nodes are not always the
    best ones, because a node's hottest expert decides too.
    """
    groups, nodes = problem.node_groups, problem.num_nodes
    if groups > 1 and groups % nodes == 0:
        load_G = problem.load_E.reshape(groups, -1).sum(axis=1)
        size = problem.num_experts // groups
        return [np.repeat(_spread(load_G, nodes, even=even), size) for even in (True, False)]
    if problem.num_experts % nodes:
        raise ConfigError(
            f"{problem.num_experts} experts cannot stand on {nodes} nodes in equal numbers",
            fix=f"use a number of nodes that divides {problem.num_experts}",
        )
    node_E = _spread(problem.load_E, nodes, even=True)
    if problem.coactivation_EE is None:
        return [node_E]
    cap = np.bincount(node_E, weights=problem.load_E).max() * (1 + slack)
    return [
        swap_for_affinity(
            problem.coactivation_EE, node_E, num_parts=nodes, load_E=problem.load_E, cap=float(cap)
        )
    ]


def _spread(load_E: np.ndarray, nodes: int, *, even: bool) -> np.ndarray:
    """Node of every item: equal numbers, heaviest first to the emptiest, then swaps."""
    whole = Problem(load_E, nodes, len(load_E) // nodes)
    slots_NS = pack(np.arange(len(load_E)), load_E, nodes, whole.slots)
    if even:
        slots_NS = swap(slots_NS, whole, target=lower_bound(whole))
    node_E = np.empty(len(load_E), dtype=np.int64)
    node_E[slots_NS] = np.arange(nodes)[:, None]
    return node_E
