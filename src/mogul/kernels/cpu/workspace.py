"""Buffers and views that are kept from one call to the next.

Large tensors come fresh from the system at every call, page by page: the pages of one layer's
buffers took 0.5 of 15 ms (512 tokens, upcycled SmolLM2-135M, two threads). What is taken here is
overwritten by the next call of the same thread, so it never leaves the experts layer and never
enters autograd.
"""

from __future__ import annotations

import threading
import weakref
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mogul.kernels.layout import ExpertLayout

MAX_KEPT_BYTES = 64 * 2**20


class One(NamedTuple):
    """What one token's picks pass: three tensors and the rows of each."""

    hidden_KH: Tensor
    hidden: tuple[Tensor, ...]
    active_KF: Tensor
    active: tuple[Tensor, ...]
    out_KD: Tensor
    out: tuple[Tensor, ...]

    @classmethod
    def make(cls, picks: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> One:
        """Tensors for `picks` picks of experts of these sizes (H columns, F width, D channels)."""
        hidden, active, out = (
            torch.empty(picks, size, dtype=dtype, device="cpu") for size in sizes
        )
        return cls(hidden, hidden.unbind(), active, active.unbind(), out, out.unbind())


class Workspace(threading.local):
    """One flat buffer a name and dtype; a request beyond `MAX_KEPT_BYTES` gets a fresh tensor."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._one: dict[tuple[object, ...], One] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape, in the dtype of `like`."""
        size, key = prod(shape), (name, like.dtype)
        if size * like.element_size() > MAX_KEPT_BYTES:
            return like.new_empty(shape)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # else no later call outside of it could write here
                kept = self._kept[key] = torch.empty(size, dtype=like.dtype, device="cpu")
        return kept[:size].view(shape)

    def take_one(self, picks: int, sizes: tuple[int, int, int], like: Tensor) -> One:
        """The tensors of one token's way; one set of each size is kept."""
        key = (picks, sizes, like.dtype)
        if (kept := self._one.get(key)) is None:
            with torch.inference_mode(False):
                kept = self._one[key] = One.make(picks, sizes, like.dtype)
        return kept


WORKSPACE = Workspace()


class _Kept(NamedTuple):
    """The views of one weight, and what must not have changed since they were made."""

    weight: weakref.ref[Tensor]
    address: int
    lies: tuple[object, ...]
    views: tuple[Tensor, ...]


_matrices: dict[int, _Kept] = {}
"""By the weight's id; an entry leaves with its weight."""


def matrices(weight: Tensor, layout: ExpertLayout) -> tuple[Tensor, ...]:
    """One view [out, in] an expert, made once a weight: sixteen views cost as much as an expert.

    Views of weights whose memory is another since (a model that moved to a device) are let go here:
    they would keep the old memory.
    """
    kept, address = _matrices.get(id(weight)), weight.data_ptr()
    lies = (weight.shape, weight.stride(), weight.dtype, layout.is_transposed)
    if (
        kept is not None
        and kept.weight() is weight
        and kept.address == address
        and kept.lies == lies
    ):
        return kept.views
    for key, other in list(_matrices.items()):
        if (owner := other.weight()) is None or owner.data_ptr() != other.address:
            _matrices.pop(key, None)
    with torch.inference_mode(False):
        plain = weight.detach()
        views = (plain.mT if layout.is_transposed else plain).unbind()
    key = id(weight)
    forget = weakref.ref(weight, lambda _dead: _matrices.pop(key, None))
    _matrices[key] = _Kept(forget, address, lies, views)
    return views
