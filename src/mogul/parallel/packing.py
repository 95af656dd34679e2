"""A token, its picks and their weights as one row of words: one message in place of three.

Where messages are small their number decides. Only without gradients: words have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = torch.int32
MAX_PACKED_BYTES = 2**22
"""Above this, two copies of the tokens cost more than two more messages."""


def is_worth_packing(x: Tensor, weights: Tensor) -> bool:
    """Whether rows like these should move as one; equal on all ranks, as it reads shapes only."""
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return False
    row_bytes = x.shape[1] * x.element_size()
    return row_bytes % WORD.itemsize == 0 and 0 < x.shape[0] * row_bytes <= MAX_PACKED_BYTES


class PackedRows:
    """Rows of words; remembers how to read them."""

    def __init__(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        if weights.dtype.itemsize < WORD.itemsize:
            weights = weights.float()
        parts = tuple(part.contiguous() for part in (x, weights, ids.to(WORD)))
        words = [part.view(WORD) for part in parts]
        self._kinds = [(part.dtype, row.shape[1]) for part, row in zip(parts, words, strict=True)]
        self.buffer = torch.cat(words, dim=1)

    def unpack(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, ids, weights) of packed rows, which may be more than were packed here."""
        found, first = [], 0
        for dtype, width in self._kinds:
            found.append(buffer[:, first : first + width].contiguous().view(dtype))
            first += width
        x, weights, ids = found
        return x, ids, weights
