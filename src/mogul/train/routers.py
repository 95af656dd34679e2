"""What a router does besides routing while a model trains: count, and pull towards balance.

A router gets a subclass of its own class, so that compiled layers share one graph and checkpoints
stay what they are (the buffers are not saved). Losses enter the gradient through the weights of
the picks, where they are made: right under accumulation, recomputation and pipelines, and nothing
has to leave the layer. `gate` is 1 in a forward and 0 while layers are computed again, so a
micro-batch counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.train.balance_rules import (
    BalanceSection,
    balance_loss,
    scores_of,
    shift_to_mean,
    spread_of,
    warmed,
    z_loss,
)
from mogul.train.narrow import multiplies_wide, router_logits


@dataclass(frozen=True)
class RouterRules:
    """What all routers of a training share."""

    section: BalanceSection
    num_experts: int
    num_groups: int
    score: str
    loss_factor: float
    """Coefficient of one layer in one micro-batch."""
    z_factor: float
    share: float
    """Of a micro-batch in a step; the gradient of the losses is scaled by it."""
    compiled: bool
    """Count by comparison, which fuses, instead of by scattering."""

    @property
    def loss_groups(self) -> int:
        """Groups in which the loss compares experts."""
        return self.num_groups if self.section.loss_per_group else 1


class _Pull(torch.autograd.Function):
    """The weights as they are; in backward the loss gets the gradient `share`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share, ctx.dtype = share, loss.dtype
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, torch.full((), ctx.share, dtype=ctx.dtype, device=grad.device), None


class TrainedRouter:
    """Mixed in before a router's class by `trained_class`."""

    balance_rules: RouterRules
    balance_count: Tensor
    """[E] picks of this step."""
    balance_losses: Tensor
    """[3] sums over micro-batches: auxiliary loss, z-loss, spread of the scores (for a bias)."""
    balance_shift: Tensor
    """[E] sum over micro-batches: how far each bias is from giving the mean load (quantile)."""
    balance_gate: Tensor
    balance_alpha: Tensor
    balance_sample: Tensor
    """[S, K] picks of the last micro-batch's first tokens."""
    balance_length: int
    """Positions a sequence."""
    balance_valid: Tensor | None
    """[T] true at real tokens; None: all."""
    balance_warms: bool
    training: bool
    weight: Tensor

    def product(self, x: Tensor) -> Tensor:
        """Logits in float32, of narrow factors where the device can."""
        if self.training and multiplies_wide(x, self.weight):
            return router_logits(x, self.weight)
        return super().product(x)  # pyright: ignore[reportAttributeAccessIssue]

    def adjust(self, logits: Tensor) -> Tensor:
        """The warm-up, between a router's logits and its choice."""
        if self.balance_warms and self.training:
            return warmed(logits, self.balance_alpha)
        return logits

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The router's own (logits, weights, ids), the weights tied to the losses."""
        routed = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        logits, weights, ids, *rest = routed
        if not self.training:
            return logits, weights, ids, *rest
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, self._pulled(wide, weights, ids), ids, *rest

    def _pulled(self, logits: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        rules, valid = self.balance_rules, self.balance_valid
        section = rules.section
        share = None if valid is None else valid.to(logits.dtype) / valid.sum().clamp(min=1)
        with torch.no_grad():
            is_per_sequence = section.loss == "sequence"
            num_parts = len(ids) // self.balance_length if is_per_sequence else 1
            count = _count(ids, valid, rules, num_parts).to(logits.dtype)
            whole = count.sum(0)
            self.balance_count.add_(whole * self.balance_gate)
            if size := len(self.balance_sample):
                self.balance_sample.copy_(ids[:size])
        score = scores_of(logits, rules.num_experts, rules.score, rules.loss_groups)
        mean = _mean(score, share, num_parts, is_per_sequence)
        if section.loss == "global":
            count = self.balance_count[None].to(logits.dtype)
        loss = balance_loss(count.detach(), mean, rules.loss_groups)
        z = z_loss(logits, share)
        with torch.no_grad():
            spread = torch.zeros_like(z)
            if section.bias == "quantile":
                self.balance_shift.add_(self._shift(logits, ids) * self.balance_gate)
            elif section.bias != "none":
                spread = spread_of(logits, rules.num_experts, rules.score)
            seen = torch.stack([loss.detach(), z.detach(), spread])
            self.balance_losses.add_(seen * self.balance_gate)
        if not (rules.loss_factor or rules.z_factor):
            return weights
        pull = rules.loss_factor * loss + rules.z_factor * z
        return _Pull.apply(weights, pull, rules.share)  # pyright: ignore[reportReturnType]

    def _shift(self, logits: Tensor, ids: Tensor) -> Tensor:
        rules = self.balance_rules
        bias: Tensor = self.e_score_correction_bias  # pyright: ignore[reportAttributeAccessIssue]
        score = logits.softmax(-1) if rules.score == "softmax" else logits.sigmoid()
        choice = score + F.pad(bias, (0, score.shape[1] - len(bias)))
        valid, groups = self.balance_valid, rules.num_groups
        return shift_to_mean(choice.detach(), ids, valid, groups, rules.num_experts)


def _count(ids: Tensor, valid: Tensor | None, rules: RouterRules, parts: int) -> Tensor:
    """Picks of every expert, [parts, E]; ids outside 0..E-1 and padding count nothing."""
    experts = rules.num_experts
    if valid is not None:
        ids = ids.where(valid[:, None], experts)
    if rules.compiled:
        column = torch.arange(experts, device=ids.device)
        return (ids.reshape(parts, -1, 1) == column).sum(1, dtype=torch.int32)
    is_real = (ids >= 0) & (ids < experts)
    place = ids.where(is_real, experts).reshape(parts, -1)
    zeros = torch.zeros(parts, experts + 1, dtype=torch.int64, device=ids.device)
    return zeros.scatter_add_(1, place, torch.ones_like(place))[:, :experts]


def _mean(score: Tensor, share: Tensor | None, parts: int, per_part: bool) -> Tensor:
    """Mean score over the tokens of each part, [parts, E]."""
    if per_part and share is not None:
        split = share.unflatten(0, (parts, -1))
        split = split / split.sum(1, keepdim=True).clamp(min=1e-30)
        return (score.unflatten(0, (parts, -1)) * split[..., None]).sum(1)
    if share is not None:
        return (score * share[:, None]).sum(0, keepdim=True)
    return score.unflatten(0, (parts, -1)).mean(1)


@cache
def trained_class(base: type[nn.Module]) -> type[nn.Module]:
    """The training form of a router class, under the same name."""
    return type(base.__name__, (TrainedRouter, base), {"__module__": base.__module__})


def undress(router: Any) -> None:
    """Give a router in training form its own class back, and forget what the training kept."""
    if not isinstance(router, TrainedRouter):
        return
    router.__class__ = type(router).__mro__[2]
    module: nn.Module = router  # pyright: ignore[reportAssignmentType]
    for name in [*vars(module), *dict(module.named_buffers(recurse=False))]:
        if name.startswith("balance_"):
            delattr(router, name)
