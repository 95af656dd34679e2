# ruff: noqa: SIM102, SIM108 (an `if` on a constant is decided when compiled; a ternary is not)
"""The experts layer for every layout: transposed or interleaved weights, biases, any activation.

Plain Triton, weights by pointer and stride; no tuning beyond block sizes.  `pre` and its gradient
are kept gate columns first, whatever the weights' own order; WIDE is 2F with a gate, else F.
ROW_STRIDE and COL_STRIDE are those of a weight's output row and contracted column.

Legend: D model width, F expert width, K picks a token, E experts; `rows` are sorted positions.
"""

import triton
import triton.language as tl

from mogul.kernels.triton.row_kernels import _load_rows, _tile_at

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
RELU = tl.constexpr(3)
RELU2 = tl.constexpr(4)
CLAMPED = tl.constexpr(5)
CLAMPED_SILU = tl.constexpr(6)


@triton.jit
def at_least(x, LOW: tl.constexpr):
    """As `max`, but what is no number stays so."""
    return tl.maximum(x, LOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, HIGH: tl.constexpr):
    """As `min`, but what is no number stays so."""
    return tl.minimum(x, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _activation(g, ACT: tl.constexpr, ALPHA: tl.constexpr):
    """Value and derivative of the activation (of gpt-oss's inner swish for CLAMPED)."""
    if (ACT == SILU) | (ACT == CLAMPED) | (ACT == CLAMPED_SILU):
        sig = tl.sigmoid(g * ALPHA)
        value = g * sig
        slope = sig + ALPHA * value * (1.0 - sig)
    elif ACT == GELU:
        part = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        value = g * part
        slope = part + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACT == GELU_TANH:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        part = tl.sigmoid(2.0 * inner)
        value = g * part
        slope = part + g * 2.0 * part * (1.0 - part) * 0.7978845608028654 * (
            1.0 + 3.0 * 0.044715 * g * g
        )
    elif ACT == RELU:
        value = at_least(g, 0.0)
        slope = tl.where(g > 0.0, 1.0, 0.0)
    else:
        top = at_least(g, 0.0)
        value = top * top
        slope = 2.0 * top
    return value, slope


@triton.jit
def _joined(g, u, GATED: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """act, d act / d g, d act / d u."""
    if (ACT == CLAMPED) | (ACT == CLAMPED_SILU):
        low_g = at_most(g, LIMIT)
        value, slope = _activation(low_g, ACT, ALPHA)
        up = at_most(at_least(u, -LIMIT), LIMIT)
        if ACT == CLAMPED:
            up += 1.0
        act = up * value
        to_g = tl.where(g <= LIMIT, up * slope, 0.0)
        to_u = tl.where(tl.abs(u) <= LIMIT, value, 0.0)
    else:
        value, slope = _activation(g, ACT, ALPHA)
        if GATED:
            act = value * u
            to_g = slope * u
            to_u = value
        else:
            act = value
            to_g = slope
            to_u = value
    return act, to_g, to_u


@triton.jit
def _stored_row(c, F: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where column c of `pre` (gate first) stands among the weight's own output rows."""
    if INTERLEAVED:
        row = 2 * (c % F) + c // F
    else:
        row = c
    return row


@triton.jit
def _weight(
    ptr, rows, k, C: tl.constexpr, ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, rows] of a weight: contracted columns k.. of its output rows."""
    ks = k + tl.arange(0, BLOCK_K)
    at = ptr + rows[None, :] * ROW_STRIDE + ks[:, None] * COL_STRIDE
    return tl.load(at, mask=(ks < C)[:, None], other=0.0)


@triton.jit
def up_any(
    x_ptr, w_ptr, bias_ptr, act_ptr, pre_ptr, order_ptr, head_ptr, tiles_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """act[row] of x[token]; SAVE keeps pre [rows, WIDE]."""
    WIDE: tl.constexpr = 2 * F if GATED else F
    num_m = tl.load(head_ptr + E + 1)
    tile = tl.program_id(0)
    if tile < num_m * tl.cdiv(F, BLOCK_N):
        e, start, end, n = _tile_at(tile, num_m, tl.cdiv(F, BLOCK_N), tiles_ptr, 8)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        near = cols % F
        token = tl.load(order_ptr + rows, mask=live, other=0) // K
        row_ptr = x_ptr + token.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        w_at = w_ptr + e.to(tl.int64) * (WIDE * D)
        gate_row = _stored_row(near, F, INTERLEAVED)
        up_row = _stored_row(near + F, F, INTERLEAVED)
        g = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        u = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            block = _load_rows(row_ptr, live, k, D, BLOCK_K)
            g = tl.dot(block, _weight(w_at, gate_row, k, D, ROW_STRIDE, COL_STRIDE, BLOCK_K), g)
            if GATED:
                u = tl.dot(block, _weight(w_at, up_row, k, D, ROW_STRIDE, COL_STRIDE, BLOCK_K), u)
        if BIAS:
            bias_at = bias_ptr + e.to(tl.int64) * WIDE
            g += tl.load(bias_at + gate_row).to(tl.float32)[None, :]
            if GATED:
                u += tl.load(bias_at + up_row).to(tl.float32)[None, :]
        keep = live[:, None] & (cols < F)[None, :]
        row64 = rows.to(tl.int64)[:, None]
        act, _to_g, _to_u = _joined(g, u, GATED, ACT, ALPHA, LIMIT)
        element = act_ptr.dtype.element_ty
        tl.store(act_ptr + row64 * F + cols[None, :], act.to(element), mask=keep)
        if SAVE:
            tl.store(pre_ptr + row64 * WIDE + cols[None, :], g.to(element), mask=keep)
            if GATED:
                tl.store(pre_ptr + row64 * WIDE + F + cols[None, :], u.to(element), mask=keep)


@triton.jit
def product_any(
    a_ptr, w_ptr, bias_ptr, out_ptr, order_ptr, head_ptr, tiles_ptr,
    N: tl.constexpr, C: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[slot] = a[row] @ weight.T (+ bias); BACK: a @ weight, over its output rows."""
    num_m = tl.load(head_ptr + E + 1)
    tile = tl.program_id(0)
    if tile < num_m * tl.cdiv(N, BLOCK_N):
        e, start, end, n = _tile_at(tile, num_m, tl.cdiv(N, BLOCK_N), tiles_ptr, 8)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        near = cols % N
        row_ptr = a_ptr + rows.to(tl.int64)[:, None] * C + tl.arange(0, BLOCK_K)[None, :]
        w_at = w_ptr + e.to(tl.int64) * (N * C)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for k in tl.range(0, C, BLOCK_K):
            block = _load_rows(row_ptr, live, k, C, BLOCK_K)
            if BACK:
                ks = k + tl.arange(0, BLOCK_K)
                stored = _stored_row(ks, F, INTERLEAVED)
                at = w_at + stored[:, None] * ROW_STRIDE + near[None, :] * COL_STRIDE
                weight = tl.load(at, mask=(ks < C)[:, None], other=0.0)
            else:
                weight = _weight(w_at, near, k, C, ROW_STRIDE, COL_STRIDE, BLOCK_K)
            acc = tl.dot(block, weight, acc)
        if BIAS:
            acc += tl.load(bias_ptr + e.to(tl.int64) * N + near).to(tl.float32)[None, :]
        slot = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64)
        keep = live[:, None] & (cols < N)[None, :]
        tl.store(
            out_ptr + slot[:, None] * N + cols[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=keep,
        )


@triton.jit(do_not_specialize=["num_slots"])
def down_grad_any(
    dout_ptr, w_ptr, bias_ptr, pre_ptr, weights_ptr, dpre_ptr, act_ptr, part_ptr, order_ptr,
    head_ptr, tiles_ptr, num_slots,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D pre, the weighted act and each column tile's share of d weight, from dout and pre.

    With a bias the share of the first column tile also holds dout . bias.
    """
    WIDE: tl.constexpr = 2 * F if GATED else F
    num_m = tl.load(head_ptr + E + 1)
    tile = tl.program_id(0)
    if tile < num_m * tl.cdiv(F, BLOCK_N):
        e, start, end, n = _tile_at(tile, num_m, tl.cdiv(F, BLOCK_N), tiles_ptr, 8)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = tl.load(order_ptr + rows, mask=live, other=0)
        token = (slot // K).to(tl.int64)
        row_ptr = dout_ptr + token[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        w_at = w_ptr + e.to(tl.int64) * (D * F)
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        part = tl.zeros((BLOCK_T,), tl.float32)
        for k in tl.range(0, D, BLOCK_K):
            block = _load_rows(row_ptr, live, k, D, BLOCK_K)
            ks = k + tl.arange(0, BLOCK_K)
            at = w_at + ks[:, None] * ROW_STRIDE + (cols % F)[None, :] * COL_STRIDE
            acc = tl.dot(block, tl.load(at, mask=(ks < D)[:, None], other=0.0), acc)
            if BIAS:
                if n == 0:
                    bias = tl.load(bias_ptr + e.to(tl.int64) * D + ks, mask=ks < D, other=0.0)
                    part += tl.sum(block.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
        weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        keep = live[:, None] & (cols < F)[None, :]
        row64 = rows.to(tl.int64)[:, None]
        pre_at = row64 * WIDE + cols[None, :]
        g = tl.load(pre_ptr + pre_at, mask=keep, other=0.0).to(tl.float32)
        u = g
        if GATED:
            u = tl.load(pre_ptr + pre_at + F, mask=keep, other=0.0).to(tl.float32)
        act, to_g, to_u = _joined(g, u, GATED, ACT, ALPHA, LIMIT)
        element = act_ptr.dtype.element_ty
        part += tl.sum(tl.where(keep, acc * act, 0.0), 1)
        acc = acc * weight
        tl.store(act_ptr + row64 * F + cols[None, :], (act * weight).to(element), mask=keep)
        tl.store(dpre_ptr + pre_at, (acc * to_g).to(element), mask=keep)
        if GATED:
            tl.store(dpre_ptr + pre_at + F, (acc * to_u).to(element), mask=keep)
        tl.store(part_ptr + n.to(tl.int64) * num_slots + slot, part, mask=live)


@triton.jit
def weight_grad_any(
    left_ptr, right_ptr, out_ptr, order_ptr, head_ptr,
    M: tl.constexpr, N: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    ROW_STRIDE: tl.constexpr, COL_STRIDE: tl.constexpr, INTERLEAVED: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[e] row m, column n = left[rows].T @ right[rows]; one side is gathered by token."""
    e = tl.program_id(0)
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ms = (tl.program_id(1) // num_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = (tl.program_id(1) % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(head_ptr + e)
    end = tl.load(head_ptr + e + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in tl.range(start, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        live = rows < end
        token = tl.load(order_ptr + rows, mask=live, other=0) // K
        left_row = (token if GATHER_LEFT else rows).to(tl.int64)
        right_row = (rows if GATHER_LEFT else token).to(tl.int64)
        left_at = left_ptr + left_row[:, None] * M + ms[None, :]
        right_at = right_ptr + right_row[:, None] * N + ns[None, :]
        left = tl.load(left_at, mask=live[:, None] & (ms < M)[None, :], other=0.0)
        right = tl.load(right_at, mask=live[:, None] & (ns < N)[None, :], other=0.0)
        acc = tl.dot(left.T, right, acc)
    stored = _stored_row(ms, F, INTERLEAVED)
    at = out_ptr + e.to(tl.int64) * (M * N) + stored[:, None] * ROW_STRIDE
    tl.store(
        at + ns[None, :] * COL_STRIDE,
        acc.to(out_ptr.dtype.element_ty),
        mask=(ms < M)[:, None] & (ns < N)[None, :],
    )


@triton.jit
def bias_grad_any(
    rows_ptr, weights_ptr, out_ptr, order_ptr, head_ptr,
    N: tl.constexpr, F: tl.constexpr, K: tl.constexpr, INTERLEAVED: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[e] = sum of this expert's rows; WEIGHTED: of dout by token, times the slot's weight."""
    e = tl.program_id(0)
    ns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(head_ptr + e)
    end = tl.load(head_ptr + e + 1)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for row in tl.range(start, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        live = rows < end
        source = rows
        if WEIGHTED:
            slot = tl.load(order_ptr + rows, mask=live, other=0)
            source = slot // K
        at = rows_ptr + source.to(tl.int64)[:, None] * N + ns[None, :]
        block = tl.load(at, mask=live[:, None] & (ns < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot, mask=live, other=0.0).to(tl.float32)
            block = block * weight[:, None]
        acc += tl.sum(block, 0)
    at = out_ptr + e.to(tl.int64) * N + _stored_row(ns, F, INTERLEAVED)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=ns < N)
