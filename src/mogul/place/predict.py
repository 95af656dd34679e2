"""What a placement does to small batches: rho and delta over batches drawn from a trace's sample.

A batch is drawn from the sampled tokens of all data, as a decode batch of unrelated requests is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mogul.place.problem import replica_counts
from mogul.spec import balance


@dataclass(frozen=True)
class BatchBalance:
    """Mean over batches."""

    rho: float
    delta: float
    imbalance: float
    """IS = (max - min rows over devices) / tokens."""


def draw_counts(
    ids_SK: Int[np.ndarray, "S K"],
    num_experts: int,
    *,
    batch_tokens: int,
    draws: int,
    seed: int = 0,
) -> Int[np.ndarray, "N E"]:
    """Rows of every expert in each of `draws` batches, drawn without repeats where they suffice."""
    rng = np.random.default_rng(seed)
    tokens = len(ids_SK)
    picked_NB = np.stack(
        [rng.choice(tokens, batch_tokens, replace=batch_tokens > tokens) for _ in range(draws)]
    )
    ids = ids_SK[picked_NB].reshape(draws, -1)
    row_N1 = np.arange(draws)[:, None]
    is_real = (ids >= 0) & (ids < num_experts)
    key = (ids + row_N1 * num_experts)[is_real]
    return np.bincount(key, minlength=draws * num_experts).reshape(draws, num_experts)


def balance_of(
    count_NE: Int[np.ndarray, "N E"], slots_DS: Int[np.ndarray, "D S"], *, batch_tokens: int
) -> BatchBalance:
    """Mean rho, delta and IS of batches on a placement; replicas share rows round-robin."""
    rows_ND, distinct_ND = by_device(count_NE, slots_DS)
    return BatchBalance(
        rho=float(np.mean([balance.rho(rows_D) for rows_D in rows_ND])),
        delta=float(np.mean([balance.delta(distinct_D) for distinct_D in distinct_ND])),
        imbalance=float(
            np.mean([balance.imbalance_score(rows_D, batch_tokens) for rows_D in rows_ND])
        ),
    )


def by_device(count_NE: np.ndarray, slots_DS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and distinct experts of every device [N, D]."""
    replicas_E = np.maximum(replica_counts(slots_DS, count_NE.shape[1]), 1)
    rank_DS = _rank_of_replica(slots_DS)
    count_NDS = count_NE[:, slots_DS]
    rows_NDS = (count_NDS + replicas_E[slots_DS] - 1 - rank_DS) // replicas_E[slots_DS]
    rows_NDS = np.where(slots_DS >= 0, rows_NDS, 0)
    return rows_NDS.sum(-1), (rows_NDS > 0).sum(-1)


def _rank_of_replica(slots_DS: np.ndarray) -> np.ndarray:
    """0 for the first slot of an expert, 1 for its second, ..."""
    flat = slots_DS.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    start = np.maximum.accumulate(np.where(first, np.arange(len(flat)), 0))
    rank = np.empty(len(flat), dtype=np.int64)
    rank[order] = np.arange(len(flat)) - start
    return rank.reshape(slots_DS.shape)
