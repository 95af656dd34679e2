"""Buffers that a thread keeps from one call to the next.

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

MAX_KEPT_BYTES = 64 * 2**20


class Workspace(threading.local):
    """One flat buffer a name and dtype; a request beyond `MAX_KEPT_BYTES` gets a fresh tensor."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

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


WORKSPACE = Workspace()
