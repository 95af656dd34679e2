"""From a trace to a placement: methods, rules of groups, predictions."""

import time

import numpy as np
import pytest

from mogul.core.errors import ConfigError
from mogul.place.coactivation import gather, swap_for_affinity
from mogul.place.nodes import by_node
from mogul.place.predict import balance_of, draw_counts
from mogul.place.problem import Problem, contiguous, device_load
from mogul.place.search import solve_for_load
from mogul.place.solve import METHODS, Wish, place
from mogul.spec import balance
from mogul.spec.grouping import Grouping
from mogul.spec.picks import trace_of_picks
from mogul.spec.trace import ModelStamp


def affinity_inside(affinity_EE, part_E):
    """Sum of the affinities of all pairs that share a part."""
    same_EE = part_E[:, None] == part_E[None, :]
    return float((affinity_EE * same_EE).sum() - np.trace(affinity_EE)) / 2


def stamp(experts=32, top_k=4, layers=3, **changes):
    return ModelStamp(
        name="m", family="qwen3_moe", num_layers=layers, num_experts=experts, top_k=top_k,
        hidden_size=8, expert_bytes=1000, **changes,
    )  # fmt: skip


def skewed_trace(model, tokens=1500, seed=0, clusters=1):
    """Zipf-like picks; with clusters, a token mostly picks inside one random set of experts."""
    rng = np.random.default_rng(seed)
    experts = model.num_experts
    ids = np.empty((tokens, model.num_layers, model.top_k), dtype=np.int64)
    for layer in range(model.num_layers):
        logit = rng.normal(0, 1, experts) + rng.gumbel(size=(tokens, experts))
        if clusters > 1:
            home = rng.permutation(experts) % clusters
            logit += 3.0 * (home == rng.integers(clusters, size=(tokens, 1)))
        ids[:, layer] = np.argsort(-logit, axis=-1)[:, : model.top_k]
    return trace_of_picks(ids, model)


def grouped_trace(model, tokens=1000, seed=0):
    rng = np.random.default_rng(seed)
    size = model.num_experts // model.num_groups
    logit = rng.normal(0, 1.5, (model.num_layers, model.num_groups, size))
    noisy = logit + rng.gumbel(size=(tokens, *logit.shape))
    best = noisy.argmax(-1) + np.arange(model.num_groups) * size
    return trace_of_picks(best, model)


@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_worse_than_contiguous(method):
    if method == "ilp":
        pytest.importorskip("highspy", reason="extra mogul[place] is not installed")
    trace = skewed_trace(stamp(), clusters=4)
    result = place(trace, Wish(num_devices=4, method=method, limit_s=1))
    for index, one in enumerate(result.layers):
        rows = balance.rows_per_device(
            trace.arrays["sample_ids"][:, index], result.device_of_expert(one.layer), 4
        )
        assert balance.rho(rows) == pytest.approx(one.rho)  # the sample is the whole trace here
        assert one.rho <= one.rho_before + 1e-12
        assert one.rho_bound <= one.rho + 1e-12
        assert one.gap == pytest.approx(one.rho / one.rho_bound - 1)
    if method in ("swap", "auto", "ilp"):
        assert max(one.rho for one in result.layers) < 1.01


def test_contiguous_is_named_where_it_wins():
    even = np.tile(np.arange(8).reshape(4, 1, 2), (16, 1, 1))
    trace = trace_of_picks(even, stamp(experts=8, top_k=2, layers=1))
    one = place(trace, Wish(num_devices=4, method="swap")).layers[0]
    assert (one.rho, one.rho_before, one.gap) == (1.0, 1.0, 0.0)


def test_58_layers_of_256_experts_on_64_devices():
    rng = np.random.default_rng(0)
    zipf = np.arange(1, 257) ** -0.4
    start_s = time.process_time()
    ratios = []
    for _ in range(58):
        problem = Problem(rng.permutation(zipf * rng.lognormal(0, 0.3, 256)), 64, 4)
        found = solve_for_load(problem)
        from mogul.place.problem import lower_bound

        ratios.append(device_load(found, problem.load_E).max() / lower_bound(problem))
    assert np.mean(ratios) <= 1.005
    assert time.process_time() - start_s < 20  # a hang guard; the measured time is in the ledger


