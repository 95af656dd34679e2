"""Triton kernel behind `topk.py`."""

import triton
import triton.language as tl


@triton.jit
def pick_largest(
    rows_ptr, values_ptr, ids_ptr, columns, K: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """One program a row: take the largest K times."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    left = tl.load(rows_ptr + row * columns + cols, mask=cols < columns, other=float("-inf"))
    left = left.to(tl.float32)
    comparable = tl.maximum(left, -3.0e38)  # above what is taken, even for -inf and NaN
    taken = cols >= columns
    for k in tl.static_range(K):
        score = tl.where(taken, float("-inf"), comparable)
        at = tl.minimum(tl.argmax(score, axis=0), columns - 1)
        best = tl.sum(tl.where(cols == at, left, 0.0), axis=0)
        tl.store(values_ptr + row * K + k, best.to(values_ptr.dtype.element_ty))
        tl.store(ids_ptr + row * K + k, at.to(tl.int64))
        taken = taken | (cols == at)
