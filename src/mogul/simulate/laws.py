"""Scaling laws for comparing shapes: only differences count, and outside the fits they say so.

Efficiency leverage (arXiv 2507.17702): how much more compute a dense model needs for the same
loss. The bases of its logarithms (10 for compute, 2 for granularity) and the transform of the
activation ratio are inferred: they reproduce the published facts (EL(3.1 %, 12, 1e22) > 7, best
granularity 8 to 12). Fine-grained law: arXiv 2402.07871, table 1. No law knows groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mogul.simulate.train_plan import flop_per_token
from mogul.spec.model import ModelSpec

LEVERAGE_MAX_FLOP = 1e22
"""Largest compute the leverage was checked at."""


@dataclass(frozen=True)
class Quality:
    """What the laws say of a shape."""

    leverage: float
    """Dense compute over this model's compute at equal loss."""

    equivalent_flop: float
    """leverage x training compute: the number shapes are ranked by."""

    fine_grained_loss: float
    extrapolated: bool


def leverage(activation_ratio: float, granularity: float, flop: float) -> float:
    """EL(A, G, C) of arXiv 2507.17702, equation 13."""
    base = activation_ratio + 1 / (1 / 1.63e-2 - 1 / 5.28e16)
    log_g = math.log2(granularity)
    exponent = 1.23 - 0.0761 * math.log10(flop) + 0.0167 * log_g**2 - 0.117 * log_g
    transformed = 1 / (1 / base + 1 / 5.28e16)
    return transformed**exponent


def fine_grained_loss(active_params: float, tokens: float, granularity: float) -> float:
    """L(N, D, G) of arXiv 2402.07871 at expansion rate 64; N without embeddings."""
    mixed = 2.1 / granularity**0.58 + 18.1
    return 0.47 + mixed / active_params**0.115 + 30.8 / tokens**0.147


def quality(model: ModelSpec, tokens: float) -> Quality:
    """Rank number of a shape trained on `tokens`; a dense model has leverage 1."""
    flop = flop_per_token(model, 4096) * tokens
    active = model.active_params(input_embedding=False)
    if model.moe is None:
        return Quality(1.0, flop, math.nan, flop > LEVERAGE_MAX_FLOP)
    moe = model.moe
    shared = moe.shared_width / moe.expert_width
    ratio = (moe.grouping.top_k + shared) / (moe.grouping.num_experts + shared)
    granularity = 2 * model.hidden_size / moe.expert_width
    gain = leverage(ratio, granularity, flop)
    loss = fine_grained_loss(active, tokens, max(1.0, 4 * model.hidden_size / moe.expert_width))
    return Quality(gain, gain * flop, loss, flop > LEVERAGE_MAX_FLOP)