def test_replicas_share_rows_and_lower_rho():
    trace = skewed_trace(stamp())
    plain = place(trace, Wish(num_devices=16))
    spare = place(trace, Wish(num_devices=16, replicas=16))
    assert spare.slots_per_device == 3
    assert spare.has_replicas
    assert np.mean([one.rho for one in spare.layers]) < np.mean([one.rho for one in plain.layers])


def test_coactivation_gathers_within_the_cap():
    trace = skewed_trace(stamp(layers=1), clusters=4)
    load, pairs = trace.count[0].astype(float), trace.arrays["coactivation"][0]
    problem = Problem(load, 4, 8, coactivation_EE=pairs)
    before = solve_for_load(problem)
    after = gather(before, problem, slack=0.05)
    assert device_load(after, load).max() <= device_load(before, load).max() * 1.05 + 1e-6

    def inside(slots_DS):
        part = np.empty(32, dtype=int)
        part[slots_DS] = np.arange(4)[:, None]
        return affinity_inside(pairs, part)

    assert inside(after) > 1.2 * inside(before)


def test_swap_for_affinity_finds_planted_parts():
    rng = np.random.default_rng(0)
    planted = rng.permutation(np.repeat(np.arange(4), 6))
    affinity = (planted[:, None] == planted[None]) * 10.0 + rng.random((24, 24))
    start = rng.permutation(np.repeat(np.arange(4), 6))
    found = swap_for_affinity(affinity, start, num_parts=4)
    assert np.bincount(found).tolist() == [6] * 4
    assert len({(a, b) for a, b in zip(planted.tolist(), found.tolist(), strict=True)}) == 4
    spread = swap_for_affinity(-affinity, planted, num_parts=4)
    assert affinity_inside(affinity, spread) < 0.4 * affinity_inside(affinity, planted)


def test_a_moge_stands_in_whole_groups():
    model = stamp(num_groups=4)
    trace = grouped_trace(model)
    for devices in (1, 2, 4):
        result = place(trace, Wish(num_devices=devices))
        for one in result.layers:
            assert one.rho == one.rho_before == 1.0
            per_group = result.device_of_expert(one.layer).reshape(4, 8)
            assert (per_group == per_group[:, :1]).all()
            assert one.delta is not None
            assert one.delta <= one.delta_before + 0.02


@pytest.mark.parametrize("devices", [3, 8])
def test_a_moge_on_other_devices_is_refused_unless_allowed(devices):
    trace = grouped_trace(stamp(num_groups=4))
    with pytest.raises(ConfigError, match=f"{devices} devices cannot hold whole groups") as caught:
        place(trace, Wish(num_devices=devices))
    assert "1, 2 or 4 devices" in caught.value.__notes__[0]
    result = place(trace, Wish(num_devices=devices, allow_imbalance=True))
    assert result.layers[0].rho >= 1.0


def test_a_moge_needs_no_replicas():
    trace = grouped_trace(stamp(num_groups=4))
    with pytest.raises(ConfigError, match="balanced by construction"):
        place(trace, Wish(num_devices=4, replicas=4))


def test_groups_of_limited_routing_stay_on_a_node():
    model = stamp(limit_num_groups=8)
    result = place(skewed_trace(model), Wish(num_devices=4, num_nodes=2))
    for one in result.layers:
        node_E = result.device_of_expert(one.layer) // 2
        assert (node_E.reshape(8, 4) == node_E.reshape(8, 4)[:, :1]).all()
        assert one.rho <= one.rho_before


