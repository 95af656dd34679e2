"""Loads, bounds and heuristics of one layer."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import ConfigError
from mogul.place.greedy import greedy
from mogul.place.nodes import by_node
from mogul.place.problem import (
    Problem,
    contiguous,
    device_load,
    lower_bound,
    replica_counts,
    replicate,
)
from mogul.place.search import solve_for_load
from mogul.place.swap import swap


def skewed_loads(num_experts, seed, alpha=0.4, sigma=0.3):
    rng = np.random.default_rng(seed)
    zipf = np.arange(1, num_experts + 1) ** -alpha
    return rng.permutation(zipf * rng.lognormal(0, sigma, num_experts)) * 1000


def eplb(load_E, num_devices, num_slots):
    """EPLB's heuristic from its description: replicate the largest share, pack heaviest first.

    Replicas go one at a time to the expert with the largest load per replica; then the physical
    experts, heaviest first, go to the least loaded device that has a slot left.
    """
    replicas = [1] * len(load_E)
    for _ in range(num_slots - len(load_E)):
        replicas[max(range(len(load_E)), key=lambda e: load_E[e] / replicas[e])] += 1
    physical = [load_E[e] / replicas[e] for e in range(len(load_E)) for _ in range(replicas[e])]
    total, count = [0.0] * num_devices, [0] * num_devices
    for load in sorted(physical, reverse=True):
        open_devices = [d for d in range(num_devices) if count[d] < num_slots // num_devices]
        device = min(open_devices, key=lambda d: total[d])
        total[device] += load
        count[device] += 1
    return max(total)


def best_of_all(load_E, num_devices, slots):
    best = np.inf
    for order in itertools.permutations(range(len(load_E))):
        groups = np.array(order).reshape(num_devices, slots)
        best = min(best, load_E[groups].sum(1).max())
    return best


problems = st.tuples(
    st.sampled_from([(8, 2, 4), (12, 4, 3), (16, 8, 3), (30, 6, 6), (7, 3, 3), (5, 5, 1)]),
    st.integers(0, 10_000),
)


@given(problems)
def test_every_expert_is_placed_and_bounds_hold(case):
    (experts, devices, slots), seed = case
    problem = Problem(skewed_loads(experts, seed), devices, slots)
    slots_DS = solve_for_load(problem, tries=4)
    counts = replica_counts(slots_DS, experts)
    assert (counts >= 1).all()
    assert counts.sum() == (slots_DS >= 0).sum() <= devices * slots
    for held in slots_DS:
        real = held[held >= 0]
        assert len(set(real.tolist())) == len(real), "two replicas of an expert on one device"
    top = device_load(slots_DS, problem.load_E).max()
    assert np.isclose(device_load(slots_DS, problem.load_E).sum(), problem.load_E.sum())
    assert lower_bound(problem) <= top * (1 + 1e-9)
    assert top <= device_load(greedy(problem), problem.load_E).max() * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_bound_and_search_against_every_assignment(seed):
    problem = Problem(skewed_loads(8, seed, alpha=1.0), 4, 2)
    best = best_of_all(problem.load_E, 4, 2)
    found = device_load(solve_for_load(problem), problem.load_E).max()
    assert lower_bound(problem) <= best * (1 + 1e-9)
    assert found == pytest.approx(best)


@pytest.mark.parametrize("seed", range(50))
def test_at_least_as_good_as_eplb(seed):
    rng = np.random.default_rng(seed)
    experts, devices, spare = [(64, 8, 0), (64, 8, 8), (128, 16, 16), (256, 32, 32)][seed % 4]
    load_E = skewed_loads(experts, seed, alpha=rng.uniform(0, 1.2), sigma=rng.uniform(0.1, 0.8))
    problem = Problem(load_E, devices, (experts + spare) // devices)
    ours = device_load(solve_for_load(problem), load_E).max()
    assert ours <= eplb(load_E, devices, experts + spare) * (1 + 1e-9)


def eplb_by_node(load_E, num_groups, num_nodes, num_devices, num_slots):
    """The same in two levels: groups to nodes, heaviest first, then as above inside each node."""
    load_G = load_E.reshape(num_groups, -1).sum(1)
    total, count, node_G = [0.0] * num_nodes, [0] * num_nodes, [0] * num_groups
    for group in sorted(range(num_groups), key=lambda g: -load_G[g]):
        open_nodes = [n for n in range(num_nodes) if count[n] < num_groups // num_nodes]
        node_G[group] = node = min(open_nodes, key=lambda n: total[n])
        total[node] += load_G[group]
        count[node] += 1
    node_E = np.repeat(node_G, len(load_E) // num_groups)
    devices, slots = num_devices // num_nodes, num_slots // num_nodes
    return max(eplb(load_E[node_E == node], devices, slots) for node in range(num_nodes))


@pytest.mark.parametrize("seed", range(50))
def test_at_least_as_good_as_eplb_on_nodes(seed):
    rng = np.random.default_rng(seed)
    experts, groups, nodes, devices, spare = [
        (64, 8, 2, 8, 8), (64, 4, 2, 16, 16), (128, 8, 4, 16, 0), (64, 8, 4, 8, 0)
    ][seed % 4]  # fmt: skip
    load_E = skewed_loads(experts, seed, alpha=rng.uniform(0, 1.2), sigma=rng.uniform(0.1, 0.8))
    slots = (experts + spare) // devices
    problem = Problem(load_E, devices, slots, num_nodes=nodes, node_groups=groups)
    ours = device_load(by_node(problem), load_E).max()
    theirs = eplb_by_node(load_E, groups, nodes, devices, experts + spare)
    assert ours <= theirs * (1 + 1e-9)


def test_large_model_is_near_the_bound():
    ratios = []
    for seed in range(12):
        problem = Problem(skewed_loads(256, seed), 64, 4)
        found = device_load(solve_for_load(problem), problem.load_E).max()
        ratios.append(found / lower_bound(problem))
    assert np.mean(ratios) <= 1.005


def test_swap_never_worsens_and_stops_at_the_target():
    problem = Problem(skewed_loads(32, 3), 4, 8)
    start = contiguous(problem)
    loose = device_load(start, problem.load_E).max() * 1.01
    assert (swap(start, problem, target=loose) == start).all()
    assert device_load(swap(start, problem), problem.load_E).max() < loose


def test_replicas_go_to_the_largest_share_and_stay_under_the_devices():
    assert replicate(np.array([9.0, 3.0, 1.0]), 6, most=4).tolist() == [4, 1, 1]
    assert replicate(np.array([9.0, 1.0]), 8, most=2).tolist() == [2, 2]
    assert replicate(np.array([9.0, 1.0]), 4, most=1).tolist() == [1, 1]


def test_impossible_problems_are_named():
    with pytest.raises(ConfigError, match="2 devices with 3 slots cannot hold 8 experts") as caught:
        Problem(np.ones(8), 2, 3)
    assert "at least 4 slots" in caught.value.__notes__[0]
    with pytest.raises(ConfigError, match="4 devices cannot stand on 3 nodes"):
        Problem(np.ones(8), 4, 2, num_nodes=3)
    with pytest.raises(ConfigError, match="finite"):
        Problem(np.array([1.0, np.nan]), 1, 2)
