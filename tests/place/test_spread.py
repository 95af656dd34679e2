"""Groups that keep picks: planted ones are found, others beat chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.place.spread import kept_share, random_kept, spread


def pairs_of(ids, experts):
    hot = np.zeros((len(ids), experts), dtype=np.int64)
    np.put_along_axis(hot, ids, 1, axis=1)
    return hot.T @ hot


def clustered_picks(experts, top_k, clusters, tokens=2000, seed=0):
    """Tokens pick mostly inside one of `clusters` random sets of experts."""
    rng = np.random.default_rng(seed)
    home = rng.permutation(experts) % clusters
    score = rng.gumbel(size=(tokens, experts)) + rng.normal(0, 0.5, experts)
    score += 4.0 * (home == rng.integers(clusters, size=(tokens, 1)))
    return np.argsort(-score, axis=1)[:, :top_k]


@pytest.mark.parametrize(("groups", "share"), [(2, 0.863), (4, 0.766), (8, 0.656)])
def test_random_expectation_of_eight_picks(groups, share):
    assert random_kept(8, groups) == pytest.approx(share, abs=6e-4)
    rng = np.random.default_rng(0)
    group = np.arange(64) * groups // 64
    ids = np.argsort(rng.random((20_000, 64)), axis=1)[:, :8]
    assert kept_share(ids, group, groups) == pytest.approx(random_kept(8, groups, 64), abs=3e-3)


def test_kept_share_by_hand():
    group = np.array([0, 0, 1, 1])
    assert kept_share(np.array([[0, 2], [0, 1]]), group, 2) == 0.75
    one = np.zeros(4, dtype=int)
    assert kept_share(np.array([[0, 2, 4]]), one, 1) == 1.0  # 4 is a null pick


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_recovered(groups, seed):
    rng = np.random.default_rng(seed)
    planted = rng.permutation(np.repeat(np.arange(groups), 32 // groups))
    score = rng.random((1500, 32))
    ids = np.concatenate(
        [
            np.flatnonzero(planted == g)[
                np.argsort(-score[:, planted == g], axis=1)[:, : 8 // groups]
            ]
            for g in range(groups)
        ],
        axis=1,
    )
    found = spread(ids, pairs_of(ids, 32), groups, seed=seed)
    assert kept_share(ids, found, groups) == 1.0
    for group in range(groups):
        assert len(set(planted[found == group].tolist())) == 1


@pytest.mark.parametrize("seed", range(20))
def test_beats_random_and_contiguous_groups_on_unseen_tokens(seed):
    ids = clustered_picks(32, 8, 4, seed=seed)
    known, unseen = ids[:1500], ids[1500:]
    found = spread(known, pairs_of(known, 32), 8, seed=seed)
    plain = np.arange(32) // 4
    shuffled = np.random.default_rng(1000 + seed).permutation(plain)
    kept = kept_share(unseen, found, 8)
    assert kept > kept_share(unseen, plain, 8) + 0.02
    assert kept > kept_share(unseen, shuffled, 8) + 0.02
    assert kept > random_kept(8, 8, 32)


@given(st.sampled_from([(8, 2), (8, 4), (16, 8), (16, 1), (8, 8)]), st.integers(0, 1000))
def test_groups_are_of_equal_size_and_never_keep_less_than_contiguous(case, seed):
    experts, groups = case
    ids = clustered_picks(experts, 8 if experts > 8 else groups, 2, tokens=200, seed=seed)
    found = spread(ids, pairs_of(ids, experts), groups, seed=seed)
    assert np.bincount(found, minlength=groups).tolist() == [experts // groups] * groups
    plain = np.arange(experts) * groups // experts
    assert kept_share(ids, found, groups) >= kept_share(ids, plain, groups) - 1e-12
