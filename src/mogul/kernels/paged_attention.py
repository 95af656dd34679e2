"""The door of paged attention: one opaque operator that writes keys and values and attends.

Decides what a legal call is and which backend serves it. For torch.compile and for captured graphs
it is a single operator that changes the two caches; nothing in it depends on the numbers inside
slots, tables, starts and lengths, so a captured call is replayed with new ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.registry import Registry, warn_of_reference
from mogul.kernels.cpu import why_not_cpu
from mogul.kernels.cpu.attention import paged_attention_cpu
from mogul.kernels.paged_call import PagedCall
from mogul.kernels.reference.attention import FP8, paged_attention_reference
from mogul.kernels.triton.attention import (
    paged_attention_flashinfer,
    paged_attention_triton,
    why_not_flashinfer,
    why_not_triton_attention,
)
from mogul.kernels.turn import ALL_KINDS, Turn, check_turn, turned


class PagedAttention(Protocol):
    """What a backend must accept: a checked call."""

    def __call__(self, given: PagedCall, /) -> Tensor:
        """Write, then attend."""
        ...


class AttentionFacts(NamedTuple):
    """What a backend's `why_not(**facts)` is told of a call."""

    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_width: int
    page_size: int


PAGED_ATTENTION: Registry[PagedAttention] = Registry("paged_attention", on_choice=warn_of_reference)
PAGED_ATTENTION.add("triton", paged_attention_triton, why_not=why_not_triton_attention)
PAGED_ATTENTION.add("cpu", paged_attention_cpu, why_not=why_not_cpu)
PAGED_ATTENTION.add("reference", paged_attention_reference)
# Behind the reference, which can always run: only who names it gets it.
PAGED_ATTENTION.add("flashinfer", paged_attention_flashinfer, why_not=why_not_flashinfer)

TURNS = ["triton", "flashinfer"]
"""Backends that norm and rotate by themselves, and look at the kinds of sequences; for others it
is done before, and their kernels serve all kinds."""


def paged_attention(
    query_THC: Float[Tensor, "T H C"],
    key_TNC: Float[Tensor, "T N C"],
    value_TNC: Float[Tensor, "T N C"],
    key_cache: Float[Tensor, "P Z N C"],
    value_cache: Float[Tensor, "P Z N C"],
    *,
    slots_T: Int[Tensor, " T"],
    tables_SB: Int[Tensor, "S B"],
    query_starts: Int[Tensor, " S+1"],
    lengths_S: Int[Tensor, " S"],
    max_query_len: int,
    scaling: float,
    sliding_window: int | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    turn: Turn | None = None,
    kinds: int = ALL_KINDS,
    backend: str = "auto",
) -> Float[Tensor, "T H C"]:
    """Write the keys and values of new tokens into pages; attend causally over the pages.

    The queries of a sequence are its last positions: query i of Q stands at `lengths - Q + i`.
    Tokens from `query_starts[-1]` on are padding: not written, output 0. Sequences without queries
    (two equal starts) are legal, and their lengths are not read.

    Args:
        query_THC: queries of all sequences, one sequence after the other.
        key_TNC: keys of the same tokens, positions already rotated in.
        value_TNC: their values.
        key_cache: P pages of Z tokens; changed in place. float8_e4m3fn holds key / key_scale.
        value_cache: the same for values.
        slots_T: where each new token goes, page * Z + offset (int64); -1 writes nothing.
        tables_SB: pages of every sequence in order (int32); what lies behind its end is not read.
        query_starts: first query of every sequence, then the end of the last (int32).
        lengths_S: keys of every sequence, the new ones counted (int32).
        max_query_len: no sequence has more queries. Decides shapes, so it is a plain number.
        scaling: factor of the scores.
        sliding_window: positions a query sees, itself counted; None sees all.
        sinks: one logit a head that takes weight and gives no value.
        key_scale: of an fp8 cache: one number, or one a key-value head (fp32).
        value_scale: the same for values.
        turn: norms and rotates queries and keys first; None where that has been done.
        kinds: of `kernels.turn`, those of the sequences; more than there are cost a little time.
        backend: a name of `PAGED_ATTENTION`, or "auto" for the most preferred that can run.

    Raises:
        ConfigError: shapes or dtypes that do not belong together.
        BackendError: the forced backend cannot run this call, with the reason.
    """
    return torch.ops.mogul.paged_attention(
        query_THC,
        key_TNC,
        value_TNC,
        key_cache,
        value_cache,
        slots_T,
        tables_SB,
        query_starts,
        lengths_S,
        max_query_len,
        scaling,
        sliding_window,
        sinks,
        key_scale,
        value_scale,
        *(turn or NO_TURN)[:4],
        [] if turn is None else [float(number) for number in turn[4:]],
        kinds,
        backend,
    )


NO_TURN = (None, None, None, None)


