"""From logits to tokens: exact, and for every request the same in any company.

Decides the order in which options act (bias, structure, minimum length, penalties; then
temperature, top-k, top-p, min-p, as Transformers does) and how a token is drawn: one uniform number
a row, hashed from the request's seed and position, looked up in the row's cumulated probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from mogul.serve.params import SamplingParams, SamplingRow

BLOCK = 1024
"""Tokens of the vocabulary summed at once when drawing."""

COLDEST = 1e-6
"""Scores divided by less may overflow; at this heat only equal scores share a draw."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Sampled:
    """What one step of sampling gives, all on the logits' device."""

    ids: Tensor
    """Chosen tokens [S], int64."""

    is_valid: Tensor
    """False where a row had no finite logit to choose (NaN, all forbidden) [S]."""

    logprobs: Tensor | None = None
    """The model's own log-probability of each chosen token [S]; None where no row asks."""

    top_ids: Tensor | None = None
    """Likeliest tokens [S, n], n the most that any row asks."""

    top_logprobs: Tensor | None = None


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One number in [0, 1) for each (seed, position): a hash, so no state and no order."""
    with np.errstate(over="ignore"):
        seed = np.asarray(seeds, dtype=np.uint64)
        key = _mix(_mix(seed + _GOLDEN) + _GOLDEN)
        bits = _mix(key + (np.asarray(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class SamplingBatch:
    """The rows of one step; made on the host while the device still computes the logits."""

    rows: tuple[SamplingRow, ...]
    is_greedy: bool
    """All rows greedy, nothing changes any logit: one argmax."""

    is_plain: bool
    """Nothing changes any logit before the temperature."""

    num_logprobs: int | None
    """Most likeliest tokens that any row asks for; None where no row asks."""

    @classmethod
    def build(cls, rows: Sequence[SamplingRow]) -> SamplingBatch:
        """Look once at what the rows ask for."""
        is_plain = not any(_changes_logits(row) for row in rows)
        asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
        return cls(
            rows=tuple(rows),
            is_greedy=is_plain and all(row.params.is_greedy for row in rows),
            is_plain=is_plain,
            num_logprobs=max(asked, default=None),
        )

    def uniform(self, device: torch.device) -> Tensor:
        """One number a row from the rows' own streams, float64 [S]."""
        seeds = [row.seed for row in self.rows]
        return _upload(uniform(seeds, [len(row.output_ids) for row in self.rows]), device)


def _changes_logits(row: SamplingRow) -> bool:
    params = row.params
    return bool(
        params.logit_bias
        or params.has_penalties
        or row.allowed_V is not None
        or len(row.output_ids) < params.min_tokens
    )


class Sampler:
    """Chooses the next token of every row."""

    def sample(self, logits_SV: Tensor, batch: SamplingBatch) -> Sampled:
        """Choose; the logits stay as they are."""
        if batch.is_greedy:
            best_S, ids_S = logits_SV.max(-1)
        else:
            score_SV = self.scores(logits_SV, batch)
            best_S, ids_S = score_SV.max(-1)
            if not all(row.params.is_greedy for row in batch.rows):
                drawn_S = draw(score_SV.softmax(-1), batch.uniform(logits_SV.device))
                greedy = [row.params.is_greedy for row in batch.rows]
                ids_S = torch.where(_upload(np.array(greedy), drawn_S.device), ids_S, drawn_S)
        return with_logprobs(logits_SV, ids_S, best_S.isfinite(), batch.num_logprobs)

    def scores(self, logits_SV: Tensor, batch: SamplingBatch) -> Tensor:
        """Logits of the distributions that are drawn from, fp32; greedy rows stay unscaled."""
        score_SV = logits_SV.float()
        if not batch.is_plain:
            score_SV = change_logits(score_SV.clone(), batch.rows)
        params = [row.params for row in batch.rows]
        return filter_scores(_heat(score_SV, params), params)


