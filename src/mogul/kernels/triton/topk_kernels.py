"""Triton kernel behind `topk.py`."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def pick_largest(
    rows_ptr, values_ptr, ids_ptr, num_rows,
    COLUMNS: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
    SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a row: take the largest K times; SOFTMAX: values are shares of the whole row."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    slots = tl.arange(0, SLOTS)
    left = tl.load(rows_ptr + row * COLUMNS + cols, mask=cols < COLUMNS, other=float("-inf"))
    left = left.to(tl.float32)
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
    if SOFTMAX:
        peak = tl.max(left, axis=0)
        values = tl.exp(values - peak)
        if RENORMALISE:
            values /= tl.sum(tl.where(slots < K, values, 0.0), axis=0)
        else:
            values /= tl.sum(tl.exp(left - peak), axis=0)
    tl.store(values_ptr + row * K + slots, values.to(values_ptr.dtype.element_ty), mask=slots < K)
