import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import ConfigError
from mogul.spec import balance
from mogul.spec.grouping import Grouping

IDS = np.array([[0, 1], [0, 3], [0, 4], [5, -1]])  # 4 experts: 4, 5 and -1 are null picks
TWO_DEVICES = np.array([0, 0, 1, 1])


def test_null_picks_count_nowhere():
    assert balance.rows_per_expert(IDS, 4).tolist() == [3, 1, 0, 1]
    assert balance.rows_per_device(IDS, TWO_DEVICES, 2).tolist() == [4, 1]
    assert balance.distinct_per_device(IDS, TWO_DEVICES, 2).tolist() == [2, 1]


def test_the_measures_by_hand():
    rows = np.array([4, 1])
    assert balance.rho(rows) == pytest.approx(4 / 2.5)
    assert balance.delta(np.array([2, 1])) == pytest.approx(2 / 1.5)
    assert balance.imbalance_score(rows, num_tokens=4) == 0.75
    assert balance.max_violation(np.array([3, 1, 0, 1])) == pytest.approx(3 / 1.25 - 1)
    assert balance.max_violation_in_groups(np.array([3, 1, 0, 1]), 2) == pytest.approx(1.0)
    assert balance.rho(np.zeros(3)) == 1.0
    assert balance.imbalance_score(rows, num_tokens=0) == 0.0


def test_an_expert_on_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="placed on device 2, but there are 2 devices"):
        balance.rows_per_device(IDS, np.array([0, 0, 1, 2]), 2)


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 40),
    groups=st.sampled_from([1, 2, 4, 8]),
    picks=st.integers(1, 3),
)
def test_grouped_picks_are_balanced_by_construction(seed, tokens, groups, picks):
    g = Grouping(num_experts=groups * 4, num_groups=groups, top_k=groups * picks)
    ids = balance.random_picks(g, tokens, np.random.default_rng(seed))
    assert all(len(set(row)) == g.top_k for row in ids.tolist())
    for devices in g.legal_devices():
        rows = balance.rows_per_device(ids, g.device_of_expert(devices), devices)
        assert (rows == g.slots_per_device(tokens, devices)).all()
        assert balance.rho(rows) == 1.0
        assert balance.imbalance_score(rows, tokens) == 0.0


@pytest.mark.parametrize(
    ("tokens", "p_zero", "mean"), [(1, 0.0037, 2.46), (16, 0, 0.667), (64, 0, 0.335)]
)
def test_monte_carlo_reproduces_the_published_imbalance(tokens, p_zero, mean):
    """arXiv 2505.21411, figure 2b: 64 experts, 8 picks, 8 devices."""
    top_k = Grouping(num_experts=64, top_k=8)
    scores = balance.monte_carlo_imbalance(top_k, num_tokens=tokens, num_devices=8, draws=5000)
    assert scores.mean() == pytest.approx(mean, abs=0.03)
    assert (scores == 0).mean() == pytest.approx(p_zero, abs=0.004)
    grouped = Grouping(num_experts=64, num_groups=8, top_k=8)
    exact = balance.monte_carlo_imbalance(grouped, num_tokens=tokens, num_devices=8, draws=200)
    assert (exact == 0).all()


def test_monte_carlo_refuses_unequal_devices():
    with pytest.raises(ConfigError, match="64 experts cannot be spread over 7 devices"):
        balance.monte_carlo_imbalance(
            Grouping(num_experts=64, top_k=8), num_tokens=1, num_devices=7
        )
