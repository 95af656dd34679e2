"""From planned requests to one flat row: what the device needs to know of a step.

All numbers of a step lie in two arenas, one of 64-bit and one of 32-bit integers, filled on the
host and moved in two copies. The layout depends only on the numbers of tokens, sequences and rows,
so a captured graph finds its numbers where it left them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mogul.kernels.turn import ALL_KINDS, CHUNKS, FEW, FEW_QUERIES, FRESH, SEVERAL
from mogul.serve.requests import Live

UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Entry:
    """What one request computes in a step."""

    request: Live
    first: int
    """Position of the first token computed."""

    count: int
    rows: int
    """Logits wanted, of the last tokens."""

    draws: int
    """Tokens drawn, from the last of these rows."""

    drafts: tuple[int, ...] = ()
    """Guessed tokens after the known ones; -1 - n is the id in row n of the last tokens."""

    @property
    def draws_from(self) -> range:
        """Its rows that tokens are drawn from, counted from its first row."""
        return range(self.rows - self.draws, self.rows)


@dataclass(frozen=True)
class Layout:
    """Numbers that decide where everything lies."""

    tokens: int
    sequences: int
    rows: int
    pages: int
    """Columns of the tables."""

    max_query_len: int
    kinds: int = ALL_KINDS
    """Of sequences that may be there (`kernels.turn`); no number lies elsewhere for it."""

    @property
    def wide(self) -> int:
        """64-bit numbers: ids, sources, positions, slots, kept rows."""
        return 4 * self.tokens + self.rows

    @property
    def narrow(self) -> int:
        """32-bit numbers: starts, lengths, tables."""
        return 2 * self.sequences + 1 + self.sequences * self.pages


@dataclass(frozen=True)
class StepInputs:
    """One step's numbers, as views of the arenas on the device."""

    layout: Layout
    ids_T: Tensor
    source_T: Tensor
    """Row of the last step's tokens that gives an id not known on the host; -1 where known."""

    positions_T: Tensor
    slots_T: Tensor
    keep_R: Tensor
    starts: Tensor
    lengths_S: Tensor
    tables_SB: Tensor


def split(layout: Layout, wide: Tensor, narrow: Tensor) -> StepInputs:
    """The views of one layout."""
    t, s, r = layout.tokens, layout.sequences, layout.rows
    ids, source, positions, slots, keep = wide[: layout.wide].split((t, t, t, t, r))
    parts = narrow[: layout.narrow].split((s + 1, s, s * layout.pages))
    table = parts[2].view(s, layout.pages)
    return StepInputs(layout, ids, source, positions, slots, keep, parts[0], parts[1], table)


class Arena:
    """Host and device memory of the numbers of a step, twice: one is filled while one is read."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.is_shared = device.type == "cpu"
        pinned = not self.is_shared
        self._host = [
            (
                torch.zeros(layout.wide, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(layout.narrow, dtype=torch.int32, pin_memory=pinned),
            )
            for _ in range(1 if self.is_shared else 2)
        ]
        self._device = [x if self.is_shared else x.to(device) for x in self._host[0]]
        self._events: list[torch.Event | None] = [None] * len(self._host)
        self._turn = 0

    def views(self, layout: Layout) -> StepInputs:
        """Where a layout's numbers lie on the device."""
        return split(layout, self._device[0], self._device[1])

    def sent(self, layout: Layout) -> StepInputs:
        """The numbers of the step sent last, on the host."""
        return split(layout, *self._host[self._turn])

    def send(
        self, entries: Sequence[Entry], layout: Layout, page_size: int, last_row: dict[int, int]
    ) -> StepInputs:
        """Fill in a step and move it; returns its views, ready in the order of the stream."""
        self._turn = (self._turn + 1) % len(self._host)
        if (event := self._events[self._turn]) is not None:
            event.synchronize()  # the copy that read this half two steps ago
        wide, narrow = self._host[self._turn]
        fill(entries, split(layout, wide, narrow), page_size, last_row)
        if not self.is_shared:
            for host, device, count in zip(
                (wide, narrow), self._device, (layout.wide, layout.narrow), strict=True
            ):
                device[:count].copy_(host[:count], non_blocking=True)
            self._events[self._turn] = event = torch.Event(self._device[0].device)
            event.record()
        return self.views(layout)


