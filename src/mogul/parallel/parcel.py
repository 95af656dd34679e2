"""Tokens with their picks and weights on their way, as one message where that pays.

Where messages are small their number decides, so rows travel as words: token, weights, picks side
by side. Words have no gradient: with gradients three moves go at once. A token may also travel as
int8 or fp8 with one scale a row (arXiv 2506.12708 sends tokens so); sums always come back in the
model's dtype.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.parallel.move import Begun, Move, begin

Payload = Literal["same", "int8", "fp8"]
WORD = torch.int32
MAX_PACKED_BYTES = 2**22
"""Above this, two copies of the tokens cost more than two more messages."""
LARGEST = {"int8": 127.0, "fp8": 448.0}


class Parcel:
    """Rows begun to move; `end` gives (tokens, ids, weights) where they arrive.

    `packed` must be the same on all ranks, so ask `is_worth_packing` of rows that all have alike.
    """

    def __init__(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        move: Move,
        *,
        packed: bool,
        payload: Payload = "same",
    ) -> None:
        self._kinds: list[tuple[torch.dtype, int]] = []
        self._payload: Payload = payload
        self._dtype = x.dtype
        self._begun: tuple[Begun, ...]
        if payload == "same" and not packed:
            self._begun = begin(x, move), begin(weights, move), begin(ids.to(WORD), move)
            return
        _check_payload(x, weights, payload)
        tokens = [x] if payload == "same" else list(quantise(x, payload))
        wide = weights if weights.dtype.itemsize >= WORD.itemsize else weights.float()
        parts = [part.contiguous() for part in (*tokens, wide, ids.to(WORD))]
        words = [part.view(WORD) for part in parts]
        self._kinds = [(part.dtype, row.shape[1]) for part, row in zip(parts, words, strict=True)]
        self._begun = (begin(torch.cat(words, dim=1), move),)

    def end(self) -> tuple[Tensor, Tensor, Tensor]:
        """Wait, on the stream, and unpack."""
        arrived = [one.end() for one in self._begun]
        if not self._kinds:
            x, weights, ids = arrived
            return x, ids, weights
        found, first = [], 0
        for dtype, width in self._kinds:
            found.append(arrived[0][:, first : first + width].contiguous().view(dtype))
            first += width
        *tokens, weights, ids = found
        x = tokens[0] if self._payload == "same" else restore(tokens[0], tokens[1], self._dtype)
        return x, ids, weights


def _needs_grad(x: Tensor, weights: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)


def is_worth_packing(x: Tensor, weights: Tensor) -> bool:
    """Whether rows like these should move as one message; reads shapes only."""
    if _needs_grad(x, weights):
        return False
    row_bytes = x.shape[1] * x.element_size()
    return row_bytes % WORD.itemsize == 0 and x.shape[0] * row_bytes <= MAX_PACKED_BYTES


def _check_payload(x: Tensor, weights: Tensor, payload: Payload) -> None:
    if payload == "same":
        return
    if _needs_grad(x, weights):
        raise ConfigError(
            f"tokens cannot travel as {payload} where gradients flow",
            fix="train with payload='same'; the option is for inference",
        )
    if x.shape[1] % WORD.itemsize:
        raise ConfigError(f"a row of {x.shape[1]} values as {payload} does not fill whole words")


def quantise(x: Tensor, payload: Payload) -> tuple[Tensor, Tensor]:
    """Values of one byte, and a float32 scale [T, 1] for every row."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST[payload]
    if payload == "int8":
        return (wide / scale).round().to(torch.int8), scale
    return (wide / scale).to(torch.float8_e4m3fn), scale


def restore(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that `quantise` stood for."""
    return (values.float() * scale).to(dtype)
