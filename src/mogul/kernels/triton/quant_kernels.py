# ruff: noqa: SIM108 (an `if` on a constant is decided when compiled; a ternary is not)
"""The experts layer on quantised weights: rows rounded to fp8, up and down products.

GROUP = 0 is fp8: e4m3 rows times e4m3 weights, fp32 sums, scaled once at the end by row and by
column.  SPLIT: a row is its rounded numbers, then what rounding left of them, and both halves meet
the same weights (2: in one product of twice the rows).  GROUP > 0 is int4: packed pairs become
weights of the rows' dtype in registers, q * scale + offset in fp32 with one rounding, and lie on
the matrix unit's left side.
Layouts of scales: fp8 [E, N] fp32; int4 [E, groups, N] of two bf16, read as one 32-bit word.

Legend: D model width, F expert width, K picks a token, E experts; `rows` are sorted positions.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.any_kernels import at_least, at_most
from mogul.kernels.triton.row_kernels import _dot, _load_rows, _tile_at

_MAGIC = tl.constexpr(0x4B000000)
_TWO_23 = tl.constexpr(8388608.0)


@triton.jit
def round_rows(
    x_ptr, value_ptr, scale_ptr, count_ptr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr, COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """value[row] = x[row] / scale[row] as e4m3, scale = max |x[row]| / 448; COUNTED: live rows.

    SPLIT: rows of `value` have 2 C columns, in the second half what rounding left, rounded too.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    if not COUNTED or row < tl.load(count_ptr):
        if C <= BLOCK_C:  # the row stays in registers
            x = tl.load(x_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
            scale = _scale(tl.abs(x).to(tl.int32, bitcast=True))
            _put_rounded(value_ptr + row * (C + C * SPLIT) + cols, x, scale, cols < C, C, SPLIT)
        else:
            at = value_ptr + row * (C + C * SPLIT)
            scale = _round_long(x_ptr + row * C, at, C, BLOCK_C, SPLIT)
        tl.store(scale_ptr + row, scale)


@triton.jit
def _put_rounded(at, x, scale, keep, C: tl.constexpr, SPLIT: tl.constexpr):
    """Numbers over their scale as e4m3; SPLIT: C further on, what that leaves."""
    value = tl.minimum(tl.maximum(x / scale, -448.0), 448.0)
    first = value.to(at.dtype.element_ty)
    tl.store(at, first, mask=keep)
    if SPLIT:
        tl.store(at + C, (value - first.to(tl.float32)).to(at.dtype.element_ty), mask=keep)


@triton.jit
def _round_long(
    x_ptr, value_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Round a row that is read twice; its scale."""
    cols = tl.arange(0, BLOCK_C)
    top = tl.zeros((BLOCK_C,), tl.int32)
    for base in tl.static_range(0, C, BLOCK_C):
        x = tl.load(x_ptr + base + cols, mask=base + cols < C, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.abs(x).to(tl.int32, bitcast=True))
    scale = _scale(top)
    for base in tl.static_range(0, C, BLOCK_C):
        x = tl.load(x_ptr + base + cols, mask=base + cols < C, other=0.0).to(tl.float32)
        _put_rounded(value_ptr + base + cols, x, scale, base + cols < C, C, SPLIT)
    return scale


@triton.jit
def _scale(top):
    """Scale of a row from the bits of its magnitudes, whose order is theirs: NaN is the largest."""
    most = tl.max(top, 0).to(tl.float32, bitcast=True)
    return tl.maximum(most, 1e-12, propagate_nan=tl.PropagateNan.ALL) / 448.0


@triton.jit
def round_gated(
    both_ptr, value_ptr, scale_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """value[row] = silu(gate) * up / scale[row] as e4m3; row of `both` is gate [F], then up [F]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_F)
    if F <= BLOCK_F:  # the row stays in registers
        act = _gated(both_ptr + row * (2 * F), cols, F)
        scale = _scale(tl.abs(act).to(tl.int32, bitcast=True))
        _put_rounded(value_ptr + row * F + cols, act, scale, cols < F, F, False)
    else:
        top = tl.zeros((BLOCK_F,), tl.int32)
        for base in tl.static_range(0, F, BLOCK_F):
            act = _gated(both_ptr + row * (2 * F), base + cols, F)
            top = tl.maximum(top, tl.abs(act).to(tl.int32, bitcast=True))
        scale = _scale(top)
        for base in tl.static_range(0, F, BLOCK_F):
            act = _gated(both_ptr + row * (2 * F), base + cols, F)
            at = value_ptr + row * F + base + cols
            _put_rounded(at, act, scale, base + cols < F, F, False)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _gated(at, cols, F: tl.constexpr):
    """silu(gate) * up in the dtype of both, which the definition rounds to."""
    gate = tl.load(at + cols, mask=cols < F, other=0.0).to(tl.float32)
    up = tl.load(at + F + cols, mask=cols < F, other=0.0).to(tl.float32)
    return (gate * tl.sigmoid(gate) * up).to(at.dtype.element_ty).to(tl.float32)


@triton.jit
def _int4_tile(
    value_ptr, scale_ptr, cols, k, like_ptr,
    N: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] weights of columns `cols` at k, in the dtype behind like_ptr."""
    HALF: tl.constexpr = BLOCK_K // 2
    SPANS: tl.constexpr = max(1, BLOCK_K // GROUP)
    NUM_GROUPS: tl.constexpr = (C + GROUP - 1) // GROUP
    halves = k // 2 + tl.arange(0, HALF)
    at = value_ptr + cols[:, None] * (C // 2) + halves[None, :]
    if C % BLOCK_K == 0:
        pairs = tl.load(at, eviction_policy="evict_first")
    else:
        pairs = tl.load(at, mask=(halves < C // 2)[None, :], other=0, eviction_policy="evict_first")
    groups = k // GROUP + tl.arange(0, SPANS)
    word = tl.load(
        scale_ptr + groups[:, None] * N + cols[None, :],
        mask=(groups < NUM_GROUPS)[:, None],
        other=0,
    ).T
    scale = (word << 16).to(tl.float32, bitcast=True)
    offset = (word & -65536).to(tl.float32, bitcast=True)
    pairs = pairs.to(tl.int32)
    number = tl.join((pairs & 15) | _MAGIC, (pairs >> 4) | _MAGIC).to(tl.float32, bitcast=True)
    number = number - _TWO_23
    if SPANS == 1:
        weight = number.reshape(BLOCK_N, BLOCK_K) * scale + offset
    else:
        number = number.reshape(BLOCK_N, SPANS, GROUP)
        weight = number * scale[:, :, None] + offset[:, :, None]
        weight = weight.reshape(BLOCK_N, BLOCK_K)
    return weight.to(like_ptr.dtype.element_ty)


@triton.jit
def _fp8_tile(value_ptr, cols, k, C: tl.constexpr, BLOCK_K: tl.constexpr, STREAM: tl.constexpr):
    policy: tl.constexpr = "evict_first" if STREAM else ""
    ks = k + tl.arange(0, BLOCK_K)
    at = value_ptr + cols[:, None] * C + ks[None, :]
    if C % BLOCK_K == 0:
        tile = tl.load(at, eviction_policy=policy)
    else:
        tile = tl.load(at, mask=(ks < C)[None, :], other=0.0, eviction_policy=policy)
    return tile


@triton.jit
def _across(values, SWAP: tl.constexpr):
    """Values of rows, to multiply or mask an accumulator."""
    if SWAP:
        out = values[None, :]
    else:
        out = values[:, None]
    return out


@triton.jit
def _both_halves(ptr, order_ptr, start, end, C: tl.constexpr, K: tl.constexpr, T: tl.constexpr):
    """Pointers to the first halves of T rows, then to their second ones; which rows live.

    Rows are sorted positions, or with K > 0 the tokens there.
    """
    half = tl.arange(0, 2 * T)
    rows = start + half % T
    live = rows < end
    if K > 0:
        rows = tl.load(order_ptr + rows, mask=live, other=0) // K
    return ptr + (rows.to(tl.int64) * (2 * C) + half // T * C)[:, None], live


@triton.jit
def _folded(acc, SWAP: tl.constexpr):
    """First and second halves of the rows summed."""
    if SWAP:
        out = tl.sum(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2), 1)
    else:
        out = tl.sum(acc.reshape(2, acc.shape[0] // 2, acc.shape[1]), 0)
    return out


@triton.jit
def _joined(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The activation between both products; ACT 1 is gpt-oss's clamped SwiGLU."""
    if ACT == 1:
        gate = at_most(gate, LIMIT)
        up = at_most(at_least(up, -LIMIT), LIMIT) + 1.0
        out = up * gate * tl.sigmoid(gate * ALPHA)
    else:
        out = gate * tl.sigmoid(gate) * up
    return out


@triton.jit
def up_quantised(
    x_ptr, x_scale_ptr, w_ptr, w_desc, w_scale_ptr, bias_ptr, act_ptr,
    order_ptr, head_ptr, tiles_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, STREAM: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """act[row] = activation(x[token] @ gate.T, x[token] @ up.T) on quantised weights."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = tl.load(head_ptr + E + 1)
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        e, start, end, n = _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        near = cols % F
        e64 = e.to(tl.int64)
        token = tl.load(order_ptr + rows, mask=live, other=0) // K
        if SPLIT == 2:  # both halves of all rows side by side
            row_ptr, some = _both_halves(x_ptr, order_ptr, start, end, D, K, BLOCK_T)
        else:
            row_ptr, some = x_ptr + token.to(tl.int64)[:, None] * (D + D * SPLIT), live
        row_ptr += tl.arange(0, BLOCK_K)[None, :]
        SIDE: tl.constexpr = BLOCK_T * 2 if SPLIT == 2 else BLOCK_T
        if SWAP:
            gate = tl.zeros((BLOCK_N, SIDE), tl.float32)
        else:
            gate = tl.zeros((SIDE, BLOCK_N), tl.float32)
        up = gate
        if GROUP > 0:
            w_at = w_ptr + e64 * (2 * F * (D // 2))
            s_at = w_scale_ptr + e64 * (2 * F * ((D + GROUP - 1) // GROUP))
            for k in tl.range(0, D, BLOCK_K):
                block = _load_rows(row_ptr, live, k, D, BLOCK_K)
                gate_w = _int4_tile(w_at, s_at, near, k, x_ptr, 2 * F, D, GROUP, BLOCK_N, BLOCK_K)
                up_w = _int4_tile(w_at, s_at, F + near, k, x_ptr, 2 * F, D, GROUP, BLOCK_N, BLOCK_K)
                gate = _dot(block, gate_w, gate, SWAP)
                up = _dot(block, up_w, up, SWAP)
        else:
            w_at = w_ptr + e64 * (2 * F * D)
            for k in tl.range(0, D, BLOCK_K):
                block = _load_rows(row_ptr, some, k, D, BLOCK_K)
                if TMA:
                    gate_w = w_desc.load([e * (2 * F) + n * BLOCK_N, k])
                    up_w = w_desc.load([e * (2 * F) + F + n * BLOCK_N, k])
                else:
                    gate_w = _fp8_tile(w_at, near, k, D, BLOCK_K, STREAM)
                    up_w = _fp8_tile(w_at, F + near, k, D, BLOCK_K, STREAM)
                gate = _dot(block, gate_w, gate, SWAP)
                up = _dot(block, up_w, up, SWAP)
                if SPLIT == 1:
                    block = _load_rows(row_ptr + D, live, k, D, BLOCK_K)
                    gate = _dot(block, gate_w, gate, SWAP)
                    up = _dot(block, up_w, up, SWAP)
            if SPLIT == 2:
                gate, up = _folded(gate, SWAP), _folded(up, SWAP)
            row_scale = _across(tl.load(x_scale_ptr + token, mask=live, other=0.0), SWAP)
            col_at = w_scale_ptr + e64 * (2 * F) + near
            gate = gate * row_scale * _across(tl.load(col_at), not SWAP)
            up = up * row_scale * _across(tl.load(col_at + F), not SWAP)
        if BIAS:
            bias_at = bias_ptr + e64 * (2 * F) + near
            gate += _across(tl.load(bias_at).to(tl.float32), not SWAP)
            up += _across(tl.load(bias_at + F).to(tl.float32), not SWAP)
        act = _joined(gate, up, ACT, ALPHA, LIMIT).to(act_ptr.dtype.element_ty)
        at = _across(rows.to(tl.int64) * F, SWAP) + _across(cols, not SWAP)
        tl.store(act_ptr + at, act, mask=_across(live, SWAP) & _across(cols < F, not SWAP))


@triton.jit
def down_quantised(
    a_ptr, a_desc, a_scale_ptr, w_ptr, w_desc, w_scale_ptr, bias_ptr, out_ptr,
    order_ptr, head_ptr, tiles_ptr,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, STREAM: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[slot] = a[row] @ down[expert].T (+ bias) on quantised weights."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m = tl.load(head_ptr + E + 1)
    num_n = tl.cdiv(D, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        e, start, end, n = _tile_at(tile, num_m, num_n, tiles_ptr, BLOCK_GROUP)
        rows = start + tl.arange(0, BLOCK_T)
        live = rows < end
        cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
        near = cols % D
        e64 = e.to(tl.int64)
        if SPLIT == 2:
            row_ptr, some = _both_halves(a_ptr, order_ptr, start, end, F, 0, BLOCK_T)
        else:
            row_ptr, some = a_ptr + rows.to(tl.int64)[:, None] * (F + F * SPLIT), live
        row_ptr += tl.arange(0, BLOCK_K)[None, :]
        SIDE: tl.constexpr = BLOCK_T * 2 if SPLIT == 2 else BLOCK_T
        if SWAP:
            acc = tl.zeros((BLOCK_N, SIDE), tl.float32)
        else:
            acc = tl.zeros((SIDE, BLOCK_N), tl.float32)
        if GROUP > 0:
            w_at = w_ptr + e64 * (D * (F // 2))
            s_at = w_scale_ptr + e64 * (D * ((F + GROUP - 1) // GROUP))
            for k in tl.range(0, F, BLOCK_K):
                block = _load_rows(row_ptr, live, k, F, BLOCK_K)
                weight = _int4_tile(w_at, s_at, near, k, a_ptr, D, F, GROUP, BLOCK_N, BLOCK_K)
                acc = _dot(block, weight, acc, SWAP)
        else:
            w_at = w_ptr + e64 * (D * F)
            for k in tl.range(0, F, BLOCK_K):
                if TMA:
                    block = a_desc.load([start, k])
                    weight = w_desc.load([e * D + n * BLOCK_N, k])
                else:
                    block = _load_rows(row_ptr, some, k, F, BLOCK_K)
                    weight = _fp8_tile(w_at, near, k, F, BLOCK_K, STREAM)
                acc = _dot(block, weight, acc, SWAP)
                if SPLIT == 1:
                    if TMA:
                        block = a_desc.load([start, F + k])
                    else:
                        block = _load_rows(row_ptr + F, live, k, F, BLOCK_K)
                    acc = _dot(block, weight, acc, SWAP)
            if SPLIT == 2:
                acc = _folded(acc, SWAP)
            acc = acc * _across(tl.load(a_scale_ptr + rows, mask=live, other=0.0), SWAP)
            acc = acc * _across(tl.load(w_scale_ptr + e64 * D + near), not SWAP)
        if BIAS:
            acc += _across(tl.load(bias_ptr + e64 * D + near).to(tl.float32), not SWAP)
        slot = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64)
        at = _across(slot * D, SWAP) + _across(cols, not SWAP)
        keep = _across(live, SWAP) & _across(cols < D, not SWAP)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)
