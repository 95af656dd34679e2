"""The record of a sort (see sort_kernels): one int32 buffer, its size and its views."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_COUNTERS = 8


@dataclass(frozen=True)
class Sorted:
    """Slots by expert, see sort_kernels: one int32 buffer and three views of it."""

    order: Tensor
    head: Tensor
    tiles: Tensor
    buffer: Tensor


def sorted_size(slots: int, experts: int) -> int:
    """Length of the int32 buffer behind Sorted, for any row tile of 16 or more."""
    return _padded(slots) + _padded(experts + 2 + _COUNTERS) + 4 * (experts + slots // 16)


def max_tiles(slots: int, experts: int, rows: int) -> int:
    """Most row tiles that `slots` rows over `experts` experts can make."""
    return min(slots, experts) + slots // rows


def _padded(n: int) -> int:
    return (n + 3) // 4 * 4


def sorted_views(buffer: Tensor, slots: int, experts: int) -> Sorted:
    """Views of a buffer of sorted_size."""
    head = _padded(slots)
    tiles = head + _padded(experts + 2 + _COUNTERS)
    return Sorted(buffer, buffer[head:], buffer[tiles:], buffer)
