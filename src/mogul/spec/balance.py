"""What balance means: the only definitions of rho, delta, the imbalance score and MaxVio.

Picks are ids of shape [T, K]; an id outside 0..E-1 is a null pick: a slot without a row, which
counts nowhere. Devices are given by `device_of_expert` [E]. All functions are pure numpy.

* rho: rows on the busiest device over the mean (time where arithmetic decides).
* delta: distinct experts on the busiest device over the mean (time where bytes decide).
* imbalance score IS = (max - min rows) / tokens (arXiv 2505.21411, equation 3).
* MaxVio: rows of the busiest expert over the mean, minus 1 (arXiv 2408.15664).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Num

from mogul.core.errors import ConfigError
from mogul.spec.grouping import Grouping


def rows_per_expert(ids: Int[np.ndarray, "T K"], num_experts: int) -> Int[np.ndarray, " E"]:
    """Rows every expert computes."""
    flat = np.asarray(ids).ravel()
    return np.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts)


def rows_per_device(
    ids: Int[np.ndarray, "T K"], device_of_expert: Int[np.ndarray, " E"], num_devices: int
) -> Int[np.ndarray, " D"]:
    """Rows every device computes."""
    rows_E = rows_per_expert(ids, len(device_of_expert))
    return _sum_by_device(rows_E, device_of_expert, num_devices)


def distinct_per_device(
    ids: Int[np.ndarray, "T K"], device_of_expert: Int[np.ndarray, " E"], num_devices: int
) -> Int[np.ndarray, " D"]:
    """Distinct experts every device must read."""
    touched_E = rows_per_expert(ids, len(device_of_expert)) > 0
    return _sum_by_device(touched_E, device_of_expert, num_devices)


def _sum_by_device(
    value_E: np.ndarray, device_of_expert: np.ndarray, num_devices: int
) -> np.ndarray:
    device_E = np.asarray(device_of_expert)
    if device_E.size and (device_E.min() < 0 or device_E.max() >= num_devices):
        raise ConfigError(
            f"an expert is placed on device {device_E.max()}, but there are {num_devices} devices",
            fix="give every expert a device in 0..D-1",
        )
    return np.bincount(device_E, weights=value_E, minlength=num_devices).astype(np.int64)


def max_over_mean(load: Num[np.ndarray, " D"]) -> float:
    """The busiest over the mean; 1.0 is perfect balance, and so is no load at all."""
    mean = float(np.mean(load))
    return float(np.max(load)) / mean if mean else 1.0


def rho(rows_D: Num[np.ndarray, " D"]) -> float:
    """Rows on the busiest device over the mean over devices."""
    return max_over_mean(rows_D)


def delta(distinct_D: Num[np.ndarray, " D"]) -> float:
    """Distinct experts on the busiest device over the mean over devices."""
    return max_over_mean(distinct_D)


def imbalance_score(rows_D: Num[np.ndarray, " D"], num_tokens: int) -> float:
    """(max - min rows over devices) / tokens (arXiv 2505.21411, equation 3)."""
    return float(np.max(rows_D) - np.min(rows_D)) / num_tokens if num_tokens else 0.0


def max_violation(rows_E: Num[np.ndarray, " E"]) -> float:
    """Rows of the busiest expert over the mean, minus 1 (arXiv 2408.15664)."""
    return max_over_mean(rows_E) - 1.0


def max_violation_in_groups(rows_E: Num[np.ndarray, " E"], num_groups: int) -> float:
    """The largest MaxVio inside a group: what grouping leaves to balance."""
    return max(max_violation(rows_J) for rows_J in np.asarray(rows_E).reshape(num_groups, -1))


def random_picks(
    grouping: Grouping, num_tokens: int, rng: np.random.Generator
) -> Int[np.ndarray, "T K"]:
    """Uniform picks under a grouping: K/M distinct experts in each group, for every token."""
    g = grouping
    noise_TMJ = rng.random((num_tokens, g.num_groups, g.group_size))
    pick_TMA = np.argpartition(noise_TMJ, g.picks_per_group - 1, axis=-1)[..., : g.picks_per_group]
    first_M1 = np.arange(g.num_groups)[:, None] * g.group_size
    return (pick_TMA + first_M1).reshape(num_tokens, g.top_k)


def monte_carlo_imbalance(
    grouping: Grouping, *, num_tokens: int, num_devices: int, draws: int = 20_000, seed: int = 0
) -> np.ndarray:
    """Imbalance scores of `draws` uniformly routed batches, contiguous placement.

    Devices may be any divisor of the experts: ungrouped routing is what the score is for
    (arXiv 2505.21411, equation 4 and figure 2b).
    """
    experts = grouping.num_experts
    if experts % num_devices:
        raise ConfigError(
            f"{experts} experts cannot be spread over {num_devices} devices in equal numbers",
            fix=f"use a divisor of {experts}",
        )
    rng = np.random.default_rng(seed)
    scores = np.empty(draws)
    block = max(1, 4_000_000 // (num_tokens * experts))
    for first in range(0, draws, block):
        count = min(block, draws - first)
        ids = random_picks(grouping, count * num_tokens, rng).reshape(count, -1)
        device = ids // (experts // num_devices)
        key = device + num_devices * np.arange(count)[:, None]
        rows = np.bincount(key.ravel(), minlength=count * num_devices).reshape(count, num_devices)
        scores[first : first + count] = (rows.max(1) - rows.min(1)) / num_tokens
    return scores
