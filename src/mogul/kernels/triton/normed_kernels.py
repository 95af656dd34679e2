"""Triton kernels behind `normed.py`: one row's products by plain sums, norms, a router at once."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.topk_kernels import pick_by_rank


@triton.jit
def product_one(
    x_ptr, norm_ptr, w_ptr, plus_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row, some columns] of one row, normed before and something added behind where wanted.

    Weights do not depend on the kernel before, so the first are on their way while it still runs.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    near = cols % N
    if PDL:
        gdc_launch_dependents()
    w_at = w_ptr + near.to(tl.int64)[:, None] * K + ks[None, :]
    w = tl.load(w_at, mask=(ks < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        inside = k + ks < K
        if k > 0:
            w = tl.load(w_at + k, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + row * K + k + ks, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k + ks, mask=inside, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * x[None, :]
    out = tl.sum(total, 1)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    out = out.to(out_ptr.dtype.element_ty)
    if ADD:
        out += tl.load(plus_ptr + row * N + cols, mask=cols < N, other=0.0)
    tl.store(out_ptr + row * N + cols, out, mask=cols < N)


@triton.jit
def norm_rows(
    x_ptr, plus_ptr, norm_ptr, total_ptr, out_ptr,
    K: tl.constexpr, BLOCK_K: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[row] = x[row] over its root mean square, times a weight; ADD: of total = x + plus."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * K + ks, mask=ks < K, other=0.0)
    if ADD:
        x += tl.load(plus_ptr + row * K + ks, mask=ks < K, other=0.0)
        tl.store(total_ptr + row * K + ks, x, mask=ks < K)
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + EPS)
    x *= tl.load(norm_ptr + ks, mask=ks < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * K + ks, x.to(out_ptr.dtype.element_ty), mask=ks < K)


@triton.jit
def route_few(
    x_ptr, norm_ptr, w_ptr, normed_ptr, logits_ptr, done_ptr, values_ptr, ids_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, PICKS: tl.constexpr, SLOTS: tl.constexpr, EPS: tl.constexpr,
    RENORMALISE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm a row, multiply it by a router, pick the largest: the last program to end picks.

    `done` counts the programs of a row that have ended; it starts at 0 and is left so.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    inside = ks < K
    w_at = w_ptr + (cols % N)[:, None] * K + ks[None, :]
    if PDL:
        gdc_launch_dependents()
    w = tl.load(w_at, mask=inside[None, :], other=0.0)
    norm = tl.load(norm_ptr + ks, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + row * K + ks, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + EPS)
    x = (x * norm).to(normed_ptr.dtype.element_ty)
    if tl.program_id(0) == 0:
        tl.store(normed_ptr + row * K + ks, x, mask=inside)
    logits = tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)  # as the router's product rounds
    tl.store(logits_ptr + row * N + cols, logits, mask=cols < N)
    tl.debug_barrier()
    ended = tl.atomic_add(done_ptr + row, 1)
    if ended == tl.num_programs(0) - 1:
        tl.store(done_ptr + row, 0)
        e = tl.arange(0, WIDTH)
        at = logits_ptr + row * N
        mine = tl.load(at + e, mask=e < N, other=float("-inf"), cache_modifier=".cg")
        same = tl.load(at + e, mask=e < N, other=float("-inf"), cache_modifier=".cg")
        pick_by_rank(
            mine, same, e, values_ptr + row * PICKS, ids_ptr + row * PICKS,
            N, PICKS, SLOTS, True, RENORMALISE,
        )  # fmt: skip
