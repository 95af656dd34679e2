"""A trace from plain picks: ids of shape [T, L, K], however they were recorded.

The numpy definition of every routing array of a trace. The accumulators that run beside a model
on its device must agree with it; picks recorded elsewhere (a server's log, an .npy file) enter
here.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from mogul.core.errors import ArtifactError
from mogul.spec.trace import NUM_BUSIEST_BINS, ModelStamp, Trace, TraceMeta

BATCH_SIZES = (4, 16, 64, 256)
SAMPLE_LIMIT = 4096


def trace_of_picks(
    ids: Int[np.ndarray, "T L K"],
    model: ModelStamp,
    *,
    weights: Float[np.ndarray, "T L K"] | None = None,
    layers: tuple[int, ...] = (),
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    sample_limit: int = SAMPLE_LIMIT,
    seed: int = 0,
) -> Trace:
    """Count picks into a trace; an id outside 0..E-1 is a null pick.

    Raises:
        ArtifactError: ids of another shape than the model's, or none at all.
    """
    if ids.ndim != 3 or ids.shape[2] != model.top_k or not ids.size:
        raise ArtifactError(
            f"picks have shape {ids.shape}; tokens x layers x {model.top_k} are needed",
            fix="give one row a token, layers on the second axis",
        )
    num_tokens, num_layers, _ = ids.shape
    weight_TLK = np.zeros(ids.shape) if weights is None else weights
    per_layer = [
        _layer_arrays(ids[:, layer], weight_TLK[:, layer], model.num_experts, batch_sizes)
        for layer in range(num_layers)
    ]
    arrays = {name: np.stack([one[name] for one in per_layer]) for name in per_layer[0]}
    for name in ("distinct_hist", "busiest_hist"):
        arrays[name] = np.ascontiguousarray(np.swapaxes(arrays[name], 0, 1))
    arrays["transition"] = _transitions(ids, model.num_experts)
    arrays["task_count"] = arrays["count"][None].copy()
    arrays |= _sample(ids, sample_limit, seed)
    meta = TraceMeta(
        model=model,
        layers=layers or tuple(range(num_layers)),
        num_tokens=num_tokens,
        batch_sizes=batch_sizes,
        sample_limit=sample_limit,
        tasks=("all",),
        seed=seed,
    )
    return Trace(meta, arrays)


def _transitions(ids_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    num_layers = ids_TLK.shape[1]
    hot = [_one_hot(ids_TLK[:, layer], num_experts) for layer in range(num_layers)]
    found = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.int64)
    for layer in range(num_layers - 1):
        found[layer] = hot[layer].T @ hot[layer + 1]
    return found


def _sample(ids_TLK: np.ndarray, limit: int, seed: int) -> dict[str, np.ndarray]:
    key_T = np.random.default_rng(seed).integers(0, 2**62, len(ids_TLK), dtype=np.uint64)
    kept = np.argsort(key_T)[:limit]
    return {
        "sample_key": key_T[kept],
        "sample_ids": ids_TLK[kept].astype(np.int64),
        "sample_task": np.zeros(len(kept), dtype=np.int64),
    }


def _one_hot(ids_TK: np.ndarray, num_experts: int) -> np.ndarray:
    hot_TE = np.zeros((len(ids_TK), num_experts + 1), dtype=np.int64)
    is_real = (ids_TK >= 0) & (ids_TK < num_experts)
    np.put_along_axis(hot_TE, np.where(is_real, ids_TK, num_experts), 1, axis=1)
    return hot_TE[:, :num_experts]


def _layer_arrays(
    ids_TK: np.ndarray, weight_TK: np.ndarray, num_experts: int, batch_sizes: tuple[int, ...]
) -> dict[str, np.ndarray]:
    hot_TE = _one_hot(ids_TK, num_experts)
    flat, weight = ids_TK.ravel(), weight_TK.ravel().astype(np.float64)
    real = (flat >= 0) & (flat < num_experts)
    distinct, busiest = zip(*(batch_histograms(hot_TE, size) for size in batch_sizes), strict=True)
    return {
        "count": hot_TE.sum(0),
        "weight_sum": np.bincount(flat[real], weight[real], num_experts),
        "weight_sqsum": np.bincount(flat[real], weight[real] ** 2, num_experts),
        "coactivation": hot_TE.T @ hot_TE,
        "distinct_hist": np.stack(distinct),
        "busiest_hist": np.stack(busiest),
    }


def batch_histograms(hot_TE: np.ndarray, batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of consecutive tokens by distinct experts [E+1] and by the busiest expert [64]."""
    num_batches, experts = len(hot_TE) // batch_tokens, hot_TE.shape[1]
    rows_NE = (
        hot_TE[: num_batches * batch_tokens].reshape(num_batches, batch_tokens, experts).sum(1)
    )
    distinct_N = (rows_NE > 0).sum(1)
    busiest_N = busiest_bin(rows_NE.max(1, initial=0), batch_tokens)
    return (
        np.bincount(distinct_N, minlength=experts + 1),
        np.bincount(busiest_N, minlength=NUM_BUSIEST_BINS),
    )


def busiest_bin(rows: np.ndarray, batch_tokens: int) -> np.ndarray:
    """The bin of a busiest expert with that many rows: exact up to 64 tokens, then in 64ths."""
    width = max(batch_tokens, NUM_BUSIEST_BINS)
    return np.maximum(rows - 1, 0) * NUM_BUSIEST_BINS // width
