"""Data to train on: token shards on disk and their order; windows of the shipped text.

`open_stream` is what the training loop reads: batches of token ids from folders that
`mogul data build` wrote, in an order fixed by a seed, with a state to go on from. `windows.py`
is the small in-memory form that the demo and the held-out loss use.
"""

from __future__ import annotations

from mogul.train.data.held_out import held_out_windows
from mogul.train.data.spec import DataSource, DataSpec
from mogul.train.data.stream import TokenStream, open_stream
from mogul.train.data.windows import (
    Corpus,
    Windows,
    batches,
    shipped_text,
    split_by_position,
    token_windows,
)

__all__ = [
    "Corpus",
    "DataSource",
    "DataSpec",
    "TokenStream",
    "Windows",
    "batches",
    "held_out_windows",
    "open_stream",
    "shipped_text",
    "split_by_position",
    "token_windows",
]