def test_gathering_leaves_every_group_on_its_node():
    """Affinities across nodes would pull experts over; limited routing forbids it."""
    rng = np.random.default_rng(0)
    affinity = rng.integers(0, 100, (16, 16))
    problem = Problem(
        rng.pareto(1.5, 16) + 1, num_devices=4, slots=4, num_nodes=2,
        coactivation_EE=affinity + affinity.T, node_groups=4,
    )  # fmt: skip
    found = by_node(problem)
    gathered = gather(found, problem, slack=10.0)
    assert (np.sort(gathered, axis=1) != np.sort(found, axis=1)).any()
    for slots_DS in (found, gathered):
        nodes = [set(slots_DS[first : first + 2].ravel() // 4) for first in (0, 2)]
        assert not nodes[0] & nodes[1]


def test_nodes_gather_who_is_picked_together():
    trace = skewed_trace(stamp(layers=1), clusters=2)
    result = place(trace, Wish(num_devices=4, num_nodes=2))
    node_E = result.device_of_expert(0) // 2
    pairs = trace.arrays["coactivation"][0]
    plain = affinity_inside(pairs, np.repeat([0, 1], 16))
    assert affinity_inside(pairs, node_E) > 1.2 * plain


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"num_devices": 4, "slots": 7}, "4 devices with 7 slots cannot hold 32 experts"),
        ({"num_devices": 4, "slots": 33}, "33 slots a device are more than the 32 experts"),
        ({"num_devices": 0}, "0 devices"),
        ({"num_devices": 10**12}, "1000000000000 devices and 0 replicas of 32 experts cannot be"),
        ({"num_devices": 4, "replicas": 97}, "4 devices and 97 replicas of 32 experts cannot be"),
        ({"num_devices": 4, "memory_bytes": 20_000}, "need 23.44 KiB on every device"),
        ({"num_devices": 4, "method": "gredy"}, "unknown method 'gredy'"),
        ({"num_devices": 4, "num_nodes": 3}, "4 devices cannot stand on 3 nodes"),
    ],
)
def test_impossible_wishes_are_named(wish, words):
    with pytest.raises(ConfigError, match=words):
        place(skewed_trace(stamp(), tokens=100), Wish(**wish))


def test_memory_error_names_the_devices_that_would_do():
    with pytest.raises(ConfigError) as caught:
        place(skewed_trace(stamp(), tokens=100), Wish(num_devices=4, memory_bytes=20_000))
    assert "at least 6 devices" in caught.value.__notes__[0]
    place(skewed_trace(stamp(), tokens=100), Wish(num_devices=6, memory_bytes=20_000))


def test_batch_balance_by_hand():
    ids = np.array([[0, 1], [0, 2]])
    counts = draw_counts(ids, 4, batch_tokens=2, draws=3)
    assert counts.tolist() == [[2, 1, 1, 0]] * 3
    found = balance_of(counts, np.array([[0, 1], [2, 3]]), batch_tokens=2)
    assert (found.rho, found.delta, found.imbalance) == (1.5, 2 / 1.5, 1.0)
    shared = balance_of(counts, np.array([[0, 1, 3], [2, 0, -1]]), batch_tokens=2)
    assert (shared.rho, shared.delta) == (1.0, 1.0)


def test_grouped_routing_has_imbalance_zero():
    model = stamp(experts=64, top_k=8, layers=1, num_groups=8)
    counts = draw_counts(
        grouped_trace(model).arrays["sample_ids"][:, 0], 64, batch_tokens=16, draws=50
    )
    problem = Problem(np.ones(64), 8, 8)
    found = balance_of(counts, contiguous(problem), batch_tokens=16)
    assert (found.rho, found.imbalance) == (1.0, 0.0)
    assert found.delta > 1.0


def test_monte_carlo_of_the_imbalance_score_is_the_papers():
    top_k = Grouping(num_experts=64, num_groups=1, top_k=8)
    scores = balance.monte_carlo_imbalance(top_k, num_tokens=16, num_devices=8, draws=5000)
    assert scores.mean() == pytest.approx(0.667, abs=0.01)
    assert scores.std() == pytest.approx(0.192, abs=0.01)
    assert np.quantile(scores, [0.05, 0.5, 0.95]).tolist() == [0.375, 0.625, 1.0]
    moge = Grouping(num_experts=64, num_groups=8, top_k=8)
    assert not balance.monte_carlo_imbalance(moge, num_tokens=16, num_devices=8, draws=500).any()
