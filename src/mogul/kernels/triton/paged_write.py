"""A call of paged attention in a kernel's terms, and the launch that writes its keys and values.

Decides what a compiled kernel depends on, how tensors are brought into its form, and the launch
that norms, rotates and writes: before attention by these kernels or by others (`write_new`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.kernels.paged_call import PagedCall
from mogul.kernels.reference.attention import FP8
from mogul.kernels.triton import attention_kernels as kernels
from mogul.kernels.triton.launch import (
    INTERPRETED,
    Launch,
    aligned,
    cdiv,
    device_index,
    next_power_of_2,
)
from mogul.kernels.turn import Turn

TURNED_HEADS = 16
"""Query heads that one program of the launch that writes norms and rotates."""


@dataclass(frozen=True)
class Call:
    """All of a call that a compiled kernel depends on."""

    device: int
    sequences: int
    """Rounded up to a power of two, so that few numbers of sequences share a compiled kernel."""

    kv_heads: int
    group: int
    width: int
    page_size: int
    window: int
    scaling: float
    is_fp8: bool
    has_sinks: bool
    strides: tuple[int, ...]
    """Token and head strides of query, key, value."""

    dtypes: tuple[torch.dtype | None, ...]
    turns: bool
    """Whether queries and keys are rotated."""

    norms: bool
    eps: tuple[float, float]
    pdl: bool

    @property
    def width_pow2(self) -> int:
        """Columns of a tile."""
        return max(16, next_power_of_2(self.width))

    def shape(self) -> dict[str, Any]:
        """Constants that every kernel of this call takes."""
        return {"N": self.kv_heads, "C": self.width, "FP8": self.is_fp8, "PDL": self.pdl}

    def sizes(self) -> dict[str, Any]:
        """Constants of the two attention kernels and the merge."""
        return {
            **self.shape(),
            "S": self.sequences,
            "G": self.group,
            "C_POW2": self.width_pow2,
            "WINDOW": self.window,
        }

    def query_strides(self) -> dict[str, int]:
        """Strides of the queries."""
        return dict(zip(("Q_T", "Q_H"), self.strides, strict=False))

    def of_queries(self) -> dict[str, Any]:
        """Strides of the queries, and what is done to them."""
        return {**self.query_strides(), **self._turn(), "Q_EPS": self.eps[0]}

    def of_new(self) -> dict[str, Any]:
        """Strides of new keys and values, and what is done to the keys."""
        strides = dict(zip(("K_T", "K_N", "V_T", "V_N"), self.strides[2:], strict=True))
        return {**strides, **self._turn(), "K_EPS": self.eps[1]}

    def _turn(self) -> dict[str, int]:
        return {"TURN": self.turns, "NORM": self.norms}


Turns = tuple[Tensor, Tensor, Tensor, Tensor]
"""Cosines, sines, weights of the queries' and keys' norms."""


class Operands(NamedTuple):
    """Tensors of a call in the kernels' form; anything stands for what is not read."""

    new: tuple[Tensor, Tensor, Tensor]
    """Queries, keys and values."""

    pages: tuple[Tensor, Tensor]
    scales: tuple[Tensor, Tensor]
    turns: Turns
    sinks: Tensor
    out: Tensor


def operands_of(given: PagedCall) -> Operands:
    """The tensors of a call, with room for its output.

    Raises:
        BackendError: pages that the kernels cannot write.
    """
    query, key, value, key_cache, value_cache = given[:5]
    query = with_even_rows(query)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    check_pages(key_cache, value_cache)
    return Operands(
        (query, with_even_rows(key), with_even_rows(value)),
        (key_cache, value_cache),
        _scales_of(given),
        _turn_tensors(given.turn, query),
        out if given.sinks is None else aligned(given.sinks),
        out,
    )


def call_of(given: PagedCall, operands: Operands) -> Call:
    """All of a call that kernels depend on."""
    (query, key, value), turn = operands.new, given.turn
    _, num_kv_heads, width = key.shape
    device, cache = device_index(query), given.key_cache
    sinks = None if given.sinks is None else operands.sinks
    return Call(
        device=device,
        sequences=max(32, next_power_of_2(len(given.lengths_S))),
        kv_heads=num_kv_heads,
        group=query.shape[1] // num_kv_heads,
        width=width,
        page_size=cache.shape[1],
        window=given.sliding_window or 0,
        scaling=float(given.scaling),
        is_fp8=cache.dtype == FP8,
        has_sinks=sinks is not None,
        strides=(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2]),
        dtypes=_dtypes(query, cache, sinks, *(turn or ())[:4]),
        turns=turn is not None,
        norms=turn is not None and turn.query_norm is not None,
        eps=(0.0, 0.0) if turn is None else (turn.query_eps, turn.key_eps),
        pdl=not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0),
    )


