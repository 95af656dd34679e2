"""A call of paged attention as its backends get it, after it was checked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mogul.kernels.turn import Turn


class PagedCall(NamedTuple):
    """What `mogul.kernels.paged_attention` was given, in that order; its words say what it is."""

    query_THC: Tensor
    key_TNC: Tensor
    value_TNC: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots_T: Tensor
    tables_SB: Tensor
    query_starts: Tensor
    lengths_S: Tensor
    max_query_len: int
    scaling: float
    sliding_window: int | None
    sinks: Tensor | None
    key_scale: Tensor | None
    """One number a key-value head, as `value_scale`."""

    value_scale: Tensor | None
    turn: Turn | None
    """None where a backend does not turn by itself: it was done before."""

    kinds: int
