"""From text to batches: which windows a model sees, and in which order.

A document is cut into windows of equal length that never cross its end; the order is a shuffle
fixed by a seed. Every model that is to be compared gets the same batches. The shipped text and
its held-out part (by position in each document) are described in `text/README.md`.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mogul.core.errors import ConfigError

HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and the last part of each, held out."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def split_by_position(document: str, held_out_share: float = HELD_OUT_SHARE) -> tuple[str, str]:
    """Cut a document in two; the second part starts at a line and is at most that share of it."""
    cut = document.find("\n", int(len(document) * (1 - held_out_share)))
    cut = len(document) if cut < 0 else cut + 1
    return document[:cut], document[cut:]


def shipped_text() -> Corpus:
    """The public-domain English text in the package: four works, 1.29 MB."""
    packed = files("mogul.train").joinpath("text/english.txt.xz").read_bytes()
    parts = [split_by_position(text) for text in lzma.decompress(packed).decode().split("\f")]
    return Corpus(tuple(first for first, _ in parts), tuple(last for _, last in parts))


@dataclass(frozen=True)
class Windows:
    """Token windows, and how many bytes of text every token stands for."""

    ids: Int[np.ndarray, "N L"]
    bytes_per_token: Int[np.ndarray, "N L"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Tokens in a window (L)."""
        return self.ids.shape[1]

    def spread(self, count: int) -> Windows:
        """`count` windows evenly spaced over all of them."""
        if not 1 <= count <= len(self):
            raise ConfigError(
                f"{count} windows asked of a text that has {len(self)} of {self.length} tokens",
                fix="ask for fewer or shorter windows",
            )
        chosen = np.linspace(0, len(self) - 1, count).round().astype(int)
        return Windows(self.ids[chosen], self.bytes_per_token[chosen])


def token_windows(documents: Sequence[str], tokenizer: Any, length: int) -> Windows:
    """Cut documents into windows of `length` tokens; the rest at each end is dropped.

    Args:
        documents: Texts; no window crosses from one to the next.
        tokenizer: A fast Transformers tokenizer (it must give character offsets).
        length: Tokens a window (L), at least 2: a loss needs a token and its successor.

    Raises:
        ConfigError: The length is below 2, or no document fills one window.
    """
    if length < 2:
        raise ConfigError(f"a window of {length} tokens has nothing to predict", fix="use >= 2")
    parts = [_encode(text, tokenizer) for text in documents]
    cut = [part[:, : part.shape[1] // length * length].reshape(2, -1, length) for part in parts]
    ids, sizes = np.concatenate(cut, axis=1) if cut else np.empty((2, 0, length), np.int64)
    if not len(ids):
        raise ConfigError(
            f"no document is as long as one window of {length} tokens",
            fix="use shorter windows or more text",
        )
    return Windows(ids, sizes)


def _encode(text: str, tokenizer: Any) -> np.ndarray:
    """Ids and bytes of every token, [2, tokens]."""
    # Long texts warn about the model's context; windows are short.
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = np.asarray([end for _, end in made["offset_mapping"]], dtype=np.int64)
    size_of_char = np.fromiter((len(char.encode()) for char in text), np.int64, len(text))
    bytes_until = np.concatenate([[0], size_of_char.cumsum()])
    sizes = np.diff(bytes_until[ends], prepend=0)
    return np.stack([np.asarray(made["input_ids"], dtype=np.int64), sizes])


def batches(windows: Windows, *, batch_size: int, seed: int) -> Iterator[Int[Tensor, "B L"]]:
    """Yield batches for ever: every pass over the windows in a new order fixed by the seed.

    A rest of fewer than `batch_size` windows waits for the next pass's shuffle.
    """
    if not 1 <= batch_size <= len(windows):
        raise ConfigError(
            f"batches of {batch_size} windows from {len(windows)} windows",
            fix=f"use a batch size from 1 to {len(windows)}",
        )
    # The check above must raise at the call, not at the first batch.
    return _batches(windows, batch_size, seed)


def _batches(windows: Windows, batch_size: int, seed: int) -> Iterator[Tensor]:
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(windows))
        for first in range(0, len(order) - batch_size + 1, batch_size):
            yield torch.from_numpy(windows.ids[order[first : first + batch_size]])
