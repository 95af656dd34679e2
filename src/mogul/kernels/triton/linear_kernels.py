"""Triton kernels behind `linear.py`: few rows times a weight, bound by reading the weight."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def linear_few(
    x_ptr, x_scale_ptr, w_ptr, w_scale_ptr, plus_ptr, bias_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr,
    BIAS: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row, col] = x[row] @ w[col], SCALED: times both scales, and what is added.

    BIAS: one number a column; ADD: what stands in `plus`. Weights are the left operand. They do not
    depend on the kernel before, so this program's come into the cache while that one still runs:
    LINES of each column.
    """
    if PDL:
        gdc_launch_dependents()
        fetch(w_ptr, tl.program_id(0) * BLOCK_N, N, K, BLOCK_N, LINES)
        gdc_wait()
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
    if BIAS:
        acc += tl.load(bias_ptr + near).to(tl.float32)[:, None]
    at = rows.to(tl.int64)[None, :] * N + cols[:, None]
    keep = live[None, :] & (cols < N)[:, None]
    acc = acc.to(out_ptr.dtype.element_ty)
    if ADD:
        acc += tl.load(plus_ptr + at, mask=keep, other=0.0)
    tl.store(out_ptr + at, acc, mask=keep)


@triton.jit
def fetch(
    w_ptr, first, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr = 4096
):  # fmt: skip
    """Bring MOST lines of ROWS rows of [N, K] from `first` on into the L2 cache."""
    LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = min((K + LINE - 1) // LINE, MOST)
    BLOCK: tl.constexpr = 32
    rows = (first + tl.arange(0, ROWS)) % N
    lines = tl.arange(0, BLOCK)
    for start in tl.static_range(0, LINES, BLOCK):
        at = tl.minimum(start + lines, LINES - 1) * LINE
        where = (w_ptr + rows.to(tl.int64)[:, None] * K + at[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


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
