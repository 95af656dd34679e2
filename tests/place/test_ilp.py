"""The certificate: against exhaustive search, and fast at the size that matters."""

import sys

import numpy as np
import pytest

from mogul.core.errors import BackendError
from mogul.place import ilp
from mogul.place.greedy import greedy
from mogul.place.nodes import by_node
from mogul.place.problem import Problem, contiguous, device_load, replica_counts
from mogul.place.search import solve_for_load

pytest.importorskip("highspy", reason="extra mogul[place] is not installed")


def loads(num_experts, seed, alpha=0.4):
    rng = np.random.default_rng(seed)
    zipf = np.arange(1, num_experts + 1) ** -alpha
    return rng.permutation(zipf * rng.lognormal(0, 0.3, num_experts)) * 1000


@pytest.mark.parametrize("seed", range(3))
def test_improves_a_bad_start_to_the_optimum(seed):
    problem = Problem(loads(12, seed), 3, 4)
    proven = ilp.certify(contiguous(problem), problem, gap=1e-6)
    found = device_load(proven.slots_DS, problem.load_E).max()
    assert proven.gap(problem) <= 1e-5
    assert found <= device_load(solve_for_load(problem), problem.load_E).max() * (1 + 1e-5)
    assert (replica_counts(proven.slots_DS, 12) == 1).all()


def test_replicas_stay_apart_and_experts_on_their_node():
    problem = Problem(loads(8, 5, alpha=1.0), 4, 3, num_nodes=2)
    start = by_node(problem)
    proven = ilp.certify(start, problem, gap=1e-6).slots_DS
    for held in proven:
        real = held[held >= 0]
        assert len(set(real.tolist())) == len(real)
    nodes = [set(part[part >= 0].tolist()) for part in (proven[:2], proven[2:])]
    assert not nodes[0] & nodes[1]
    top = device_load(proven, problem.load_E).max()
    assert top <= device_load(start, problem.load_E).max() * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_certificate_at_256_experts_on_32_devices(seed):
    problem = Problem(loads(256, seed), 32, 8)
    proven = ilp.certify(solve_for_load(problem), problem, gap=1e-3, limit_s=5)
    assert proven.gap(problem) <= 1e-3


def test_a_worse_solver_answer_is_not_taken():
    problem = Problem(loads(64, 0), 8, 8)
    start = greedy(problem)
    proven = ilp.certify(start, problem, limit_s=0.0)
    top = device_load(proven.slots_DS, problem.load_E).max()
    assert top <= device_load(start, problem.load_E).max()


def test_without_the_solver_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)
    problem = Problem(loads(8, 0), 2, 4)
    with pytest.raises(BackendError, match="highspy is not installed") as caught:
        ilp.certify(contiguous(problem), problem)
    assert "mogul[place]" in caught.value.__notes__[0]
