"""What paged attention may be told besides its tensors: a turn of queries and keys, and kinds.

Norm and rotation of queries and keys can be part of attention, which reads both anyway. Decides
what `Turn` means: the numbers of every head are divided by their root mean square and multiplied by
a weight (where one is given), then rotated by the position's cosines and sines, whose halves are
paired as Transformers' `apply_rotary_pos_emb` pairs them. All in fp32, rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mogul.core.errors import ConfigError

FEW, FRESH, CHUNKS, SEVERAL = 1, 2, 4, 8
ALL_KINDS = FEW | FRESH | CHUNKS | SEVERAL
"""Kinds of sequences that a call may hold: of at most `FEW_QUERIES` queries; of more, without
earlier keys or with some; of few queries but not of one. A launch for a kind that is not there can
be left out, and tiles of one query are smaller."""

FEW_QUERIES = 16


class Turn(NamedTuple):
    """What happens to queries [T, H, C] and keys [T, N, C] before they are attended with."""

    cos_TC: Tensor
    sin_TC: Tensor
    query_norm: Tensor | None = None
    """Weight [C] of the queries' norm; None norms nothing."""

    key_norm: Tensor | None = None
    query_eps: float = 0.0
    key_eps: float = 0.0


def check_turn(turn: Turn, tokens: int, width: int) -> None:
    """Refuse tensors that do not belong together."""
    if turn.cos_TC.shape != (tokens, width) or turn.sin_TC.shape != (tokens, width) or width % 2:
        raise ConfigError(
            f"cos {tuple(turn.cos_TC.shape)} and sin {tuple(turn.sin_TC.shape)} are not both "
            f"[{tokens}, {width}], of an even width",
            fix="pass the rotation of the whole head, one row a token; Transformers' [1, T, C] "
            "loses its first axis",
        )
    if (turn.query_norm is None) != (turn.key_norm is None):
        raise ConfigError(
            "queries and keys are normed both or not at all",
            fix="pass query_norm and key_norm, or neither and norm before the call",
        )
    for norm in (turn.query_norm, turn.key_norm):
        if norm is not None and norm.shape != (width,):
            raise ConfigError(
                f"a norm's weight {tuple(norm.shape)} is not [{width}]",
                fix="only norms of each head fit here: norm whole rows before the call",
            )


def turned(x_THC: Tensor, turn: Turn, norm: Tensor | None, eps: float) -> Tensor:
    """The definition, for one of queries and keys."""
    x = x_THC.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
    left, right = x.chunk(2, -1)
    other = torch.cat((-right, left), -1)
    x = x * turn.cos_TC.float()[:, None] + other * turn.sin_TC.float()[:, None]
    return x.to(x_THC.dtype)