def fill(
    entries: Sequence[Entry], views: StepInputs, page_size: int, last_row: dict[int, int]
) -> None:
    """Write a step's numbers through views of host memory; what is left over is padding."""
    live = [entry.request for entry in entries]
    num = len(entries)
    count_S = np.fromiter((e.count for e in entries), np.int64, num)
    first_S = np.fromiter((e.first for e in entries), np.int64, num)
    end_S = np.cumsum(count_S)
    total = int(end_S[-1]) if num else 0
    sequence_T = np.repeat(np.arange(num), count_S)
    position_T = np.arange(total) - np.repeat(end_S - count_S - first_S, count_S)
    tables = views.tables_SB.numpy()
    for row, one in zip(tables, live, strict=False):
        row[:] = one.table[: len(row)]
    tables[num:] = 0
    slots = views.slots_T.numpy()
    page_T = tables[sequence_T, position_T // page_size].astype(np.int64)
    slots[:total] = page_T * page_size + position_T % page_size
    slots[total:] = -1
    positions = views.positions_T.numpy()
    positions[:total], positions[total:] = position_T, 0
    starts, lengths = views.starts.numpy(), views.lengths_S.numpy()
    starts[0], starts[1 : num + 1], starts[num + 1 :] = 0, end_S, total
    lengths[:num], lengths[num:] = first_S + count_S, 0
    _fill_ids(entries, views, last_row)
    rows_S = np.fromiter((e.rows for e in entries), np.int64, num)
    done_S = np.cumsum(rows_S)
    total_rows = int(done_S[-1]) if num else 0
    keep = views.keep_R.numpy()
    keep[:total_rows] = np.arange(total_rows) + np.repeat(end_S - done_S, rows_S)
    keep[total_rows:] = 0


def _fill_ids(entries: Sequence[Entry], views: StepInputs, last_row: dict[int, int]) -> None:
    ids, source = views.ids_T.numpy(), views.source_T.numpy()
    source[:] = UNKNOWN
    at = 0
    for entry in entries:
        one = entry.request
        first, stop = entry.first, entry.first + entry.count - len(entry.drafts)
        known = one.tokens[first:stop]
        ids[at : at + len(known)] = known
        if len(known) < stop - first:  # its last token is still on the device
            ids[at + len(known)] = 0
            source[at + len(known)] = last_row[one.id]
        if entry.drafts:
            guess_K = np.array(entry.drafts)
            ids[at + stop - first : at + entry.count] = np.maximum(guess_K, 0)
            source[at + stop - first : at + entry.count] = np.maximum(-1 - guess_K, UNKNOWN)
        at += entry.count
    ids[at:] = 0


def layout_of(entries: Sequence[Entry], page_size: int) -> Layout:
    """The tightest layout of a step."""
    longest = max(entry.first + entry.count for entry in entries)
    return Layout(
        tokens=sum(entry.count for entry in entries),
        sequences=len(entries),
        rows=sum(entry.rows for entry in entries),
        pages=-(-longest // page_size),
        max_query_len=max(entry.count for entry in entries),
        kinds=_kinds(entries),
    )


def _kinds(entries: Sequence[Entry]) -> int:
    """Kinds of sequences among these; which are few is the kernels' to say, so some are both."""
    kinds = 0
    for entry in entries:
        if entry.count <= FEW_QUERIES:
            kinds |= FEW
        if entry.count > 1:
            kinds |= FRESH if entry.first == 0 else CHUNKS
            kinds |= SEVERAL if entry.count <= FEW_QUERIES else 0
    return kinds
