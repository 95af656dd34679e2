"""Sort slots by expert, so that every expert's rows are one contiguous block.

Decides where each slot's row stands. Slots without an expert get none: their place is one past the
last row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows [start, stop) belong to `expert`."""

    expert: int
    start: int
    stop: int


class Order(NamedTuple):
    """R rows, sorted by expert and inside one by token."""

    slot_R: Tensor
    """Flat slot t * K + k of each row."""
    place_TK: Tensor
    """Row of each slot; R for a slot without one."""
    ends_E: Tensor
    """One past each expert's last row, int32."""
    blocks: list[Block]
    """The experts that have rows, ascending."""

    @property
    def num_rows(self) -> int:
        """R."""
        return self.slot_R.shape[0]

    @property
    def is_full(self) -> bool:
        """Every slot has a row."""
        return self.num_rows == self.place_TK.numel()

    def token_R(self) -> Tensor:
        """Token of each row."""
        return self.slot_R.div(self.place_TK.shape[1], rounding_mode="floor")

    def chunks(self, num_rows: int) -> Iterator[list[Block]]:
        """Consecutive blocks of at most `num_rows` rows together, but one block at least."""
        chunk: list[Block] = []
        for block in self.blocks:
            if chunk and block.stop - chunk[0].start > num_rows:
                yield chunk
                chunk = []
            chunk.append(block)
        if chunk:
            yield chunk


def order_by_expert(ids_TK: Tensor, num_experts: int) -> Order:
    """Stable order of all slots whose id is in 0..num_experts-1."""
    id_S, slot_S = ids_TK.reshape(-1).sort(stable=True)
    # Ids below 0 come first and ids from E on last.
    edge_E1 = torch.searchsorted(id_S, torch.arange(num_experts + 1, device="cpu"))
    edges = edge_E1.tolist()
    first, num_rows = edges[0], edges[-1] - edges[0]
    blocks = [
        Block(expert, start - first, stop - first)
        for expert, (start, stop) in enumerate(pairwise(edges))
        if start < stop
    ]
    slot_R = slot_S[first : first + num_rows]
    place_S = torch.full_like(slot_S, num_rows)
    place_S[slot_R] = torch.arange(num_rows, device="cpu")
    ends_E = (edge_E1[1:] - first).to(torch.int32)
    return Order(slot_R, place_S.view(ids_TK.shape), ends_E, blocks)
