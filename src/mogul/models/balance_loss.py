"""Auxiliary losses of routers, computed from what the router really did.

The balance loss of one layer is sum_i f_i p_i with f_i = E/(K|B|) * (picks of expert i) and p_i
the mean global score of expert i over the batch B (arXiv 2505.21411, section 2.3). It is 1 when
all experts are used alike. The counts come from the recorded ids, so that grouped, biased and
sigmoid routers are treated correctly; padding and null picks do not count. Layers are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def balance_loss(
    logits: Sequence[Float[Tensor, "T E_and_null"]],
    ids: Sequence[Int[Tensor, "T K"]],
    *,
    num_experts: int,
    score: str = "softmax",
    attention_mask: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean over the layers of sum_i f_i p_i; 1 at perfect balance, num_experts / K at collapse.

    Args:
        logits: one tensor a layer; columns beyond `num_experts` are null experts.
        ids: the picks, one tensor a layer; values outside 0..num_experts-1 are no picks.
        num_experts: E.
        score: "softmax", or "sigmoid" whose scores are divided by their sum.
        attention_mask: [B, L], 0 at padding; its last positions are used when it is longer.
    """
    if not logits:
        raise ValueError("the balance loss needs the records of at least one layer; got none")
    valid_T = valid_tokens(attention_mask, len(logits[0]), logits[0].device)
    losses = [
        _layer_loss(logits_TE, ids_TK, num_experts, score, valid_T.to(logits_TE.device))
        for logits_TE, ids_TK in zip(logits, ids, strict=True)
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def z_loss(
    logits: Sequence[Float[Tensor, "T E"]], attention_mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean over layers and tokens of (log sum_i exp logit_i)^2 (ST-MoE, arXiv 2202.08906)."""
    if not logits:
        raise ValueError("the z-loss needs the logits of at least one layer; got none")
    valid_T = valid_tokens(attention_mask, len(logits[0]), logits[0].device)
    losses = [
        _mean(logits_TE.float().logsumexp(-1).square(), valid_T.to(logits_TE.device))
        for logits_TE in logits
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def valid_tokens(
    attention_mask: Tensor | None, num_tokens: int, device: torch.device
) -> Bool[Tensor, " T"]:
    """Which of the flat tokens are no padding; ValueError when the mask cannot say it."""
    if attention_mask is None:
        return torch.ones(num_tokens, dtype=torch.bool, device=device)
    num_sequences = len(attention_mask)
    if attention_mask.ndim != 2 or num_tokens % num_sequences:
        raise ValueError(
            f"a mask of shape {tuple(attention_mask.shape)} does not say which of {num_tokens} "
            "tokens are padding; give one of shape [sequences, positions]"
        )
    length = num_tokens // num_sequences
    return attention_mask[:, -length:].reshape(-1).bool().to(device)


def _layer_loss(
    logits_TE: Tensor, ids_TK: Tensor, num_experts: int, score: str, valid_T: Tensor
) -> Tensor:
    if score == "softmax":
        score_TE = logits_TE.float().softmax(-1)
    else:
        score_TE = logits_TE.float().sigmoid()
        score_TE = score_TE / score_TE.sum(-1, keepdim=True)
    is_pick_TK = (ids_TK >= 0) & (ids_TK < num_experts) & valid_T[:, None]
    spare_TK = ids_TK.where(is_pick_TK, num_experts).flatten()
    count_E = torch.zeros(num_experts + 1, device=logits_TE.device)
    count_E = count_E.index_add(0, spare_TK, torch.ones_like(spare_TK, dtype=count_E.dtype))
    slots = ids_TK.shape[1] * valid_T.sum().clamp(min=1)
    load_E = count_E[:num_experts] * num_experts / slots
    return (load_E * _mean(score_TE[:, :num_experts], valid_T)).sum()


def _mean(values_T: Tensor, valid_T: Tensor) -> Tensor:
    """Mean over the valid tokens, in a form of static shape."""
    share_T = valid_T.to(values_T.dtype) / valid_T.sum().clamp(min=1)
    return torch.einsum("t,t...->...", share_T, values_T)
