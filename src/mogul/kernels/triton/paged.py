"""Paged attention on NVIDIA GPUs: which kernels a call needs and how they are launched.

Decides from shapes alone. Up to `FEW_ROWS` rows (queries times heads of a key head) a sequence is
read by equal shares; longer ones by tiles of queries. A call with both kinds launches both, and
each kernel passes over the sequences of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.paged_call import PagedCall
from mogul.kernels.triton import attention_kernels as kernels
from mogul.kernels.triton import prompt_kernels
from mogul.kernels.triton.launch import (
    INTERPRETED,
    Launch,
    cdiv,
    descriptor,
    next_power_of_2,
)
from mogul.kernels.triton.paged_write import (
    Call,
    Operands,
    call_of,
    operands_of,
    rounded_new,
    write_before,
)
from mogul.kernels.turn import CHUNKS, FEW, FEW_QUERIES, FRESH, SEVERAL

FEW_ROWS = 64
TURNED_INSIDE = 16
"""Sequences up to which one launch norms, rotates, writes and attends: of more, workers would wait
for that at every sequence they come to, so a launch before does it."""


@dataclass(frozen=True)
class FewTile:
    """How key blocks are shared out: block length, workers a multiprocessor, launch."""

    block: int = 64
    per_sm: int = 2
    min_blocks: int = 2
    warps: int = 4
    stages: int = 3
    merge: int = 16


@dataclass(frozen=True)
class ManyTile:
    """Rows (queries times heads) and keys of one tile, launch."""

    rows: int = 64
    block: int = 64
    warps: int = 4
    stages: int = 3


# Measured on an H100 over 1 to 64 sequences of 1,024 to 8,192 keys, see bench_paged_attention.py:
# short work wants long blocks and few partial sums to merge, long work many small blocks in flight.
# Five stages hold two blocks of keys in flight, three or four hold one: measured on an H200 over 8
# to 228 sequences of 1,024 to 2,112 keys.
small_tile = FewTile(block=64, per_sm=2, min_blocks=1, stages=3)
middle_tile = FewTile(block=64, per_sm=3, min_blocks=1, stages=5)
large_tile = FewTile(block=32, per_sm=4, min_blocks=2, stages=5)
MIDDLE_HEADS, MIDDLE_WIDTH = 32, 128
"""Sequences times key heads from which single queries take the middle tile, and its widest head."""
# Numbers of fp8 are turned into fp16 first: two warps share less and so turn more of them a cycle.
# Measured on an H200 and an H100 over 1, 8, 64 and 228 sequences of 2,112 keys; from 17 on an H200,
# where two blocks of keys in flight are worth more than a fifth and sixth program.
fp8_tiles: tuple[tuple[int, FewTile], ...] = (
    (2, FewTile(block=128, per_sm=2, min_blocks=1, warps=4, stages=3)),
    (16, FewTile(block=64, per_sm=4, min_blocks=2, warps=2, stages=3)),
    (1 << 20, FewTile(block=64, per_sm=4, min_blocks=1, warps=2, stages=5)),
)
"""By sequences at most."""

few_tile: FewTile | None = None
"""Used instead of these where set."""

many_tile = ManyTile()
fresh_tile = ManyTile(rows=128, block=128, warps=8, stages=2)


@cache
def _processors(device: int) -> int:
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def tile_of(call: Call, sequences: int, max_queries: int) -> FewTile:
    """How the keys of so many sequences, each of so many queries at most, are shared out."""
    if few_tile is not None:
        return few_tile
    if call.is_fp8:
        return next(tile for most, tile in fp8_tiles if sequences <= most)
    heads = sequences * call.kv_heads
    if 2 * heads >= _processors(call.device):
        return large_tile
    is_middle = heads >= MIDDLE_HEADS and max_queries == 1 and call.width <= MIDDLE_WIDTH
    return middle_tile if is_middle else small_tile


@cache
def _few(call: Call, max_queries: int, writes: bool, tile: FewTile) -> tuple[Launch, Launch, int]:
    """Launches of the shares and of their merge, with the number of workers a key head."""
    workers = max(1, _processors(call.device) * tile.per_sm // call.kv_heads)
    shared = {
        **call.sizes(),
        "MAX_Q": max_queries,
        "BLOCK_L": tile.block,
        "WORKERS": workers,
        "MIN_BLOCKS": tile.min_blocks,
    }
    constants = {
        **shared,
        **call.of_queries(),
        **call.of_new(),
        "Z": call.page_size,
        "ROWS": max(16, next_power_of_2(call.group * max_queries)),
        "SCALE": call.scaling,
        "WRITE": writes,
        "STAGES": tile.stages,
    }
    merge = {**shared, "BLOCK_W": tile.merge, "SINKS": call.has_sinks}
    return (
        Launch(kernels.attend_few, constants, warps=tile.warps, stages=tile.stages, pdl=call.pdl),
        Launch(kernels.merge_few, merge, warps=1, stages=2, pdl=call.pdl),
        workers,
    )


@cache
def _many(call: Call, few: int, tile: ManyTile, apart: bool) -> tuple[Launch, int]:
    """Launch of the tiles, with the queries of a tile."""
    rows = max(tile.rows, 16, next_power_of_2(call.group))
    queries = rows // call.group
    constants = {
        **call.sizes(),
        **call.query_strides(),
        "Z": call.page_size,
        "APART": apart,
        "FEW": few,
        "BLOCK_Q": queries,
        "ROWS": rows,
        "BLOCK_L": tile.block,
        "SCALE": call.scaling,
        "SINKS": call.has_sinks,
        "STAGES": tile.stages,
    }
    launch = Launch(
        prompt_kernels.attend_many, constants, warps=tile.warps, stages=tile.stages, pdl=call.pdl
    )
    return launch, queries


@cache
def _fresh(call: Call, few: int, tile: ManyTile) -> tuple[Launch, int]:
    """The same for sequences without earlier keys, whose new ones are read where they lie."""
    rows = max(tile.rows, 16, next_power_of_2(call.group))
    queries = rows // call.group
    constants = {
        **call.query_strides(),
        **{"S": call.sequences, "N": call.kv_heads, "G": call.group, "C": call.width},
        **{"FEW": few, "BLOCK_Q": queries, "ROWS": rows, "BLOCK_L": tile.block},
        **{"SCALE": call.scaling, "STAGES": tile.stages, "PDL": call.pdl},
    }
    launch = Launch(
        prompt_kernels.attend_fresh, constants, warps=tile.warps, stages=tile.stages, pdl=call.pdl
    )
    return launch, queries


def most_few(group: int) -> int:
    """Queries a sequence up to which its keys are read by shares."""
    return max(1, min(FEW_QUERIES, FEW_ROWS // group))


def paged_attention_triton(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`. Waits for nothing; can be captured."""
    operands = operands_of(given)
    out, kinds, longest = operands.out, given.kinds, given.max_query_len
    if not len(out):
        return out
    call = call_of(given, operands)
    most = most_few(call.group) if kinds & SEVERAL else 1
    turns_many = given.turn is not None and len(given.lengths_S) > TURNED_INSIDE
    writes = longest > most or turns_many
    if writes:
        call, operands = write_before(call, given, operands)
    if longest > most:
        _run_many(call, most, given, operands)
        if not kinds & FEW:
            return out
    _run_few(call, min(longest, most), given, operands, writes=not writes)
    return out


