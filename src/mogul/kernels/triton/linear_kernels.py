"""Triton kernels behind `linear.py`: few rows times a weight, bound by reading the weight."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def linear_few(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row, col] = x[row] @ w[col], SCALED: times both scales; weights are the left operand."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    ks = tl.arange(0, BLOCK_K)
    live = rows < num_rows
    near = cols % N
    w_at = w_ptr + near.to(tl.int64)[:, None] * K + ks[None, :]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * K + ks[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if K % BLOCK_K == 0:
            w = tl.load(w_at + k, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=live[:, None], other=0.0)
        else:
            inside = (k + ks < K)[None, :]
            w = tl.load(w_at + k, mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_at + k, mask=live[:, None] & inside, other=0.0)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    if SCALED:
        acc *= tl.load(w_scale_ptr + near)[:, None]
        acc *= tl.load(x_scale_ptr + rows, mask=live, other=0.0)[None, :]
    at = rows.to(tl.int64)[None, :] * N + cols[:, None]
    keep = live[None, :] & (cols < N)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def linear_narrow(
    x_ptr, w_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[row, some columns] of one row: plain sums, for few columns that many programs share."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    near = cols % N
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        inside = k + ks < K
        w = tl.load(w_ptr + near[:, None] * K + k + ks[None, :], mask=inside[None, :], other=0.0)
        x = tl.load(x_ptr + row * K + k + ks, mask=inside, other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    out = tl.sum(total, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * N + cols, out, mask=cols < N)
