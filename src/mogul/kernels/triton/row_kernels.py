# ruff: noqa: SIM108 (an `if` on a constant is decided when compiled; a ternary is not)
"""Grouped products over rows sorted by expert: up with SwiGLU, down, and their backward twins.

Each program walks row tiles x column tiles (persistent when the grid is smaller than the work).
Rows of `x` are fetched by token index inside the product, results go out by row or by slot;
no permuted copy exists.  Weights come by pointer, or by TMA descriptor where the device has it.
SWAP puts the weights on the matrix unit's 64-row side, for few rows an expert.

Legend: D model width, F expert width, K picks a token, E experts; `rows` are sorted positions.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP: tl.constexpr):
    """Expert, first row, end row and column tile; BLOCK_GROUP row tiles share the cache."""
    span = BLOCK_GROUP * num_n
    first = (tile // span) * BLOCK_GROUP
    height = tl.minimum(num_m - first, BLOCK_GROUP)
    inside = tile % span
    entry_ptr = tiles_ptr + (first + inside % height) * 4
    return tl.load(entry_ptr), tl.load(entry_ptr + 1), tl.load(entry_ptr + 2), inside // height


@triton.jit
def _load_rows(ptr, live, k, K_LEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """[rows, BLOCK_K] from row pointers `ptr` at columns k..; rows that are not live are zero."""
    cols = k + tl.arange(0, BLOCK_K)
    if K_LEN % BLOCK_K == 0:
        block = tl.load(ptr + k, mask=live[:, None], other=0.0)
    else:
        block = tl.load(ptr + k, mask=live[:, None] & (cols < K_LEN)[None, :], other=0.0)
    return block


@triton.jit
def _load_weight(ptr, k, K_LEN: tl.constexpr, BLOCK_K: tl.constexpr, STREAM: tl.constexpr):
    """[columns, BLOCK_K] of a weight whose rows are output columns."""
    policy: tl.constexpr = "evict_first" if STREAM else ""
    cols = k + tl.arange(0, BLOCK_K)
    if K_LEN % BLOCK_K == 0:
        block = tl.load(ptr + k, eviction_policy=policy)
    else:
        block = tl.load(ptr + k, mask=(cols < K_LEN)[None, :], other=0.0, eviction_policy=policy)
    return block


@triton.jit
def _load_turned(ptr, k, cols, K_LEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, columns] of a weight whose rows are contracted."""
    ks = k + tl.arange(0, BLOCK_K)
    at = ptr + ks[:, None] * WIDTH + cols[None, :]
    if K_LEN % BLOCK_K == 0:
        block = tl.load(at)
    else:
        block = tl.load(at, mask=(ks < K_LEN)[:, None], other=0.0)
    return block


@triton.jit
def _dot(rows, weight, acc, SWAP: tl.constexpr):
    """Add rows @ weight.T to acc, which is kept transposed when SWAP."""
    if SWAP:
        acc = tl.dot(weight, rows.T, acc)
    else:
        acc = tl.dot(rows, weight.T, acc)
    return acc