def _run_few(
    call: Call, max_queries: int, given: PagedCall, operands: Operands, *, writes: bool
) -> None:
    tables, starts, lengths = given.tables_SB, given.query_starts, given.lengths_S
    out, scales = operands.out, operands.scales
    num_seqs, rows = len(lengths), call.group * max_queries
    attend, merge, workers = _few(call, max_queries, writes, tile_of(call, num_seqs, max_queries))
    parts = (workers + num_seqs) * call.kv_heads * rows
    acc = torch.empty(parts, call.width, dtype=torch.float32, device=out.device)
    stat = torch.empty(parts, 2, dtype=torch.float32, device=out.device)
    attend(
        (workers, call.kv_heads), call.device, *operands.new, *operands.pages, given.slots_T,
        tables, starts, lengths, *scales, *operands.turns, acc, stat, num_seqs, tables.stride(0),
    )  # fmt: skip
    spots = num_seqs * max_queries
    merge(
        (max(spots, len(out)) if writes else spots, call.kv_heads * call.group), call.device,
        acc, stat, out, starts, lengths, operands.sinks, scales[1], num_seqs, len(out),
    )  # fmt: skip


def _run_many(call: Call, few: int, given: PagedCall, operands: Operands) -> None:
    tables, starts, lengths = given.tables_SB, given.query_starts, given.lengths_S
    query, out, num_seqs = operands.new[0], operands.out, len(lengths)
    apart = bool(given.kinds & FRESH) and _may_read_fresh(call)
    if apart:
        attend, queries = _fresh(call, few, fresh_tile)
        grid = (call.kv_heads, cdiv(len(out), queries) + num_seqs)
        own = rounded_new(call, operands) if call.is_fp8 else operands.new[1:]
        rows = [_as_rows(one, fresh_tile.block) for one in own]
        attend(grid, call.device, query, *rows, out, starts, lengths, num_seqs)
        if not given.kinds & CHUNKS:
            return
    attend, queries = _many(call, few, many_tile, apart)
    attend(
        (call.kv_heads, cdiv(len(out), queries) + num_seqs), call.device, query, *operands.pages,
        out, tables, starts, lengths, operands.sinks, *operands.scales, num_seqs,
        tables.stride(0),
    )  # fmt: skip


def _may_read_fresh(call: Call) -> bool:
    """Whether a prompt's keys and values may be read where they lie, or where they are rounded."""
    heads_apart = {call.strides[3], call.strides[5]}
    return (
        not (call.window or call.has_sinks)
        and (INTERPRETED or call.pdl)  # descriptors came with the same devices
        and call.width == call.width_pow2
        and fresh_bytes(fresh_tile, call.width) <= _shared_bytes(call.device)
        and (call.is_fp8 or heads_apart == {call.width})
    )


def fresh_bytes(tile: ManyTile, width: int) -> int:
    """Shared memory of `attend_fresh`: keys and values of every stage, queries, and some more."""
    return 2 * width * (2 * tile.stages * tile.block + tile.rows) + 1024


@cache
def _shared_bytes(device: int) -> int:
    """Shared memory that a program may have."""
    if INTERPRETED:
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _as_rows(x_TNC: Tensor, block: int) -> Any:
    """Descriptor of [T, N * C], in blocks of one head."""
    tokens, heads, width = x_TNC.shape
    rows = x_TNC.as_strided((tokens, heads * width), (x_TNC.stride(0), 1))
    return descriptor(rows, [block, width])
