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
    group_of = {layer: torch.from_numpy(g).to(device) for layer, g in groups.items()}
    sums: dict[str, float] = dict.fromkeys(("kept", "mass", "kl", "same", "before", "after"), 0.0)
    num_predicted = num_seen = 0

    def see(picks: Picks) -> None:
        weights = torch.ones_like(picks.ids, dtype=torch.float32)
        weights = weights if picks.weights is None else picks.weights
        shares = kept_of_layer(picks.ids, weights, group_of[picks.layer], num_groups)
        for name, share in zip(("kept", "mass"), shares, strict=True):
            sums[name] += float(share) * len(picks.ids) / len(group_of)

    with progress("comparing with the original") as bar:
        for ids_BL in batches:
            ids = ids_BL.to(device)
            with watch(original, see):
                before_BLV = _log_probabilities(original, ids)
            after_BLV = _log_probabilities(regrouped, ids)
            target_BL = ids[:, 1:]
            predicted = target_BL.numel()
            sums["kl"] += float(F.kl_div(after_BLV, before_BLV, reduction="sum", log_target=True))
            sums["same"] += float((before_BLV.argmax(-1) == after_BLV.argmax(-1)).sum())
            for name, log_BLV in (("before", before_BLV), ("after", after_BLV)):
                sums[name] -= float(log_BLV.gather(-1, target_BL[..., None]).sum())
            num_predicted += predicted
            num_seen += ids.numel()
            bar.advance(ids.numel())
    if not num_predicted:
        raise ConfigError("there is no text to compare the models on", fix="give more data")
    return Agreement(
        num_tokens=num_predicted,
        kept=sums["kept"] / num_seen,
        mass=sums["mass"] / num_seen,
        kl=max(0.0, sums["kl"] / num_predicted),
        same_top1=sums["same"] / num_predicted,
        loss_before=sums["before"] / num_predicted,
        loss_after=sums["after"] / num_predicted,
    )


def _log_probabilities(model: nn.Module, ids_BL: Tensor) -> Tensor:
    output: Any = model(input_ids=ids_BL, use_cache=False)
    return output.logits[:, :-1].float().log_softmax(-1)
