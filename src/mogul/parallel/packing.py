"""A token, its picks and their weights as one row of bytes: one message in place of three.

Where messages are small their number decides. Only without gradients: bytes have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_PACKED_BYTES = 2**20
"""Above this two copies of the tokens cost more than two more messages."""


def is_worth_packing(x: Tensor, weights: Tensor) -> bool:
    """Whether rows like these should move as one; equal on all ranks, as it reads shapes only."""
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return False
    return 0 < x.numel() * x.element_size() <= MAX_PACKED_BYTES


class PackedRows:
    """Rows of bytes; remembers how to read them. Eight-byte types stay on their boundaries."""

    def __init__(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        parts = (x, weights, ids.int())
        parts = tuple(part.contiguous() for part in parts)
        self._kinds = [(part.dtype, part.shape[1] * part.element_size()) for part in parts]
        rows = [part.view(torch.uint8) for part in parts]
        used = sum(row.shape[1] for row in rows)
        if pad := -used % 16:
            rows.append(rows[0].new_zeros((x.shape[0], pad)))
        self.buffer = torch.cat(rows, dim=1)

    def unpack(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, ids, weights) of packed rows, which may be more than were packed here."""
        found, first = [], 0
        for dtype, width in self._kinds:
            found.append(buffer[:, first : first + width].contiguous().view(dtype))
            first += width
        x, weights, ids = found
        return x, ids, weights
