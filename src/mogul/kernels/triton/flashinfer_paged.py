"""Paged attention by FlashInfer, where an engine or a call asks for it by name.

FlashInfer shares out a step's work on the host, in a plan that its launches read. Decides what such
a plan is made of, where it lies (where a captured step finds it again) and which of FlashInfer's
kernels a step takes. New keys and values are normed, rotated and written by mogul's own launch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.kernels.paged_call import PagedCall
from mogul.kernels.triton.paged_write import write_new
from mogul.kernels.turn import FEW_QUERIES

WORKSPACE_BYTES = 256 << 20
"""Partial results of keys that several programs share; FlashInfer itself says when it is short."""

pdl = False
"""Whether its kernels may start before the one before them has ended."""

prompt_kernels = "auto"
"""FlashInfer's name of the kernels for sequences of many queries: fa2, fa3, or its own choice."""


class Shape(NamedTuple):
    """What a plan depends on besides numbers."""

    num_heads: int
    num_kv_heads: int
    width: int
    window: int | None
    scaling: float
    dtype: torch.dtype
    cache_dtype: torch.dtype


class Listed(NamedTuple):
    """The pages of all sequences one after the other, as FlashInfer reads them."""

    starts: Tensor
    """First query of every sequence, and the end of the last."""

    firsts: Tensor
    """First page of every sequence among all, and the end of the last."""

    lasts_S: Tensor
    """Keys in the last page."""

    lengths_S: Tensor
    pages: Tensor


def listed(numbers: tuple[Tensor, Tensor, Tensor], page_size: int) -> Listed:
    """A step's tables without what lies behind their ends; sequences without queries are empty.

    Raises:
        BackendError: a sequence is longer than its row of the tables.
    """
    starts, lengths_S, tables_SB = numbers
    lengths_S = torch.where(starts[1:] > starts[:-1], lengths_S, 0)
    count_S = (lengths_S + page_size - 1) // page_size
    firsts = torch.zeros_like(starts)
    firsts[1:] = count_S.cumsum(0)
    some_SB = tables_SB[:, : max(count_S.tolist(), default=0)]
    is_read_SB = torch.arange(some_SB.shape[1]) < count_S[:, None]
    lasts_S = lengths_S - (count_S - 1).clamp(min=0) * page_size
    found = Listed(starts, firsts, lasts_S, lengths_S, some_SB[is_read_SB])
    if len(found.pages) != int(firsts[-1]):
        raise BackendError(
            f"a sequence of {int(lengths_S.max())} keys is longer than a row of "
            f"{tables_SB.shape[1]} pages of {page_size}",
            fix="give lengths and tables of one and the same step",
        )
    return found


