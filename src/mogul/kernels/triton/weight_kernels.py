# ruff: noqa: SIM108 (an `if` on a constant is decided when compiled; a ternary is not)
"""Weight gradients: per expert the product of two row blocks over that expert's rows.

d gate_up[e] = d pre[rows].T @ x[tokens], d down[e] = dout[tokens].T @ (weighted activation)[rows].
The side named by GATHER_LEFT is fetched by token index, the other one lies sorted by expert.
An expert without rows gets zeros.
"""

import triton
import triton.language as tl


@triton.jit
def _step(
    acc, row, end, m, n, left_ptr, left_desc, right_ptr, right_desc, order_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    GATHER_LEFT: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of rows: acc += left[rows].T @ right[rows]."""
    rows = row + tl.arange(0, BLOCK_R)
    ms = (m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    ns = (n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    if MASKED:
        live = rows < end
        token = tl.load(order_ptr + rows, mask=live, other=0) // K
    else:
        token = tl.load(order_ptr + rows) // K
    left_row = (token if GATHER_LEFT else rows).to(tl.int64)
    right_row = (rows if GATHER_LEFT else token).to(tl.int64)
    left_at = left_ptr + left_row[:, None] * M + ms[None, :]
    right_at = right_ptr + right_row[:, None] * N + ns[None, :]
    if MASKED:
        left = tl.load(left_at, mask=live[:, None], other=0.0)
        right = tl.load(right_at, mask=live[:, None], other=0.0)
    else:
        if TMA and not GATHER_LEFT:
            left = left_desc.load([row, m * BLOCK_M])
        else:
            left = tl.load(left_at)
        if TMA and GATHER_LEFT:
            right = right_desc.load([row, n * BLOCK_N])
        else:
            right = tl.load(right_at)
    return tl.dot(left.T, right, acc)


@triton.jit
def weight_grad(
    left_ptr, left_desc, right_ptr, right_desc, out_ptr, order_ptr, head_ptr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    GATHER_LEFT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """out[e] [M, N] = left[rows of e].T @ right[rows of e]."""
    num_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        e = tile // (num_m * num_n)
        place = tile % (num_m * num_n)
        span = BLOCK_GROUP * num_n
        first = (place // span) * BLOCK_GROUP
        height = tl.minimum(num_m - first, BLOCK_GROUP)
        m = first + (place % span) % height
        n = (place % span) // height
        start = tl.load(head_ptr + e)
        end = tl.load(head_ptr + e + 1)
        full_end = start + (end - start) // BLOCK_R * BLOCK_R
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in tl.range(start, full_end, BLOCK_R):
            acc = _step(
                acc, row, end, m, n, left_ptr, left_desc, right_ptr, right_desc, order_ptr,
                M, N, K, BLOCK_M, BLOCK_N, BLOCK_R, GATHER_LEFT, TMA, False,
            )  # fmt: skip
        if full_end < end:
            acc = _step(
                acc, full_end, end, m, n, left_ptr, left_desc, right_ptr, right_desc, order_ptr,
                M, N, K, BLOCK_M, BLOCK_N, BLOCK_R, GATHER_LEFT, TMA, True,
            )  # fmt: skip
        ms = m * BLOCK_M + tl.arange(0, BLOCK_M)
        ns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        out_at = out_ptr + e.to(tl.int64) * (M * N) + ms[:, None] * N + ns[None, :]
        tl.store(
            out_at, acc.to(out_ptr.dtype.element_ty), mask=(ms < M)[:, None] & (ns < N)[None, :]
        )
