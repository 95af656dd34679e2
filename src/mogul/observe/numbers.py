"""The numbers a report shows, from a trace alone: loads, dead experts, entropy, devices.

Dead: no row at all. Cold: less than a tenth of the uniform share. Entropy is that of the router's
scores over ln(E): 1 means a router that does not choose. Letters: L layers, E experts, D devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mogul.core.table import Table
from mogul.place.predict import BatchBalance, balance_of, by_device, draw_counts
from mogul.place.problem import Problem, contiguous, device_load
from mogul.spec import balance
from mogul.spec.placement import Placement
from mogul.spec.trace import Trace

COLD_SHARE = 0.1
DRAWS = 32
FEW_ROWS = 100
"""Rows an expert in a trace, below which chance alone makes the busiest stand out by a quarter."""


@dataclass(frozen=True)
class LayerNumbers:
    """One value a layer [L]."""

    layers: tuple[int, ...]
    busiest: np.ndarray
    """Rows of the busiest expert over the mean."""
    dead: np.ndarray
    cold: np.ndarray
    """Below a tenth of the uniform share, dead ones included."""
    entropy: np.ndarray | None
    """Mean entropy of a token's scores over ln(E)."""
    null_share: np.ndarray
    """Share of the picks that are null."""


def layer_numbers(trace: Trace) -> LayerNumbers:
    """What every layer does."""
    model, tokens = trace.meta.model, trace.meta.num_tokens
    count_LE = trace.count
    mean_L1 = np.maximum(count_LE.mean(1, keepdims=True), 1e-30)
    entropy = trace.arrays.get("entropy_sum")
    return LayerNumbers(
        layers=trace.meta.layers,
        busiest=np.array([balance.max_over_mean(row_E) for row_E in count_LE]),
        dead=(count_LE == 0).sum(1),
        cold=(count_LE < COLD_SHARE * mean_L1).sum(1),
        entropy=None if entropy is None else entropy / (tokens * np.log(max(2, model.num_experts))),
        null_share=1 - count_LE.sum(1) / (tokens * model.top_k),
    )


def summary(trace: Trace) -> Table:
    """The terminal summary: each number's least, median and most over layers."""
    found, model = layer_numbers(trace), trace.meta.model
    rows = [_spread("busiest expert / mean rows", found.busiest, found.layers)]
    rows.append(_spread("dead experts (no row)", found.dead, found.layers))
    rows.append(_spread("cold experts (< 10 % of the mean)", found.cold, found.layers))
    if found.entropy is not None:
        rows.append(_spread("router entropy / ln E", found.entropy, found.layers))
    for index, size in enumerate(trace.meta.batch_sizes):
        distinct_L = mean_distinct(trace, index)
        if not np.isnan(distinct_L).any():
            rows.append(_spread(f"distinct experts, batch of {size}", distinct_L, found.layers))
    if found.null_share.max() > 0:
        rows.append(_spread("null picks, share", found.null_share, found.layers))
    groups = f" in {model.num_groups} groups" if model.num_groups > 1 else ""
    notes = [] if trace.meta.is_complete else ["the run was cut off: this is what it had by then"]
    rows_each = trace.meta.num_tokens * model.top_k / model.num_experts
    if rows_each < FEW_ROWS:
        notes.append(
            f"{rows_each:.3g} rows an expert are few: without any preference, too, the busiest of "
            f"{model.num_experts} would have {busiest_by_chance(trace):.2f} times the mean"
        )
    return Table(
        f"{model.name}: {len(found.layers)} layers of {model.num_experts} experts{groups}, "
        f"{model.top_k} picks, {trace.meta.num_tokens:,} tokens",
        ("over layers", "least", "median", "most", "most at layer"),
        rows,
        notes,
    )


def busiest_by_chance(trace: Trace, draws: int = 512) -> float:
    """Rows of a layer's busiest expert over the mean if every expert were as likely a pick."""
    model, tokens = trace.meta.model, trace.meta.num_tokens
    share = model.top_k / model.num_experts
    rows_SE = np.random.default_rng(0).binomial(tokens, share, (draws, model.num_experts))
    return float(rows_SE.max(1).mean() / (tokens * share))


def _spread(name: str, value_L: np.ndarray, layers: Sequence[int]) -> tuple[object, ...]:
    exact = value_L.dtype.kind in "iu"
    low, middle, high = (
        (int(v) if exact else round(float(v), 4))
        for v in (value_L.min(), np.median(value_L), value_L.max())
    )
    return name, low, middle, high, layers[int(value_L.argmax())]


def mean_distinct(trace: Trace, size_index: int) -> np.ndarray:
    """Mean distinct experts of a batch in every layer [L]; NaN where no batch was full."""
    hist_LB = trace.get("distinct_hist")[size_index]
    total_L = hist_LB.sum(1)
    with np.errstate(invalid="ignore"):
        return (hist_LB @ np.arange(hist_LB.shape[1])) / np.where(total_L, total_L, np.nan)


def device_balance(
    trace: Trace,
    num_devices: int,
    batch_tokens: int,
    placement: Placement | None = None,
) -> BatchBalance:
    """rho, delta and IS of batches, mean over layers; contiguous without a placement."""
    found = []
    for index in range(len(trace.meta.layers)):
        slots_DS = slots_on(trace, index, num_devices, placement)
        counts_NE = _drawn(trace, index, batch_tokens)
        found.append(balance_of(counts_NE, slots_DS, batch_tokens=batch_tokens))
    return BatchBalance(
        *(float(np.mean([getattr(one, n) for one in found])) for n in ("rho", "delta", "imbalance"))
    )


