"""Spread experts over groups so that the picks of a token fall into different groups.

With M groups and K picks, a grouped router keeps of a token's old picks at most K/M in each group:
kept = sum over groups of min(picks in the group, K/M). Fewer pairs of one token in one group keep
more, so experts that are picked together are driven apart: swaps on the negative co-activation from
several starts, then swaps on the kept picks themselves over the sampled tokens.
"""

from __future__ import annotations

from math import comb

import numpy as np
from jaxtyping import Int

from mogul.place.coactivation import swap_for_affinity

_TRIED_PAIRS = 400


def random_kept(top_k: int, num_groups: int, num_experts: int | None = None) -> float:
    """Share of picks that a random grouping keeps; without experts, the limit of many experts.

    K = 8: 0.863, 0.766 and 0.656 for 2, 4 and 8 groups in the limit.
    """
    quota = top_k // num_groups
    kept = 0.0
    for hits in range(top_k + 1):
        if num_experts is None:
            chance = comb(top_k, hits) * (num_groups - 1) ** (top_k - hits) / num_groups**top_k
        else:
            size = num_experts // num_groups
            chance = comb(size, hits) * comb(num_experts - size, top_k - hits)
            chance /= comb(num_experts, top_k)
        kept += min(hits, quota) * chance
    return num_groups * kept / top_k


def kept_share(
    ids: Int[np.ndarray, "T K"], group_E: Int[np.ndarray, " E"], num_groups: int
) -> float:
    """Share of these picks that a router grouped this way keeps."""
    hits_TM = _hits(ids, group_E, num_groups)
    return float(np.minimum(hits_TM, ids.shape[1] // num_groups).sum() / max(1, hits_TM.sum()))


def _hits(ids_TK: np.ndarray, group_E: np.ndarray, num_groups: int) -> np.ndarray:
    """Picks of every token in every group [T, M]; null picks count nowhere."""
    tokens, experts = len(ids_TK), len(group_E)
    real = (ids_TK >= 0) & (ids_TK < experts)
    key_TK = np.arange(tokens)[:, None] * num_groups + group_E[np.where(real, ids_TK, 0)]
    hits = np.bincount(key_TK[real], minlength=tokens * num_groups)
    return hits.reshape(tokens, num_groups)


def spread(
    ids: Int[np.ndarray, "T K"],
    coactivation: Int[np.ndarray, "E E"],
    num_groups: int,
    *,
    starts: int = 4,
    seed: int = 0,
) -> Int[np.ndarray, " E"]:
    """Group of every expert: M equal groups that keep as many picks as can be found.

    Args:
        ids: sampled picks of one layer.
        coactivation: tokens that pick both experts of a pair, over the whole trace.
        num_groups: M.
        starts: starting points; the first is the contiguous grouping.
        seed: seed of the other starts.
    """
    experts = len(coactivation)
    plain_E = np.arange(experts) * num_groups // experts
    if num_groups in (1, experts):
        return plain_E
    rng = np.random.default_rng(seed)
    best_E, best = plain_E, kept_share(ids, plain_E, num_groups)
    for start in range(starts):
        first_E = plain_E if start == 0 else rng.permutation(plain_E)
        found_E = swap_for_affinity(-coactivation.astype(float), first_E, num_parts=num_groups)
        share = kept_share(ids, found_E, num_groups)
        if share > best:
            best_E, best = found_E, share
    return _refine(ids, best_E, num_groups, rng)


def _refine(
    ids_TK: np.ndarray, group_E: np.ndarray, num_groups: int, rng: np.random.Generator
) -> np.ndarray:
    """Random swaps that raise the kept picks of the sample."""
    group_E = group_E.copy()
    quota = ids_TK.shape[1] // num_groups
    hits_TM = _hits(ids_TK, group_E, num_groups)
    tokens_of = [np.flatnonzero((ids_TK == expert).any(1)) for expert in range(len(group_E))]
    for _ in range(_TRIED_PAIRS):
        a, b = rng.choice(len(group_E), 2, replace=False)
        one, two = group_E[a], group_E[b]
        if one == two:
            continue
        touched = np.union1d(tokens_of[a], tokens_of[b])
        after = hits_TM[touched]
        has_a, has_b = (np.isin(touched, tokens_of[e], assume_unique=True) for e in (a, b))
        step = has_b.astype(np.int64) - has_a
        before_kept = np.minimum(after[:, [one, two]], quota).sum()
        after[:, one] += step
        after[:, two] -= step
        if np.minimum(after[:, [one, two]], quota).sum() > before_kept:
            hits_TM[touched] = after
            group_E[a], group_E[b] = two, one
    return group_E
