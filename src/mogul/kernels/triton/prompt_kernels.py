"""Kernels of paged attention for many queries a sequence: prompts, with and without earlier keys.

A program takes a tile of queries of one sequence, all query heads of a key head together.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.attention_kernels import LOG2E, NEVER, absorb, key_block


@triton.jit
def tile_of(
    starts_ptr, lengths_ptr, num_seqs, back,
    S: tl.constexpr, FEW: tl.constexpr, BLOCK_Q: tl.constexpr, FRESH: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Sequence and tile of a program that is `back` tiles before the last one; -1: there is none.

    The last tiles of a sequence see most, so they go first. FRESH: of sequences without earlier
    keys; APART: of those with such.
    """
    all_s = tl.arange(0, S)
    begin = tl.load(starts_ptr + all_s, mask=all_s < num_seqs, other=0)
    many = tl.load(starts_ptr + all_s + 1, mask=all_s < num_seqs, other=0) - begin
    mine = many > FEW
    if FRESH or APART:
        length = tl.load(lengths_ptr + all_s, mask=all_s < num_seqs, other=0)
        mine &= (length == many) if FRESH else (length != many)
    tiles = tl.where(mine, (many + BLOCK_Q - 1) // BLOCK_Q, 0)
    ends = tl.cumsum(tiles)
    t = tl.sum(tiles) - 1 - back
    s = tl.sum((ends <= t).to(tl.int32))
    return tl.where(t >= 0, s, -1), t - tl.sum(tl.where(all_s == s, ends - tiles, 0))


@triton.jit(do_not_specialize=["num_seqs"])
def attend_fresh(
    q_ptr, key_desc, value_desc, out_ptr, starts_ptr, lengths_ptr, num_seqs,
    S: tl.constexpr, N: tl.constexpr, G: tl.constexpr, C: tl.constexpr, FEW: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr, SCALE: tl.constexpr,
    Q_T: tl.constexpr, Q_H: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of queries of a sequence without earlier keys: its new ones are read as they came."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0)
    s, tile = tile_of(
        starts_ptr, lengths_ptr, num_seqs, tl.program_id(1), S, FEW, BLOCK_Q, True, True
    )
    if s >= 0:
        start = tl.load(starts_ptr + s)
        length = tl.load(starts_ptr + s + 1) - start
        c = tl.arange(0, C)
        r = tl.arange(0, ROWS)
        at = tile * BLOCK_Q + r // G
        live = (at < length) & (r < BLOCK_Q * G)
        row = (start + at).to(tl.int64)
        head = n * G + r % G
        keep = live[:, None]
        q = tl.load(q_ptr + (row * Q_T + head * Q_H)[:, None] + c[None, :], mask=keep, other=0.0)
        acc = tl.zeros((ROWS, C), tl.float32)
        peak = tl.full((ROWS,), NEVER, tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        lowest = tile * BLOCK_Q
        high = (tl.minimum(lowest + BLOCK_Q, length) + BLOCK_L - 1) // BLOCK_L
        whole = (lowest + 1) // BLOCK_L  # every row of the tile sees all of these blocks
        for j in tl.range(0, whole, num_stages=STAGES):
            k = key_desc.load([start + j * BLOCK_L, n * C])
            v = value_desc.load([start + j * BLOCK_L, n * C])
            acc, peak, norm = absorb(
                q, k, v, acc, peak, norm, at, at, length, SCALE * LOG2E, 0, False
            )
        inside = tl.minimum(high, length // BLOCK_L)
        for j in tl.range(whole, inside, num_stages=STAGES):
            k = key_desc.load([start + j * BLOCK_L, n * C])
            v = value_desc.load([start + j * BLOCK_L, n * C])
            pos = j * BLOCK_L + tl.arange(0, BLOCK_L)
            acc, peak, norm = absorb(
                q, k, v, acc, peak, norm, pos, at, length, SCALE * LOG2E, 0, True
            )
        for j in tl.range(inside, high, num_stages=1):  # the last block of all may go on beyond
            pos = j * BLOCK_L + tl.arange(0, BLOCK_L)
            k = key_desc.load([start + j * BLOCK_L, n * C])
            v = value_desc.load([start + j * BLOCK_L, n * C])
            v = tl.where((pos < length)[:, None], v, 0.0)  # a weight of 0 takes NaN from others
            acc, peak, norm = absorb(
                q, k, v, acc, peak, norm, pos, at, length, SCALE * LOG2E, 0, True
            )
        to = (row * (N * G) + head) * C
        out = (acc / norm[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to[:, None] + c[None, :], out, mask=keep)


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_many(
    q_ptr, key_cache_ptr, value_cache_ptr, out_ptr, tables_ptr, starts_ptr, lengths_ptr, sinks_ptr,
    key_scale_ptr, value_scale_ptr, num_seqs, table_stride,
    S: tl.constexpr, N: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C_POW2: tl.constexpr,
    Z: tl.constexpr, FEW: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr, SINKS: tl.constexpr,
    FP8: tl.constexpr, Q_T: tl.constexpr, Q_H: tl.constexpr, STAGES: tl.constexpr,
    APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_Q queries times G heads, of a sequence with more than FEW queries.

    APART: and with earlier keys; the others go through `attend_fresh`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0)
    s, tile = tile_of(
        starts_ptr, lengths_ptr, num_seqs, tl.program_id(1), S, FEW, BLOCK_Q, False, APART
    )
    if s >= 0:
        start = tl.load(starts_ptr + s)
        queries = tl.load(starts_ptr + s + 1) - start
        length = tl.load(lengths_ptr + s)
        c = tl.arange(0, C_POW2)
        r = tl.arange(0, ROWS)
        i = tile * BLOCK_Q + r // G
        live = (i < queries) & (r < BLOCK_Q * G)
        row = (start + i).to(tl.int64)
        head = n * G + r % G
        keep = live[:, None] & (c < C)[None, :]
        q = tl.load(q_ptr + (row * Q_T + head * Q_H)[:, None] + c[None, :], mask=keep, other=0.0)
        factor = SCALE * LOG2E
        if FP8:  # as in `attend_few`: e4m3 becomes fp16 in one instruction, bf16 in three
            q = (q.to(tl.float32) * factor).to(tl.float16)
            factor = tl.load(key_scale_ptr + n)
        at = length - queries + i
        acc = tl.zeros((ROWS, C_POW2), tl.float32)
        peak = tl.full((ROWS,), NEVER, tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        if SINKS:
            peak = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
            norm += 1.0
        lowest = length - queries + tile * BLOCK_Q
        low = lowest * 0
        if WINDOW > 0:
            low = tl.maximum(lowest + 1 - WINDOW, 0) // BLOCK_L
        high = (tl.minimum(lowest + BLOCK_Q, length) + BLOCK_L - 1) // BLOCK_L
        table_ptr = tables_ptr + s.to(tl.int64) * table_stride
        whole = low
        if WINDOW == 0:
            whole = (lowest + 1) // BLOCK_L  # every row of the tile sees all of these blocks
            for j in tl.range(low, whole, num_stages=STAGES):
                pos, where, exists = key_block(
                    table_ptr, j * BLOCK_L, length, n, c, N, C, Z, BLOCK_L
                )
                k = tl.load(key_cache_ptr + where, mask=(c < C)[None, :], other=0.0)
                v = tl.load(value_cache_ptr + where, mask=(c < C)[None, :], other=0.0)
                acc, peak, norm = absorb(
                    q, k.to(q.dtype), v.to(q.dtype), acc, peak, norm, pos, at, length, factor,
                    WINDOW, False,
                )  # fmt: skip
        for j in tl.range(whole, high, num_stages=STAGES):
            pos, where, exists = key_block(table_ptr, j * BLOCK_L, length, n, c, N, C, Z, BLOCK_L)
            k = tl.load(key_cache_ptr + where, mask=exists, other=0.0)
            v = tl.load(value_cache_ptr + where, mask=exists, other=0.0)
            acc, peak, norm = absorb(
                q, k.to(q.dtype), v.to(q.dtype), acc, peak, norm, pos, at, length, factor,
                WINDOW, True,
            )  # fmt: skip
        acc = acc / norm[:, None]
        if FP8:
            acc *= tl.load(value_scale_ptr + n)
        to = (row * (N * G) + head) * C
        tl.store(out_ptr + to[:, None] + c[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)