def write_new(given: PagedCall) -> tuple[Tensor, Tensor]:
    """Write keys and values into their pages, for attention by other kernels.

    Returns:
        The queries to attend with, and the output, in which rows of padding are 0.
    """
    operands = operands_of(given)
    if not len(operands.out):
        return operands.new[0], operands.out
    call = call_of(given._replace(scaling=1.0, sliding_window=None, sinks=None), operands)
    _, operands = write_before(call, given, operands)
    return operands.new[0], operands.out


def write_before(call: Call, given: PagedCall, operands: Operands) -> tuple[Call, Operands]:
    """Write keys and values; the call that is left to do, and its tensors."""
    out, (_, _, value) = operands.out, operands.new
    tokens, heads, width = out.shape
    ready = out.new_empty((tokens, heads + call.kv_heads, width)) if call.turns else out
    grid = (tokens, 1 + (cdiv(heads, TURNED_HEADS) if call.turns else 0))
    _writer(call)(
        grid, call.device, *operands.new, *operands.pages, given.slots_T, given.query_starts,
        *operands.scales, *operands.turns, ready, out, len(given.lengths_S),
    )  # fmt: skip
    if not call.turns:
        return call, operands
    query, key = ready[:, :heads], ready[:, heads:]
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    call = replace(call, strides=strides, turns=False, norms=False, eps=(0.0, 0.0))
    return call, operands._replace(new=(query, key, value))


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _turn_tensors(turn: Turn | None, like: Tensor) -> Turns:
    """Contiguous."""
    if turn is None:
        return like, like, like, like
    cos, sin, query_norm, key_norm = (like if x is None else aligned(x) for x in turn[:4])
    return cos, sin, query_norm, key_norm


def _scales_of(given: PagedCall) -> tuple[Tensor, Tensor]:
    """A number a key head, of keys and of values; ones where there is none (they are not read)."""
    of_keys, of_values = given.key_scale, given.value_scale
    ones = _ones(given.key_TNC.device, given.key_TNC.shape[1])
    return (
        ones if of_keys is None else of_keys.contiguous(),
        ones if of_values is None else of_values.contiguous(),
    )


@cache
def _writer(call: Call) -> Launch:
    """The launch that writes pages, and norms and rotates where that is asked for."""
    heads = call.kv_heads * call.group
    constants = {
        **call.shape(),
        **call.of_queries(),
        **call.of_new(),
        "N_POW2": next_power_of_2(call.kv_heads),
        "C_POW2": call.width_pow2,
        "H": heads,
        "BLOCK_H": min(TURNED_HEADS, next_power_of_2(heads)),
        "BLOCK_OUT": next_power_of_2(heads * call.width),
    }
    return Launch(kernels.write_pages, constants, warps=4, stages=1, pdl=call.pdl)


def with_even_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous and rows on 16-byte addresses."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in tensor.stride()[:-1])
    return tensor if tensor.stride(-1) == 1 and aligned else tensor.contiguous()


def check_pages(key_cache: Tensor, value_cache: Tensor) -> None:
    """Pages are written in place, so they cannot be copied into shape."""
    for name, pages in (("key_cache", key_cache), ("value_cache", value_cache)):
        if not pages.is_contiguous() or pages.data_ptr() % 16:
            raise BackendError(
                f"{name} with strides {pages.stride()} at address {pages.data_ptr():#x} is not "
                "contiguous on a 16-byte boundary, as the Triton kernels need",
                fix="keep the pages of one layer in one piece",
            )


@cache
def _ones(device: torch.device, heads: int) -> Tensor:
    return torch.ones(heads, device=device)


def rounded_new(call: Call, operands: Operands) -> tuple[Tensor, Tensor]:
    """New keys and values as their fp8 pages give them back, in the dtype of the queries."""
    new = operands.new[1:]
    key, value = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in new)
    _rounder(call)((len(key), 1), call.device, *new, *operands.pages, *operands.scales, key, value)
    return key, value


@cache
def _rounder(call: Call) -> Launch:
    columns = call.kv_heads * call.width
    strides = dict(zip(("K_T", "K_N", "V_T", "V_N"), call.strides[2:], strict=True))
    constants = {"N": call.kv_heads, "C": call.width, "BLOCK": next_power_of_2(columns), **strides}
    constants["PDL"] = call.pdl
    return Launch(kernels.round_new, constants, warps=4, stages=1, pdl=call.pdl)
