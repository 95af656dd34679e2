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
    choice: Float[Tensor, "T C"],
    ids: Int[Tensor, "T K"],
    valid: Tensor | None,
    num_groups: int,
    num_experts: int,
) -> Float[Tensor, " E"]:
    """How far each expert's selection score lies from the one that gives it the mean load.

    `choice` are scores with their bias, of null experts last, `ids` the picks they led to, of the
    tokens that `valid` [T] names (None: all). A token picks an expert once its score passes the
    best that was left out or the worst that was picked; the shift is a quantile over tokens, the
    other experts staying as they are. The mean is that of a group's picks of true experts. 0 where
    nothing can be said.
    """
    stride = max(1, len(ids) // SAMPLED)
    choice_TC, ids = choice[::stride], ids[::stride]
    column_E = torch.arange(num_experts, device=ids.device)
    is_picked_TMJ = (ids[:, :, None] == column_E).any(1).unflatten(1, (num_groups, -1))
    choice_TMJ = choice_TC[:, :num_experts].unflatten(1, (num_groups, -1))
    left_out = choice_TMJ.masked_fill(is_picked_TMJ, float("-inf")).amax(-1, keepdim=True)
    picked = choice_TMJ.masked_fill(~is_picked_TMJ, float("inf")).amin(-1, keepdim=True)
    if choice_TC.shape[1] > num_experts:
        null_TMN = choice_TC[:, num_experts:].unflatten(1, (num_groups, -1))
        null_picks = ids.shape[1] // num_groups - is_picked_TMJ.sum(-1, keepdim=True)
        null_left_out, null_picked = _around(null_TMN, null_picks)
        left_out, picked = left_out.maximum(null_left_out), picked.minimum(null_picked)
    missing_TMJ = torch.where(is_picked_TMJ, left_out, picked) - choice_TMJ
    if valid is not None:
        is_valid_T11 = valid[::stride, None, None]
        missing_TMJ = missing_TMJ.masked_fill(~is_valid_T11, float("inf"))
        is_picked_TMJ = is_picked_TMJ & is_valid_T11
    load_M = is_picked_TMJ.sum((0, 2)) / is_picked_TMJ.shape[2]
    place_M = load_M.round().long().clamp(1, len(ids)) - 1
    place_E = place_M.repeat_interleave(is_picked_TMJ.shape[2])
    shift_E = missing_TMJ.flatten(1).sort(0).values.gather(0, place_E[None])[0]
    return shift_E.where(shift_E.isfinite(), 0.0)


def _around(null: Float[Tensor, "T M N"], picks: Int[Tensor, "T M 1"]) -> tuple[Tensor, Tensor]:
    """The best score of null experts behind so many picks of them, and the worst before; [T, M, 1].

    Infinite where there is none.
    """
    best = F.pad(null.sort(-1, descending=True).values, (0, 1), value=float("-inf"))
    best = F.pad(best, (1, 0), value=float("inf"))
    return best.gather(-1, picks + 1), best.gather(-1, picks)


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