def _run(*args: Any) -> Tensor:
    """The operator: what stands in its schema, one after the other."""
    *turning, eps, kinds, backend = args[15:]
    turn = None
    if turning[0] is not None:
        turn = Turn._make((*turning, *eps))
    call = PagedCall._make((*args[:15], turn, kinds))
    facts = _check_call(call)
    _check_tables(call)
    _check_options(call, facts)
    name, run = PAGED_ATTENTION.resolve(backend, facts)
    if call.key_scale is not None or call.value_scale is not None:
        key_scale = _scale("key_scale", call.key_scale, facts)
        value_scale = _scale("value_scale", call.value_scale, facts)
        call = call._replace(key_scale=key_scale, value_scale=value_scale)
    if turn is not None and name not in TURNS:
        query = turned(call.query_THC, turn, turn.query_norm, turn.query_eps)
        key = turned(call.key_TNC, turn, turn.key_norm, turn.key_eps)
        call = call._replace(query_THC=query, key_TNC=key, turn=None)
    return run(call)


def _check_options(call: PagedCall, facts: AttentionFacts) -> None:
    window, sinks = call.sliding_window, call.sinks
    if window is not None and window < 1:
        raise ConfigError(f"sliding_window {window} sees nothing", fix="None sees all")
    if sinks is not None and sinks.shape != (facts.num_heads,):
        raise ConfigError(
            f"sinks {tuple(sinks.shape)} are not one a head: [{facts.num_heads}]",
            fix="pass one number a query head, or None",
        )
    if call.turn is not None:
        check_turn(call.turn, len(call.query_THC), facts.head_width)


def _scale(name: str, scale: Tensor | None, facts: AttentionFacts) -> Tensor | None:
    """One number a key-value head, as a view."""
    if scale is None:
        return None
    if facts.cache_dtype != FP8:
        raise ConfigError(
            f"{name} is given, but the cache holds {facts.cache_dtype}, not fp8",
            fix=f"drop {name}, or make the cache float8_e4m3fn",
        )
    if scale.numel() not in (1, facts.num_kv_heads) or scale.dtype != torch.float32:
        raise ConfigError(
            f"{name} {tuple(scale.shape)} of {scale.dtype} is neither one float32 number nor "
            f"one for each of {facts.num_kv_heads} key-value heads",
            fix=f"{name}.float(), of either size",
        )
    return scale.reshape(-1).expand(facts.num_kv_heads)


def _check_call(call: PagedCall) -> AttentionFacts:
    query, key, value, key_cache, value_cache = call[:5]
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ConfigError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} "
            "are not [T, H, C], [T, N, C], [T, N, C]",
            fix="lay the tokens of all sequences in one row; query_starts says where each begins",
        )
    tokens, heads, width = query.shape
    if key.shape[0] != tokens or key.shape[2] != width or heads % max(key.shape[1], 1):
        raise ConfigError(
            f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}",
            fix="give both as many tokens and one head width, and a whole number of query heads "
            "to each key head",
        )
    if key_cache.dim() != 4 or key_cache.shape[2:] != key.shape[1:]:
        raise ConfigError(
            f"key_cache {tuple(key_cache.shape)} is not [P, Z, {key.shape[1]}, {width}]",
            fix="make it for this model: pages, slots of a page, key-value heads, head width",
        )
    if value_cache.shape != key_cache.shape or value_cache.dtype != key_cache.dtype:
        raise ConfigError(
            f"key_cache {tuple(key_cache.shape)} {key_cache.dtype} and value_cache "
            f"{tuple(value_cache.shape)} {value_cache.dtype} differ in shape or dtype",
            fix="make both alike",
        )
    if key_cache.dtype not in (query.dtype, FP8):
        raise ConfigError(
            f"the cache holds {key_cache.dtype}, the queries are {query.dtype}",
            fix="make the cache of the model's dtype, or float8_e4m3fn",
        )
    return AttentionFacts(
        query.device,
        query.dtype,
        key_cache.dtype,
        heads,
        key.shape[1],
        width,
        key_cache.shape[1],
    )


def _check_tables(call: PagedCall) -> None:
    slots, tables, query_starts, lengths = call[5:9]
    tokens, sequences = len(call.query_THC), len(lengths)
    if slots.shape != (tokens,) or slots.dtype != torch.int64:
        raise ConfigError(
            f"slots_T {tuple(slots.shape)} {slots.dtype} is not int64 [{tokens}]",
            fix="pass one slot of the cache for each new token, -1 for one that is not kept",
        )
    if tables.dim() != 2 or len(tables) != sequences or len(query_starts) != sequences + 1:
        raise ConfigError(
            f"tables {tuple(tables.shape)}, query_starts {tuple(query_starts.shape)} and lengths "
            f"{tuple(lengths.shape)} are not of one number of sequences",
            fix="of S sequences pass tables [S, B], query_starts [S + 1] and lengths [S]",
        )
    if not tables.dtype == query_starts.dtype == lengths.dtype == torch.int32:
        raise ConfigError(
            f"tables_SB {tables.dtype}, query_starts {query_starts.dtype} and lengths_S "
            f"{lengths.dtype} must be int32",
            fix="convert them with .int() once, where they are made",
        )


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, "
    "Tensor(b!) value_cache, Tensor slots, Tensor tables, Tensor query_starts, Tensor lengths, "
    "SymInt max_query_len, float scaling, SymInt? sliding_window, Tensor? sinks, "
    "Tensor? key_scale, Tensor? value_scale, Tensor? cos, Tensor? sin, Tensor? query_norm, "
    "Tensor? key_norm, float[] eps, int kinds, str backend) -> Tensor"
)
_LIB.impl("paged_attention", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("mogul::paged_attention", lib=_LIB)
def _(query: Tensor, *_args: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