@triton.jit
def up_rows(
    x_ptr, w_ptr, w_desc, act_ptr, pre_ptr, order_ptr, head_ptr, tiles_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, SAVE: tl.constexpr, FLATTEN: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """act[row] = silu(x[token] @ gate.T) * (x[token] @ up.T); SAVE also keeps both products."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = tl.load(head_ptr + E + 1)
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        e, start, end, n = _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        token = tl.load(order_ptr + rows, mask=live, other=0) // K
        row_ptr = x_ptr + token.to(tl.int64)[:, None] * D + ks[None, :]
        gate_ptr = w_ptr + e.to(tl.int64) * (2 * F * D) + (cols % F)[:, None] * D + ks[None, :]
        if SWAP:
            acc_g = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        else:
            acc_g = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        acc_u = acc_g
        for k in tl.range(0, D, BLOCK_K):
            rows_TK = _load_rows(row_ptr, live, k, D, BLOCK_K)
            if TMA:
                gate = w_desc.load([e * (2 * F) + n * BLOCK_N, k])
                up = w_desc.load([e * (2 * F) + F + n * BLOCK_N, k])
            else:
                gate = _load_weight(gate_ptr, k, D, BLOCK_K, STREAM)
                up = _load_weight(gate_ptr + F * D, k, D, BLOCK_K, STREAM)
            acc_g = _dot(rows_TK, gate, acc_g, SWAP)
            acc_u = _dot(rows_TK, up, acc_u, SWAP)
        act = (acc_g * tl.sigmoid(acc_g) * acc_u).to(act_ptr.dtype.element_ty)
        row64 = rows.to(tl.int64)
        if SWAP:
            keep = live[None, :] & (cols < F)[:, None]
            tl.store(act_ptr + row64[None, :] * F + cols[:, None], act, mask=keep)
            pre_at = pre_ptr + row64[None, :] * (2 * F) + cols[:, None]
        else:
            keep = live[:, None] & (cols < F)[None, :]
            tl.store(act_ptr + row64[:, None] * F + cols[None, :], act, mask=keep)
            pre_at = pre_ptr + row64[:, None] * (2 * F) + cols[None, :]
        if SAVE:
            tl.store(pre_at, acc_g.to(pre_ptr.dtype.element_ty), mask=keep)
            tl.store(pre_at + F, acc_u.to(pre_ptr.dtype.element_ty), mask=keep)


@triton.jit
def down_rows(
    a_ptr, a_desc, w_ptr, w_desc, out_ptr, order_ptr, head_ptr, tiles_ptr,
    N: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, TRANSPOSED: tl.constexpr, FLATTEN: tl.constexpr,
    STREAM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[slot] = a[row] @ w[expert], contraction width C.

    The weight is [E, N, C], or [E, C, N] when TRANSPOSED (backward of the up product).
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = tl.load(head_ptr + E + 1)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        e, start, end, n = _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        row_ptr = a_ptr + rows.to(tl.int64)[:, None] * C + ks[None, :]
        w_at = w_ptr + e.to(tl.int64) * (N * C)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        else:
            acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in tl.range(0, C, BLOCK_K):
            if TMA:
                rows_TK = a_desc.load([start, k])
            else:
                rows_TK = _load_rows(row_ptr, live, k, C, BLOCK_K)
            if TRANSPOSED:
                if TMA:
                    weight = w_desc.load([e * C + k, n * BLOCK_N])
                else:
                    weight = _load_turned(w_at, k, (cols % N), C, N, BLOCK_K)
                acc = tl.dot(rows_TK, weight, acc)
            else:
                if TMA:
                    weight = w_desc.load([e * N + n * BLOCK_N, k])
                else:
                    weight = _load_weight(
                        w_at + (cols % N)[:, None] * C + ks[None, :], k, C, BLOCK_K, STREAM
                    )
                acc = _dot(rows_TK, weight, acc, SWAP)
        slot = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64)
        result = acc.to(out_ptr.dtype.element_ty)
        if SWAP:
            keep = live[None, :] & (cols < N)[:, None]
            tl.store(out_ptr + slot[None, :] * N + cols[:, None], result, mask=keep)
        else:
            keep = live[:, None] & (cols < N)[None, :]
            tl.store(out_ptr + slot[:, None] * N + cols[None, :], result, mask=keep)


@triton.jit
def _halves(acc):
    """Left and right half of the columns; in registers only."""
    return acc.reshape((acc.shape[0], 2, acc.shape[1] // 2)).permute((0, 2, 1)).split()


@triton.jit
def _swiglu_grad(acc, weight_T, row64, live, first, pre_ptr, dpre_ptr, act_ptr, F: tl.constexpr):
    """Write d pre and the weighted act of some columns; return each row's share of d weight."""
    cols = first + tl.arange(0, acc.shape[1])
    keep = live[:, None] & (cols < F)[None, :]
    at = row64[:, None] * (2 * F) + cols[None, :]
    g = tl.load(pre_ptr + at, mask=keep, other=0.0).to(tl.float32)
    u = tl.load(pre_ptr + at + F, mask=keep, other=0.0).to(tl.float32)
    sig = tl.sigmoid(g)
    silu = g * sig
    act = silu * u
    part = tl.sum(acc * act, 1)
    tl.store(
        act_ptr + row64[:, None] * F + cols[None, :],
        (act * weight_T[:, None]).to(act_ptr.dtype.element_ty),
        mask=keep,
    )
    acc = acc * weight_T[:, None]
    tl.store(dpre_ptr + at + F, (acc * silu).to(dpre_ptr.dtype.element_ty), mask=keep)
    dgate = acc * u * (sig + silu * (1.0 - sig))
    tl.store(dpre_ptr + at, dgate.to(dpre_ptr.dtype.element_ty), mask=keep)
    return part


@triton.jit(do_not_specialize=["num_slots"])
def down_rows_grad(
    dout_ptr, w_ptr, w_desc, pre_ptr, weights_ptr, dpre_ptr, act_ptr, part_ptr, order_ptr,
    head_ptr, tiles_ptr,
    num_slots,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Backward of down and SwiGLU in one pass over dout[token] @ down[expert].

    Recomputes the activation from `pre`; writes d pre, the weighted activation (for d down) and per
    column tile the partial sums of d weight.
    """
    num_m = tl.load(head_ptr + E + 1)
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        e, start, end, n = _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        slot = tl.load(order_ptr + rows, mask=live, other=0)
        row_ptr = dout_ptr + (slot // K).to(tl.int64)[:, None] * D + ks[None, :]
        w_at = w_ptr + e.to(tl.int64) * (D * F)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            rows_TK = _load_rows(row_ptr, live, k, D, BLOCK_K)
            if TMA:
                weight = w_desc.load([e * D + k, n * BLOCK_N])
            else:
                weight = _load_turned(w_at, k, (cols % F), D, F, BLOCK_K)
            acc = tl.dot(rows_TK, weight, acc)
        weight_T = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
        left, right = _halves(acc)
        a, b = _halves(left)
        c, d = _halves(right)
        base = n * BLOCK_N
        row64 = rows.to(tl.int64)
        part = _swiglu_grad(a, weight_T, row64, live, base, pre_ptr, dpre_ptr, act_ptr, F)
        part += _swiglu_grad(
            b, weight_T, row64, live, base + BLOCK_N // 4, pre_ptr, dpre_ptr, act_ptr, F
        )
        part += _swiglu_grad(
            c, weight_T, row64, live, base + BLOCK_N // 2, pre_ptr, dpre_ptr, act_ptr, F
        )
        part += _swiglu_grad(
            d, weight_T, row64, live, base + BLOCK_N // 4 * 3, pre_ptr, dpre_ptr, act_ptr, F
        )
        tl.store(part_ptr + n.to(tl.int64) * num_slots + slot, part, mask=live)