def with_logprobs(
    logits_SV: Tensor, ids_S: Tensor, is_valid_S: Tensor, num_logprobs: int | None
) -> Sampled:
    """Add the model's own log-probabilities where they are asked for."""
    if num_logprobs is None:
        return Sampled(ids_S, is_valid_S)
    score_SV = logits_SV.float()
    norm_S1 = score_SV.logsumexp(-1, keepdim=True)
    own_S = (score_SV.gather(1, ids_S[:, None]) - norm_S1)[:, 0]
    if num_logprobs == 0:
        return Sampled(ids_S, is_valid_S, own_S)
    top_Sn, top_ids_Sn = score_SV.topk(min(num_logprobs, score_SV.shape[1]), -1)
    return Sampled(ids_S, is_valid_S, own_S, top_ids_Sn, top_Sn - norm_S1)


def draw(probability_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The token of each row where its cumulated probability passes `uniform` times its sum."""
    num_rows, vocab = probability_SV.shape
    padded = torch.nn.functional.pad(probability_SV, (0, -vocab % BLOCK))
    block_SXB = padded.view(num_rows, -1, BLOCK)
    row = torch.arange(num_rows, device=padded.device)
    block_S, rest_S1 = _pass(block_SXB.sum(-1, dtype=torch.float64), uniform_S[:, None], share=True)
    place_S, _ = _pass(block_SXB[row, block_S].double(), rest_S1, share=False)
    return (block_S * BLOCK + place_S).clamp(max=vocab - 1)  # a row of NaN has no place


def _pass(mass_SX: Tensor, goal_S1: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """Index where the running sum first exceeds the goal, and what of the goal is left there."""
    sum_SX = mass_SX.cumsum(-1)
    if share:
        goal_S1 = goal_S1 * sum_SX[:, -1:]
    # A rounded sum may fall short of the goal: stay below it, so that no empty token is chosen.
    goal_S1 = torch.minimum(goal_S1, sum_SX[:, -1:] * (1 - 2.0**-50))
    index_S1 = torch.searchsorted(sum_SX, goal_S1, right=True).clamp(max=mass_SX.shape[1] - 1)
    before_S1 = sum_SX.gather(1, index_S1) - mass_SX.gather(1, index_S1)
    return index_S1[:, 0], (goal_S1 - before_S1).clamp(min=0)


def change_logits(score_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply bias, structure, minimum length and penalties, in place."""
    _add_biases(score_SV, rows)
    _forbid(score_SV, rows)
    _penalise(score_SV, rows)
    return score_SV


def _add_biases(score_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    found = [
        (s, token, bias)
        for s, row in enumerate(rows)
        for token, bias in row.params.logit_bias.items()
        if token < score_SV.shape[1]
    ]
    if found:
        at_s, at_token, bias = (
            _upload(column, score_SV.device) for column in zip(*found, strict=True)
        )
        score_SV.index_put_((at_s, at_token), bias.float(), accumulate=True)


def _forbid(score_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """What the structure rules out; and the end before its time, unless a structure decides."""
    early = []
    for s, row in enumerate(rows):
        if row.allowed_V is not None:
            allowed_V = row.allowed_V.to(score_SV.device)
            score_SV[s, : len(allowed_V)].masked_fill_(~allowed_V, float("-inf"))
            score_SV[s, len(allowed_V) :] = float("-inf")
        elif len(row.output_ids) < row.params.min_tokens:
            early += [(s, token) for token in row.end_ids if token < score_SV.shape[1]]
    if early:
        at_s, at_token = (_upload(column, score_SV.device) for column in zip(*early, strict=True))
        score_SV[at_s, at_token] = float("-inf")


def _penalise(score_SV: Tensor, rows: Sequence[SamplingRow]) -> None:
    chosen = [s for s, row in enumerate(rows) if row.params.has_penalties]
    if not chosen:
        return
    device, params = score_SV.device, [rows[s].params for s in chosen]
    at_R = _upload(chosen, device)
    part_RV = score_SV[at_R]
    count_RV = _count([rows[s].output_ids for s in chosen], part_RV)
    is_known_RV = (count_RV > 0) | (_count([rows[s].prompt_ids for s in chosen], part_RV) > 0)
    factor_R1 = _column(params, lambda p: p.repetition_penalty, device)
    scaled_RV = torch.where(part_RV < 0, part_RV * factor_R1, part_RV / factor_R1)
    part_RV = torch.where(is_known_RV, scaled_RV, part_RV)
    part_RV -= _column(params, lambda p: p.frequency_penalty, device) * count_RV
    part_RV -= _column(params, lambda p: p.presence_penalty, device) * (count_RV > 0)
    score_SV[at_R] = part_RV


def _count(ids: list[Sequence[int]], like_RV: Tensor) -> Tensor:
    """How often each token stands in each list."""
    num_rows, vocab = like_RV.shape
    padded = np.full((num_rows, max(map(len, ids), default=0)), vocab, dtype=np.int64)
    for row, tokens in zip(padded, ids, strict=True):
        row[: len(tokens)] = tokens
    at_RL = _upload(padded, like_RV.device)
    count = like_RV.new_zeros(num_rows, vocab + 1)
    return count.scatter_add_(1, at_RL, like_RV.new_ones(at_RL.shape))[:, :vocab]


def _heat(score_SV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Divide by the temperatures."""
    if all(one.is_greedy or one.temperature == 1 for one in params):
        return score_SV
    return score_SV / _column(params, _temperature, score_SV.device)


def _temperature(params: SamplingParams) -> float:
    return 1.0 if params.is_greedy else max(params.temperature, COLDEST)


def filter_scores(score_SV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Forbid what top-k, then top-p, then min-p cut off, in the rows that ask for it."""
    chosen = [s for s, one in enumerate(params) if one.has_filters]
    if not chosen:
        return score_SV
    if len(chosen) < len(params):
        at_R = _upload(chosen, score_SV.device)
        part_RV = filter_scores(score_SV[at_R], [params[s] for s in chosen])
        return score_SV.index_copy(0, at_R, part_RV)
    device, vocab = score_SV.device, score_SV.shape[1]
    if any(one.top_k > 0 for one in params):
        most = [min(one.top_k or vocab, vocab) for one in params]
        top_Sk = score_SV.topk(max(most), -1).values
        least_S1 = top_Sk.gather(1, _upload(most, device)[:, None] - 1)
        score_SV = score_SV.masked_fill(score_SV < least_S1, float("-inf"))
    if any(one.top_p < 1 for one in params):
        score_SV = _keep_top_p(score_SV, _column(params, lambda p: p.top_p, device))
    if any(one.min_p > 0 for one in params):
        probability_SV = score_SV.softmax(-1)
        floor_S1 = probability_SV.amax(-1, keepdim=True)
        floor_S1 = floor_S1 * _column(params, lambda p: p.min_p, device)
        score_SV = score_SV.masked_fill(probability_SV < floor_S1, float("-inf"))
    return score_SV


def _keep_top_p(score_SV: Tensor, top_p_S1: Tensor) -> Tensor:
    """Keep a token where those before it, by falling probability, sum to less than top-p."""
    sorted_SV, order_SV = torch.sort(score_SV, dim=-1, descending=True, stable=True)
    probability_SV = sorted_SV.softmax(-1)
    before_SV = probability_SV.cumsum(-1) - probability_SV
    is_cut_SV = (before_SV >= top_p_S1) & (top_p_S1 < 1)
    is_cut_SV[:, 0] = False
    cut = torch.zeros_like(is_cut_SV).scatter_(1, order_SV, is_cut_SV)
    return score_SV.masked_fill(cut, float("-inf"))


def _column(
    params: Sequence[SamplingParams], read: Callable[[SamplingParams], float], device: torch.device
) -> Tensor:
    return _upload(np.array([[read(one)] for one in params], dtype=np.float32), device)


def _upload(values: Sequence[float] | np.ndarray, device: torch.device) -> Tensor:
    """Host numbers to the device without waiting for it."""
    tensor = torch.as_tensor(np.asarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