def whole_rho(
    trace: Trace, num_devices: int, placement: Placement | None = None
) -> tuple[float, float]:
    """Rho over all tokens of the trace: mean and worst over layers."""
    experts = trace.meta.model.num_experts
    plain = np.arange(experts) * num_devices // experts
    found = []
    for index, layer in enumerate(trace.meta.layers):
        if placement is None:
            rows_D = np.bincount(plain, weights=trace.count[index], minlength=num_devices)
            found.append(balance.rho(rows_D))
        else:
            found += [one.rho for one in placement.layers if one.layer == layer]
    return float(np.mean(found)), float(np.max(found))


def worst_layer(trace: Trace, num_devices: int) -> tuple[int, np.ndarray]:
    """Position of the layer with the largest contiguous rho, and its rows of every device [D]."""
    experts = trace.meta.model.num_experts
    plain = np.arange(experts) * num_devices // experts
    rows = [np.bincount(plain, weights=row_E, minlength=num_devices) for row_E in trace.count]
    worst = int(np.argmax([balance.rho(rows_D) for rows_D in rows]))
    return worst, rows[worst]


def of_every_device(
    trace: Trace,
    index: int,
    num_devices: int,
    batch_tokens: int,
    placement: Placement | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One layer's rows of every device over all tokens, and its distinct experts in a batch [D]."""
    slots_DS = slots_on(trace, index, num_devices, placement)
    counts_NE = _drawn(trace, index, batch_tokens)
    return device_load(slots_DS, trace.count[index]), by_device(counts_NE, slots_DS)[1].mean(0)


def slots_on(trace: Trace, index: int, num_devices: int, placement: Placement | None) -> np.ndarray:
    """The slots [D, S] of one layer: the placement's, or contiguous ones."""
    if placement is not None:
        return placement.slots_of(trace.meta.layers[index])
    experts = trace.meta.model.num_experts
    return contiguous(Problem(np.ones(experts), num_devices, -(-experts // num_devices)))


def _drawn(trace: Trace, index: int, batch_tokens: int) -> np.ndarray:
    ids_SK = trace.get("sample_ids")[:, index]
    return draw_counts(
        ids_SK, trace.meta.model.num_experts, batch_tokens=batch_tokens, draws=DRAWS, seed=index
    )


def pair_probability(trace: Trace, index: int) -> np.ndarray:
    """Share of all tokens that pick both experts of a pair [E, E]; the diagonal is 0."""
    pair_EE = trace.get("coactivation")[index] / max(1, trace.meta.num_tokens)
    np.fill_diagonal(pair_EE, 0.0)
    return pair_EE


def transition_lift(trace: Trace, index: int) -> np.ndarray:
    """How often j follows i from layer `index` to the next, over independent picks [E, E]."""
    pair_EE = trace.get("transition")[index].astype(np.float64)
    chance_EE = np.outer(pair_EE.sum(1), pair_EE.sum(0)) / max(pair_EE.sum(), 1.0)
    return pair_EE / np.maximum(chance_EE, 1e-12) * (chance_EE > 0)


def transition_recall(trace: Trace, index: int, num_guesses: int) -> float:
    """How many picks of the next layer are among the guesses made from the picks of this one.

    For each expert i of this layer the guesses are the `num_guesses` likeliest experts after it.
    """
    next_EE = trace.get("transition")[index].astype(np.float64)
    if not next_EE.any():
        return 0.0
    best_EG = np.sort(next_EE, axis=1)[:, -num_guesses:]
    return float(best_EG.sum() / next_EE.sum())


def frequency_recall(trace: Trace, index: int, num_guesses: int) -> float:
    """The same when the guesses are the next layer's busiest experts, whatever was picked."""
    next_E = trace.get("transition")[index].sum(0).astype(np.float64)
    return float(np.sort(next_E)[-num_guesses:].sum() / next_E.sum()) if next_E.any() else 0.0


def task_shares(trace: Trace, index: int) -> np.ndarray:
    """Share of a task's tokens that pick each expert [tasks, E]; NaN for a task without tokens."""
    count_UE = trace.get("task_count")[:, index].astype(np.float64)
    picks_U1 = count_UE.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return trace.meta.model.top_k * count_UE / picks_U1


def specialisation(trace: Trace) -> np.ndarray:
    """Mean total variation between the tasks' expert shares and their mean, 0..1, a layer [L].

    0: every task uses the experts alike; 1: no two tasks share an expert.
    """
    found = []
    for index in range(len(trace.meta.layers)):
        share_UE = task_shares(trace, index) / trace.meta.model.top_k
        share_UE = share_UE[~np.isnan(share_UE).any(1)]
        if len(share_UE) < 2:
            found.append(0.0)
            continue
        distance_U = 0.5 * np.abs(share_UE - share_UE.mean(0)).sum(1)
        found.append(float(distance_U.mean() * len(share_UE) / (len(share_UE) - 1)))
    return np.array(found)


def load_distance(first: Trace, second: Trace) -> np.ndarray:
    """Total variation between the expert loads of two traces, 0..1, a layer [L]."""
    a_LE, b_LE = (t.count / np.maximum(t.count.sum(1, keepdims=True), 1) for t in (first, second))
    return 0.5 * np.abs(a_LE - b_LE).sum(1)
