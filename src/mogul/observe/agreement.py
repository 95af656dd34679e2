"""How far a regrouped model is from the one it came from, on the same tokens.

kept: share of the original's picks that a grouped router can keep, given the original's inputs;
mass: the same weighted by the original's weights. KL is of the next-token distributions, original
against regrouped, in nats a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mogul.core.errors import ConfigError
from mogul.core.log import progress
from mogul.observe.hooks import Picks, watch


@dataclass(frozen=True)
class Agreement:
    """Means over tokens (and layers, where there are layers)."""

    num_tokens: int
    kept: float
    mass: float
    kl: float
    same_top1: float
    """Share of tokens whose likeliest next token is the same."""
    loss_before: float
    loss_after: float
    """Nats a token."""


@torch.no_grad()
def kept_of_layer(
    ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    group_of_expert: Int[Tensor, " E"],
    num_groups: int,
) -> tuple[Tensor, Tensor]:
    """(share of picks, share of weight) that a grouped router keeps, given the same inputs.

    In each group the K/M picks with the largest weights stay.
    """
    quota = ids.shape[1] // num_groups
    is_real = (ids >= 0) & (ids < len(group_of_expert))
    group_TK = group_of_expert[ids.clamp(0, len(group_of_expert) - 1)]
    order_TK = weights.argsort(dim=1, descending=True, stable=True)
    rank_TK = order_TK.argsort(dim=1)
    same_TKK = group_TK[:, :, None] == group_TK[:, None, :]
    before_TK = (same_TKK & (rank_TK[:, None, :] < rank_TK[:, :, None])).sum(2)
    stays_TK = (before_TK < quota) & is_real
    weight_TK = weights.double() * is_real
    return (
        stays_TK.sum() / is_real.sum().clamp_min(1),
        (weight_TK * stays_TK).sum() / weight_TK.sum().clamp_min(1e-30),
    )


class _Sums:
    """Running sums over batches."""

    def __init__(self, groups: Mapping[int, np.ndarray], num_groups: int, device: Any) -> None:
        self.group_of = {layer: torch.from_numpy(g).to(device) for layer, g in groups.items()}
        self.num_groups = num_groups
        self.num_seen = self.num_predicted = 0
        self.kept = self.mass = self.kl = self.same = self.before = self.after = 0.0

    def see(self, picks: Picks) -> None:
        """Count what one layer of the original would keep."""
        weights = torch.ones_like(picks.ids, dtype=torch.float32)
        weights = weights if picks.weights is None else picks.weights
        kept, mass = kept_of_layer(picks.ids, weights, self.group_of[picks.layer], self.num_groups)
        share = len(picks.ids) / len(self.group_of)
        self.kept += float(kept) * share
        self.mass += float(mass) * share

    def compare(self, before_BLV: Tensor, after_BLV: Tensor, target_BL: Tensor) -> None:
        """Count how the next-token distributions differ."""
        self.kl += float(F.kl_div(after_BLV, before_BLV, reduction="sum", log_target=True))
        self.same += float((before_BLV.argmax(-1) == after_BLV.argmax(-1)).sum())
        self.before -= float(before_BLV.gather(-1, target_BL[..., None]).sum())
        self.after -= float(after_BLV.gather(-1, target_BL[..., None]).sum())
        self.num_predicted += target_BL.numel()

    def means(self) -> Agreement:
        """The means so far."""
        if not self.num_predicted:
            raise ConfigError("there is no text to compare the models on", fix="give more data")
        return Agreement(
            num_tokens=self.num_predicted,
            kept=self.kept / self.num_seen,
            mass=self.mass / self.num_seen,
            kl=max(0.0, self.kl / self.num_predicted),
            same_top1=self.same / self.num_predicted,
            loss_before=self.before / self.num_predicted,
            loss_after=self.after / self.num_predicted,
        )


@torch.no_grad()
def agreement(
    original: nn.Module,
    regrouped: nn.Module,
    batches: Iterable[Int[Tensor, "B L"]],
    groups: Mapping[int, np.ndarray],
    num_groups: int,
) -> Agreement:
    """Run both models over the same tokens.

    Raises:
        ConfigError: No batch was given.
    """
    device = next(original.parameters()).device
    sums = _Sums(groups, num_groups, device)
    with progress("tokens compared with the original") as bar:
        for ids_BL in batches:
            ids = ids_BL.to(device)
            with watch(original, sums.see):
                before_BLV = _log_probabilities(original, ids)
            sums.num_seen += ids.numel()
            sums.compare(before_BLV, _log_probabilities(regrouped, ids), ids[:, 1:])
            bar.advance(ids.numel())
    return sums.means()


def _log_probabilities(model: nn.Module, ids_BL: Tensor) -> Tensor:
    output: Any = model(input_ids=ids_BL, use_cache=False)
    return output.logits[:, :-1].float().log_softmax(-1)
