"""Routing in plain torch operators: scores, picks, weights, for every rule of `RouterSpec`.

Decides the numbers. One pick a group is a maximum and more are a stable sort, never `topk`: ties
then go to the lowest id, and servers that replace a router traced as softmax + topk leave it be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mogul.kernels.router_spec import RouterSpec

# C columns (E true experts, then N null ones), G = E / M experts of a group, A = K / M picks.


def route_reference(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [T, K], weights [T, K] and scores [T, E]; see `mogul.kernels.route`."""
    logits_TC, score_TC = _scores(logits, spec)
    ids_TK = _pick(_biased(score_TC, bias), spec)
    return ids_TK, *_weighed(logits_TC, score_TC, ids_TK, spec, scale)


def weigh_picks(
    logits: Tensor, ids_TK: Tensor, spec: RouterSpec, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and scores of picks that are made: the part of routing that has a gradient."""
    return _weighed(*_scores(logits, spec), ids_TK, spec, scale)


def _scores(logits: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Logits and scores of all columns in float32 (float64 stays)."""
    logits_TC = logits if logits.dtype == torch.float64 else logits.float()
    return logits_TC, logits_TC.softmax(-1) if spec.score == "softmax" else logits_TC.sigmoid()


def _weighed(
    logits_TC: Tensor, score_TC: Tensor, ids_TK: Tensor, spec: RouterSpec, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights_TK = _weigh(logits_TC, score_TC, ids_TK, spec)
    if spec.scaling_factor != 1.0:
        weights_TK = weights_TK * spec.scaling_factor
    if scale is not None:
        true_TK = ids_TK.clamp(max=spec.num_experts - 1) if spec.num_null_experts else ids_TK
        weights_TK = weights_TK * scale.reshape(-1).to(weights_TK.dtype)[true_TK]
    return weights_TK, score_TC[:, : spec.num_experts] if spec.num_null_experts else score_TC


def _biased(score_TC: Tensor, bias: Tensor | None) -> Tensor:
    """The selection scores; they carry no gradient."""
    score_TC = score_TC.detach() if score_TC.requires_grad else score_TC
    if bias is None:
        return score_TC
    bias_C = bias.detach().to(score_TC.dtype)
    return score_TC + F.pad(bias_C, (0, score_TC.shape[1] - bias_C.shape[0]))


def _pick(choice_TC: Tensor, spec: RouterSpec) -> Tensor:
    """Ids of the picks, group by group, best first; every null pick is num_experts."""
    if spec.limit_groups is not None:
        return _best(_within_best_groups(choice_TC, spec), spec.top_k)
    group_size = spec.num_experts // spec.num_groups
    true_TE = choice_TC[:, : spec.num_experts] if spec.num_null_experts else choice_TC
    choice_TMG = true_TE.reshape(-1, spec.num_groups, group_size)
    if spec.num_null_experts:
        null_TMN = choice_TC[:, spec.num_experts :].unflatten(1, (spec.num_groups, -1))
        choice_TMG = torch.cat((choice_TMG, null_TMN), dim=2)
    place_TMA = _best(choice_TMG, spec.picks_per_group)
    if spec.num_groups == 1:
        return place_TMA.flatten(1).clamp_(max=spec.num_experts)
    first_M1 = torch.arange(0, spec.num_experts, group_size, device=choice_TC.device)[:, None]
    ids_TMA = place_TMA + first_M1
    if spec.num_null_experts:
        ids_TMA = ids_TMA.masked_fill(place_TMA >= group_size, spec.num_experts)
    return ids_TMA.flatten(1)


def _best(choice: Tensor, count: int) -> Tensor:
    """Places of the `count` largest values of the last axis, the lowest place first in a tie."""
    if count == 1:
        return choice.max(dim=-1, keepdim=True).indices
    return choice.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _within_best_groups(choice_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Minus infinity outside the `limit_groups` groups whose two best scores sum highest."""
    assert spec.limit_groups is not None
    choice_TMG = choice_TE.unflatten(1, (spec.num_groups, -1))
    best_TM = choice_TMG.topk(min(2, choice_TMG.shape[2]), dim=2).values.sum(2)
    kept_TL = _best(best_TM, spec.limit_groups)
    dropped_TM = torch.ones_like(best_TM, dtype=torch.bool).scatter_(1, kept_TL, False)
    return choice_TMG.masked_fill(dropped_TM[:, :, None], float("-inf")).flatten(1)


def _weigh(logits_TC: Tensor, score_TC: Tensor, ids_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Weights before any scale: scores of the picks, or their shares."""
    null_TK = ids_TK == spec.num_experts if spec.num_null_experts else None
    # A null pick gathers from the last column and is masked below.
    if spec.weighting == "probability":
        weights_TK = score_TC.gather(1, ids_TK)
        return weights_TK if null_TK is None else weights_TK.masked_fill(null_TK, 0.0)
    num_pools = spec.num_groups if spec.weighting == "renormalised_in_group" else 1
    if num_pools == spec.top_k and null_TK is None and not logits_TC.requires_grad:
        return torch.ones_like(ids_TK, dtype=logits_TC.dtype)
    return _shares(_log_scores(logits_TC, spec).gather(1, ids_TK), null_TK, num_pools)


def _log_scores(logits_TC: Tensor, spec: RouterSpec) -> Tensor:
    """Logarithms of the scores, up to one constant a token: shares need no more."""
    return logits_TC if spec.score == "softmax" else F.logsigmoid(logits_TC)


def _shares(log_TK: Tensor, null_TK: Tensor | None, num_pools: int) -> Tensor:
    """Score over the sum of scores within each pool, exact where the scores underflow."""
    if null_TK is not None:
        log_TK = log_TK.masked_fill(null_TK, float("-inf"))
    log_TPA = log_TK.unflatten(1, (num_pools, -1))
    finfo = torch.finfo(log_TPA.dtype)
    top_TP1 = log_TPA.detach().amax(dim=2, keepdim=True).clamp(min=finfo.min)
    part_TPA = (log_TPA - top_TP1).exp()
    return (part_TPA / part_TPA.sum(2, keepdim=True).clamp(min=finfo.tiny)).flatten(1)
