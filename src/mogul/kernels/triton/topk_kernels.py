"""Triton kernel behind `topk.py`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def pick_largest(
    rows_ptr, values_ptr, ids_ptr, num_rows,
    COLUMNS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, RANKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: take the largest K times; SOFTMAX: values are shares of the whole row.

    RANKED: all at once, which takes the square of a row's columns.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    slots = tl.arange(0, SLOTS)
    at_row = rows_ptr + row * COLUMNS
    left = tl.load(at_row + cols, mask=cols < COLUMNS, other=float("-inf")).to(tl.float32)
    if RANKED:
        same = tl.load(at_row + cols, mask=cols < COLUMNS, other=float("-inf")).to(tl.float32)
        pick_by_rank(
            left, same, cols, values_ptr + row * K, ids_ptr + row * K,
            COLUMNS, K, SLOTS, SOFTMAX, RENORMALISE,
        )  # fmt: skip
    else:
        comparable = tl.maximum(left, -3.0e38)  # above what is taken, even for -inf and NaN
        values = tl.zeros((SLOTS,), tl.float32)
        taken = cols >= COLUMNS
        for k in tl.static_range(K):
            score = tl.where(taken, float("-inf"), comparable)
            at = tl.minimum(tl.argmax(score, axis=0), COLUMNS - 1)
            best = tl.sum(tl.where(cols == at, left, 0.0), axis=0)
            values = tl.where(slots == k, best, values)
            tl.store(ids_ptr + row * K + k, at.to(tl.int64))
            taken = taken | (cols == at)
        values = shares(values, left, slots, K, SOFTMAX, RENORMALISE)
        values = values.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * K + slots, values, mask=slots < K)


@triton.jit
def shares(
    values, row, slots, K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr
):  # fmt: skip
    """Picked values as they are, or as shares of their row's exponentials, or of the picked."""
    if SOFTMAX:
        peak = tl.max(row, axis=0)
        values = tl.exp(values - peak)
        if RENORMALISE:
            values /= tl.sum(tl.where(slots < K, values, 0.0), axis=0)
        else:
            values /= tl.sum(tl.exp(row - peak), axis=0)
    return values


@triton.jit
def pick_by_rank(
    row, same, cols, values_ptr, ids_ptr,
    COLUMNS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, SOFTMAX: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """The K largest of a row (given twice, -inf beyond its columns), falling; ties: the left."""
    is_column = cols < COLUMNS  # what is no number or -inf still goes before what is no column
    mine = tl.where(row > -3.0e38, row, -3.0e38)
    mine = tl.where(is_column, mine, float("-inf"))
    other = tl.where(same > -3.0e38, same, -3.0e38)
    other = tl.where(is_column, other, float("-inf"))
    is_left = cols[None, :] < cols[:, None]
    ahead = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & is_left)
    rank = tl.sum(ahead.to(tl.int32), 1)
    slots = tl.arange(0, SLOTS)
    here = rank[:, None] == slots[None, :]
    ids = tl.minimum(tl.sum(tl.where(here, cols[:, None], 0), 0), COLUMNS - 1)
    values = tl.sum(tl.where(here, row[:, None], 0.0), 0)
    values = shares(values, row, slots, K, SOFTMAX, RENORMALISE)
    tl.store(ids_ptr + slots, ids.to(tl.int64), mask=slots < K)
    tl.store(values_ptr + slots, values.to(values_ptr.dtype.element_ty), mask=slots < K)
