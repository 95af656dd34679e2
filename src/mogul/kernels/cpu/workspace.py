"""Buffers and views that are kept from one call to the next.

Large tensors come fresh from the system at every call, page by page: the pages of one layer's
buffers took 0.5 of 15 ms (512 tokens, upcycled SmolLM2-135M, two threads). What is taken here is
overwritten by the next call of the same thread, so it never leaves the experts layer and never
enters autograd.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mogul.kernels.layout import ExpertLayout

MAX_KEPT_BYTES = 64 * 2**20


class Workspace(threading.local):
    """One flat buffer a name and dtype; a request beyond `MAX_KEPT_BYTES` gets a fresh tensor."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._rows: dict[tuple[object, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, in the dtype of `like`."""
        size, key = prod(shape), (name, like.dtype)
        if size * like.element_size() > MAX_KEPT_BYTES:
            return like.new_empty(shape)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # else no later call outside of it could write here
                kept = self._kept[key] = torch.empty(size, dtype=like.dtype)
        return kept[:size].view(shape)

    def take_rows(
        self, name: str, shape: tuple[int, int], like: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A small tensor and its rows as views; one of each name and shape is kept."""
        key = (name, shape, like.dtype)
        if (kept := self._rows.get(key)) is None:
            with torch.inference_mode(False):
                rows = torch.empty(shape, dtype=like.dtype)
                kept = self._rows[key] = (rows, rows.unbind())
        return kept


WORKSPACE = Workspace()

_matrices = WeakTensorKeyDictionary()


def matrices(weight: Tensor, layout: ExpertLayout) -> tuple[Tensor, ...]:
    """One view [out, in] an expert, made once a weight: sixteen views cost as much as an expert."""
    kept = _matrices.get(weight)
    if kept is None or len(kept) != len(weight) or kept[0].data_ptr() != weight.data_ptr():
        with torch.inference_mode(False):
            plain = weight.detach()
            kept = _matrices[weight] = (plain.mT if layout.is_transposed else plain).unbind()
    return kept
