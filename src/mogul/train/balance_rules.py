"""The rules that keep experts in even use, as plain functions of scores and counts.

The auxiliary loss is sum_i f_i p_i, f_i the load of expert i over the mean load and p_i its mean
score: 1 at balance. Counts never carry a gradient. The selection bias of the loss-free rules
(arXiv 2408.15664) follows the missing load by steps that are shares of how much an expert's score
differs between tokens: that is what a bias competes with. It is E times smaller for softmax than
for sigmoid, and smaller still for routers that are new; a fixed step would swing there for ever.
The rule `quantile` asks the tokens instead: how far would this bias have to move, all others
staying, for its expert to have the mean load?
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mogul.spec.base import Spec

BiasRule = Literal["none", "sign", "proportional", "decay", "quantile"]
DEFAULT_RATES = {"sign": 0.03, "proportional": 0.1, "decay": 1.0, "quantile": 0.3}
SAMPLED = 4096
"""Tokens of a micro-batch that the quantile rule looks at."""


class BalanceSection(Spec):
    """How experts are kept in even use: a loss, a selection bias, both or neither."""

    loss: Literal["none", "batch", "sequence", "global"] = "batch"
    """Scope of the counts in the auxiliary loss: a micro-batch, each sequence, or all
    micro-batches of the step so far."""

    loss_coef: float = Field(default=0.01, ge=0)
    """Times a loss that is 1 at balance."""

    loss_per_group: bool = False
    """Compare experts with their group only (softmax within the group); False: the scores over
    all experts, as Pangu Pro MoE."""

    bias: BiasRule = "none"
    """Loss-free rule: how the selection bias follows the loads after each step. `quantile`: by a
    share of the way to the mean load, whatever the scores look like. The others step by a share of
    the spread of the scores: `sign` of the missing load, in proportion to it, or the same over
    the root of the step number."""

    bias_rate: float | None = Field(default=None, gt=0)
    """That share; None: 0.3 (quantile), 0.03 (sign), 0.1 (proportional), 1 (decay)."""

    bias_until: float = Field(default=1.0, ge=0, le=1)
    """Share of the training after which the bias stays as it is."""

    z_loss_coef: float = Field(default=0.0, ge=0)
    """Times the mean squared log-sum-exp of the router logits."""

    warmup_steps: int = Field(default=0, ge=0)
    """Routing warm-up: logits go from noise of their own mean and spread to themselves."""

    @property
    def rate(self) -> float:
        """The share of the way, or of the spread of the scores, that one step of the bias goes."""
        return self.bias_rate or DEFAULT_RATES.get(self.bias, 0.0)


def scores_of(
    logits: Float[Tensor, "T C"], num_experts: int, kind: str, num_groups: int
) -> Float[Tensor, "T E"]:
    """Scores that sum to 1 over all columns, or over each of `num_groups` groups of experts."""
    if num_groups > 1:
        pools = logits[:, :num_experts].unflatten(1, (num_groups, -1))
        return _normal(pools, kind).flatten(1) / num_groups
    return _normal(logits, kind)[:, :num_experts]


def spread_of(logits: Float[Tensor, "T C"], num_experts: int, kind: str) -> Float[Tensor, ""]:
    """How much an expert's score differs between tokens, for the step of a selection bias.

    The geometric mean of two measures. The standard deviation of the scores is too large for most
    tokens where a few are sure of their expert; the spread of the logits times the typical slope
    of the score (averaged in logarithms) is too small for the picks, which lie above the typical.
    """
    logits_TE = logits[:, :num_experts]
    if kind == "sigmoid":
        score_TE = logits_TE.sigmoid()
        log_slope = F.logsigmoid(logits_TE) + F.logsigmoid(-logits_TE)
    else:
        log_slope = logits_TE - logits.logsumexp(-1, keepdim=True)
        score_TE = log_slope.exp()
    typical = logits_TE.std(0, correction=0).mean() * log_slope.mean().exp()
    return (score_TE.std(0, correction=0).mean() * typical).sqrt()


def shift_to_mean(
    choice: Float[Tensor, "T E"],
    ids: Int[Tensor, "T K"],
    valid: Tensor | None,
    num_groups: int,
) -> Float[Tensor, " E"]:
    """How far each expert's selection score lies from the one that gives it the mean load.

    `choice` are scores with their bias, `ids` the picks they led to, of the tokens that `valid`
    [T] names (None: all). A token picks an expert once its score passes the best that was left out
    or the worst that was picked; the shift is a quantile over tokens, the other experts staying as
    they are. 0 where nothing can be said.
    """
    stride = max(1, len(ids) // SAMPLED)
    choice_TE, ids = choice[::stride], ids[::stride]
    num_experts = choice_TE.shape[1]
    column_E = torch.arange(num_experts, device=ids.device)
    is_picked_TE = (ids[:, :, None] == column_E).any(1)
    choice_TMJ = choice_TE.unflatten(1, (num_groups, -1))
    is_picked_TMJ = is_picked_TE.unflatten(1, (num_groups, -1))
    left_out = choice_TMJ.masked_fill(is_picked_TMJ, float("-inf")).amax(-1, keepdim=True)
    picked = choice_TMJ.masked_fill(~is_picked_TMJ, float("inf")).amin(-1, keepdim=True)
    missing_TE = (torch.where(is_picked_TMJ, left_out, picked) - choice_TMJ).flatten(1)
    count = torch.full((), float(len(ids)), device=ids.device)
    if valid is not None:
        missing_TE = missing_TE.masked_fill(~valid[::stride, None], float("inf"))
        count = valid[::stride].sum()
    mean_load = (count * (ids.shape[1] / num_experts)).round().long().clamp(1, len(ids))
    shift_E = missing_TE.sort(0).values.index_select(0, mean_load.reshape(1) - 1)[0]
    return shift_E.where(shift_E.isfinite(), 0.0)


def _normal(logits: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return logits.softmax(-1)
    score = logits.sigmoid()
    return score / score.sum(-1, keepdim=True)


def balance_loss(
    count: Float[Tensor, "*B E"], score: Float[Tensor, "*B E"], num_groups: int
) -> Float[Tensor, ""]:
    """Mean over B of sum_i f_i p_i; `score` is the mean over the tokens that `count` counts.

    With groups, each expert is compared with the mean load of its own group.
    """
    load = count.unflatten(-1, (num_groups, -1))
    load = load / load.mean(-1, keepdim=True).clamp(min=1e-30)
    return (load.flatten(-2) * score).sum(-1).mean()


def z_loss(logits: Float[Tensor, "T C"], share: Float[Tensor, " T"] | None) -> Float[Tensor, ""]:
    """Mean (log sum exp)^2 over the tokens (ST-MoE, arXiv 2202.08906)."""
    square = logits.logsumexp(-1).square()
    return square.mean() if share is None else (square * share).sum()


def warmed(logits: Float[Tensor, "T C"], alpha: Float[Tensor, ""]) -> Float[Tensor, "T C"]:
    """Logits x alpha + (1 - alpha) x noise of the same mean and spread (arXiv 2503.05139)."""
    with torch.no_grad():
        noise = torch.randn_like(logits) * logits.std() + logits.mean()
    return alpha * logits + (1 - alpha) * noise


def bias_step(
    count: Int[Tensor, "L E"] | Float[Tensor, "L E"],
    section: BalanceSection,
    *,
    spread: Float[Tensor, " L"],
    shift: Float[Tensor, "L E"],
    num_groups: int,
    update: int,
) -> Float[Tensor, "L E"]:
    """What is added to the selection bias after update number `update` (from 1).

    Each expert is compared with its group; the sum over a group stays what it was.
    """
    if section.bias == "quantile":
        shift_LMJ = shift.unflatten(-1, (num_groups, -1))
        return section.rate * (shift_LMJ - shift_LMJ.mean(-1, keepdim=True)).flatten(-2)
    load = count.to(spread.dtype).unflatten(-1, (num_groups, -1))
    mean = load.mean(-1, keepdim=True)
    lacking = (mean - load) / mean.clamp(min=1.0)
    if section.bias == "sign":
        lacking = lacking.sign()
    elif section.bias == "decay":
        lacking = lacking / update**0.5
    lacking = lacking - lacking.mean(-1, keepdim=True)
    return section.rate * spread[:, None] * lacking.flatten(-2)
