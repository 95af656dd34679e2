"""Sorts routed slots by expert: the metadata that every grouped kernel reads.

Slot `t * K + k` is pick k of token t.  The result is
`order` [S] the slots sorted by expert (stable, null picks left out),
`head` [E + 10] the first row of each expert, the number of rows, the number of row tiles,
8 zeros (counters),
`tiles` [n, 4] per row tile: expert, first row, end row of the expert, 0.
One launch up to some thousand slots (every program counts all ids itself), three above.
No atomics: the order never depends on timing.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _bins(ids_ptr, slots, num_slots, E: tl.constexpr):
    """Expert of each slot; E for a null pick or a slot past the end."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1)
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit
def _count(bin_S, E: tl.constexpr, BINS: tl.constexpr):
    """Slots of each expert; null picks have no bin."""
    count_E = tl.histogram(bin_S, BINS, mask=bin_S < E)
    return tl.where(tl.arange(0, BINS) < E, count_E, 0)


@triton.jit
def _write_tiles(e, start, count, first_tile, tiles_ptr, BLOCK_T: tl.constexpr):
    num_tiles = tl.cdiv(count, BLOCK_T)
    for base in range(0, num_tiles, 64):
        j = base + tl.arange(0, 64)
        live = j < num_tiles
        entry_ptr = tiles_ptr + (first_tile + j) * 4
        tl.store(entry_ptr, e + j * 0, mask=live)
        tl.store(entry_ptr + 1, start + j * BLOCK_T, mask=live)
        tl.store(entry_ptr + 2, start + count + j * 0, mask=live)


@triton.jit
def _write_expert(
    e, count_E, tiles_ptr, head_ptr, E: tl.constexpr, BINS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Write head and tiles of expert e; return its first row."""
    bins = tl.arange(0, BINS)
    tiles_E = (count_E + BLOCK_T - 1) // BLOCK_T
    start = tl.sum(tl.where(bins < e, count_E, 0))
    first_tile = tl.sum(tl.where(bins < e, tiles_E, 0))
    count = tl.sum(tl.where(bins == e, count_E, 0))
    tl.store(head_ptr + e, start)
    if e == E - 1:
        tl.store(head_ptr + E, start + count)
        tl.store(head_ptr + E + 1, first_tile + tl.cdiv(count, BLOCK_T))
        tl.store(head_ptr + E + 2 + tl.arange(0, 8), tl.zeros((8,), tl.int32))
    _write_tiles(e, start, count, first_tile, tiles_ptr, BLOCK_T)
    return start


@triton.jit(do_not_specialize=["num_slots"])
def sort_in_one(
    ids_ptr, order_ptr, head_ptr, tiles_ptr, num_slots,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e reads every slot, all within one block, and writes the rows of expert e."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0)
    slots = tl.arange(0, BLOCK_S)
    bin_S = _bins(ids_ptr, slots, num_slots, E)
    place = tl.cumsum((bin_S == e).to(tl.int32), 0)
    count_E = _count(bin_S, E, BINS)
    row = _write_expert(e, count_E, tiles_ptr, head_ptr, E, BINS, BLOCK_T)
    tl.store(order_ptr + row + place - 1, slots, mask=bin_S == e)


@triton.jit(do_not_specialize=["num_slots"])
def count_blocks(
    ids_ptr, count_ptr, num_slots, E: tl.constexpr, BINS: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Histogram of each block of slots: count [blocks, BINS]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0)
    bin_S = _bins(ids_ptr, block * BLOCK_S + tl.arange(0, BLOCK_S), num_slots, E)
    tl.store(count_ptr + block * BINS + tl.arange(0, BINS), _count(bin_S, E, BINS))


@triton.jit(do_not_specialize=["num_blocks"])
def scan_blocks(
    count_ptr, before_ptr, total_ptr, num_blocks, BINS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program e: rows of expert e before each block, and in all."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.program_id(0)
    total = 0
    for base in range(0, num_blocks, BLOCK):
        blocks = base + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + blocks * BINS + e, mask=blocks < num_blocks, other=0)
        tl.store(
            before_ptr + blocks * BINS + e,
            total + tl.cumsum(count, 0) - count,
            mask=blocks < num_blocks,
        )
        total += tl.sum(count)
    tl.store(total_ptr + e, total)


@triton.jit(do_not_specialize=["num_slots"])
def place_slots(
    ids_ptr, before_ptr, total_ptr, order_ptr, head_ptr, tiles_ptr, num_slots,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each block sorts its slots by expert within registers and writes them where they belong."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lane = tl.arange(0, BLOCK_S)
    # before the wait: the launch before has waited for whatever wrote the ids
    bin_S = _bins(ids_ptr, block * BLOCK_S + lane, num_slots, E)
    key_S = tl.sort(bin_S * BLOCK_S + lane)  # all differ, so the order is the stable one
    bin_S = key_S // BLOCK_S
    count_E = _count(bin_S, E, BINS)
    start_E = tl.cumsum(count_E, 0) - count_E
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total_E = tl.where(bins < E, tl.load(total_ptr + bins, mask=bins < E, other=0), 0)
    for e in range(block, E, tl.num_programs(0)):
        _write_expert(e, total_E, tiles_ptr, head_ptr, E, BINS, BLOCK_T)
    first_E = tl.cumsum(total_E, 0) - total_E + tl.load(before_ptr + block * BINS + bins)
    row = lane + tl.gather(first_E - start_E, tl.minimum(bin_S, BINS - 1), 0)
    tl.store(order_ptr + row, block * BLOCK_S + key_S % BLOCK_S, mask=bin_S < E)