def fullest(sequences: int, tokens: int, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The step that a captured one must have room for: all its tokens, most in one sequence."""
    starts = torch.arange(sequences + 1, dtype=torch.int32).clamp(max=tokens)
    starts[-1] = tokens
    lengths_S = starts.diff()
    pages = -(-int(lengths_S.max()) // page_size)
    return starts, lengths_S, torch.zeros(sequences, pages, dtype=torch.int32)


class Plans:
    """The plans of one engine's steps, made before each of them."""

    def __init__(self, device: torch.device, page_size: int, sequences: int, pages: int) -> None:
        """Make room for steps of up to so many sequences with so many pages each."""
        self.device, self.page_size = device, page_size
        sizes = (sequences + 1, sequences + 1, sequences, sequences, sequences * pages)
        self._host = Listed(*(torch.zeros(n, dtype=torch.int32).pin_memory() for n in sizes))
        self._there = Listed(*(torch.zeros(n, dtype=torch.int32, device=device) for n in sizes))
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[Hashable, dict[Shape, Any]] = {}
        self._event = torch.Event(device)
        self._is_planned = False
        self._key: Hashable = None
        self._is_long = False
        self._step = self._host

    def begin(
        self,
        numbers: tuple[Tensor, Tensor, Tensor],
        max_query_len: int,
        captured: tuple[Hashable, int] | None = None,
    ) -> None:
        """Plan a step for all layers that attended in one like it.

        Args:
            numbers: starts, lengths and tables of the step, on the host (int32); those of a
                captured step's first time, or without tokens, are not read: the step is being
                captured, and planned for all that it may hold.
            max_query_len: no sequence has more queries.
            captured: name and tokens of a captured step.
        """
        self._is_long = max_query_len > FEW_QUERIES
        self._key = self._is_long if captured is None else captured
        is_known = captured in self._wrappers and int(numbers[0][-1]) > 0
        if captured is not None and not is_known:
            numbers = fullest(len(numbers[1]), captured[1], self.page_size)
        if self._is_planned:
            self._event.synchronize()  # the copies of the step before have read pinned memory
        found = listed(numbers, self.page_size)
        self._step = Listed(*(self._put(*three) for three in zip(found, self._host, strict=True)))
        pages = self._step.pages
        self._there.pages[: len(pages)].copy_(pages, non_blocking=True)
        for shape, wrapper in self._wrappers.setdefault(self._key, {}).items():
            self._plan(shape, wrapper)
        self._mark()

    @staticmethod
    def _put(numbers: Tensor, pinned: Tensor) -> Tensor:
        return pinned[: len(numbers)].copy_(numbers)

    def _mark(self) -> None:
        self._event.record()
        self._is_planned = True

    def attend(
        self, shape: Shape, query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor
    ) -> None:
        """Attend by the plan of the running step; rows of padding stay as they are."""
        total = int(self._step.starts[-1])
        if not total:
            return
        wrappers = self._wrappers[self._key]
        if (wrapper := wrappers.get(shape)) is None:
            if torch.cuda.is_current_stream_capturing():
                raise BackendError(
                    "a step is captured in which attention was not planned",
                    fix="run the step once before it is captured",
                )
            wrapper = wrappers[shape] = self._wrapper()
            self._plan(shape, wrapper)
            self._mark()
        pages = (key_cache, value_cache)
        wrapper.run(query[:total], pages, out=out[:total], enable_pdl=pdl)

    def _wrapper(self) -> Any:
        from flashinfer import (  # pyright: ignore[reportMissingImports]
            BatchPrefillWithPagedKVCacheWrapper,
        )

        backend = prompt_kernels if self._is_long else "fa2"
        if isinstance(self._key, bool):
            return BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=backend)
        sequences = len(self._step.lengths_S)
        return BatchPrefillWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=self._there.starts[: sequences + 1],
            paged_kv_indptr_buf=self._there.firsts[: sequences + 1],
            paged_kv_indices_buf=self._there.pages,
            paged_kv_last_page_len_buf=self._there.lasts_S[:sequences],
            backend=backend,
        )

    def _plan(self, shape: Shape, wrapper: Any) -> None:
        """All numbers lie in pinned memory or on the device: nothing here waits for it."""
        wrapper.plan(
            self._step.starts,
            self._step.firsts,
            self._there.pages[: len(self._step.pages)],
            self._step.lasts_S,
            shape.num_heads,
            shape.num_kv_heads,
            shape.width,
            self.page_size,
            causal=True,
            sm_scale=shape.scaling,
            window_left=-1 if shape.window is None else shape.window - 1,
            q_data_type=shape.dtype,
            kv_data_type=shape.cache_dtype,
            seq_lens=self._step.lengths_S,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let calls inside attend by these plans."""
        global _running
        previous, _running = _running, self
        try:
            yield
        finally:
            _running = previous


_running: Plans | None = None


def paged_attention_flashinfer(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`. Outside of `Plans.running` it waits for the device."""
    if given.sinks is not None:
        raise BackendError("FlashInfer's paged kernels know no sinks", fix='use backend="triton"')
    query, out = write_new(given)
    key_cache = given.key_cache
    shape = Shape(
        query.shape[1],
        key_cache.shape[2],
        key_cache.shape[3],
        given.sliding_window,
        float(given.scaling),
        query.dtype,
        key_cache.dtype,
    )
    if given.key_scale is not None:  # a head's scale belongs to its scores: the queries take it
        query = _times(query, given.key_scale, torch.empty_like(query))
    plans = _running or _alone(given)
    plans.attend(shape, query, key_cache, given.value_cache, out)
    return out if given.value_scale is None else _times(out, given.value_scale, out)


def _times(x_THC: Tensor, scale_N: Tensor, out: Tensor) -> Tensor:
    """Every head times the number of its key head, multiplied in fp32."""
    heads = x_THC.shape[1] // len(scale_N)
    return torch.mul(x_THC, scale_N.repeat_interleave(heads)[:, None], out=out)


def _alone(given: PagedCall) -> Plans:
    """Plans of a call outside an engine, from numbers on the device."""
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(
            "FlashInfer plans on the host, which a captured call cannot wait for",
            fix="plan before with `Plans.begin`, as the engine does",
        )
    starts, lengths = given.query_starts.cpu(), given.lengths_S.cpu()
    tables = given.tables_SB.cpu()
    plans = Plans(given.key_cache.device, given.key_cache.shape[1], *tables.shape)
    plans.begin((starts, lengths, tables), given.max_query_len)
    return plans
