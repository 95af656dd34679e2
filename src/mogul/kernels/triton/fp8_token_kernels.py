"""Kernels of decoder layers with fp8 weights: one token by plain sums, and what goes with it.

One token's rows stay as they are: weights become fp16 in registers, exactly, and sums are fp32.
More rows are rounded to e4m3 elsewhere; here stand the norm that rounds them and the last sum.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.linear_kernels import fetch
from mogul.kernels.triton.quant_kernels import _put_rounded, _scale
from mogul.kernels.triton.quant_token_kernels import FOLD, _folded
from mogul.kernels.triton.route_kernels import _best_of_each, scores_of, weights_of


@triton.jit
def _packed(at, inside, MASKED: tl.constexpr):
    """Weights; masked only where a row does not end with a block."""
    if MASKED:
        w = tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        w = tl.load(at, eviction_policy="evict_first")
    return w


@triton.jit
def _wide(w):
    """e4m3 in fp32, by way of the conversion that the device has."""
    return w.to(tl.float16).to(tl.float32)


@triton.jit
def _tile(at, inside, MASKED: tl.constexpr):
    """Weights in fp32."""
    return _wide(_packed(at, inside, MASKED))


@triton.jit
def product_one_fp8(
    x_ptr, norm_ptr, w_ptr, scale_ptr, bias_ptr, plus_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[0, some columns]: normed before, a bias and a residual added behind, where wanted."""
    first = tl.program_id(0) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    near = cols % N
    MASKED: tl.constexpr = K % BLOCK_K != 0
    if PDL:
        gdc_launch_dependents()
        fetch(w_ptr, first, N, K, BLOCK_N, LINES)
        gdc_wait()
    w_at = w_ptr + near.to(tl.int64)[:, None] * K + ks[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        inside = k + ks < K
        w = _tile(w_at + k, inside[None, :], MASKED)
        x = tl.load(x_ptr + k + ks, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x *= tl.load(norm_ptr + k + ks, mask=inside, other=0.0).to(tl.float32)
        total += _folded(w * x[None, :], FOLD)
    out = tl.sum(total, 1) * tl.load(scale_ptr + near)
    if NORM:
        out *= tl.rsqrt(tl.sum(squares, 0) / K + EPS)
    if BIAS:
        out += tl.load(bias_ptr + near).to(tl.float32)
    if ADD:
        out += tl.load(plus_ptr + near).to(tl.float32)
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def route_one(
    x_ptr, norm_ptr, w_ptr, bias_ptr, scale_ptr, normed_ptr, logits_ptr, done_ptr, ids_ptr,
    weights_ptr,
    E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, PICKS: tl.constexpr,
    EPS: tl.constexpr, SCORE: tl.constexpr, WEIGHTING: tl.constexpr, FACTOR: tl.constexpr,
    NUM_BIAS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm one row, multiply it by a router, pick one expert of each group: the last one picks.

    `done` counts the programs that have ended; it starts at 0 and is left so.
    """
    e = tl.program_id(0)
    ks = tl.arange(0, BLOCK_K)
    inside = ks < K
    if PDL:
        gdc_launch_dependents()
    w = tl.load(w_ptr + e * K + ks, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + ks, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + ks, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / K + EPS)
    x = (x.to(normed_ptr.dtype.element_ty).to(tl.float32) * norm).to(normed_ptr.dtype.element_ty)
    if e == 0:
        tl.store(normed_ptr + ks, x, mask=inside)
    tl.store(logits_ptr + e, tl.sum(w.to(tl.float32) * x.to(tl.float32), 0))
    tl.debug_barrier()
    ended = tl.atomic_add(done_ptr, 1)
    if ended == E - 1:
        tl.store(done_ptr, 0)
        cols = tl.arange(0, E)
        logits = tl.load(logits_ptr + cols, cache_modifier=".cg")[None, :]
        is_column = (cols >= 0)[None, :]
        scores, log = scores_of(logits, is_column, SCORE)
        choice = scores
        if NUM_BIAS > 0:
            bias = tl.load(bias_ptr + cols, mask=cols < NUM_BIAS, other=0.0)
            choice += bias.to(tl.float32)[None, :]
        choice = tl.where(choice == choice, choice, float("inf"))
        ids, log_K, score_K, _taken = _best_of_each(choice, log, scores, cols, PICKS)
        slots = tl.arange(0, PICKS)
        weights = weights_of(log_K, score_K, ids < E, slots, WEIGHTING, PICKS, PICKS) * FACTOR
        if SCALED:
            weights = weights * tl.load(scale_ptr + ids).to(tl.float32)
        tl.store(ids_ptr + slots[None, :], ids.to(tl.int64))
        tl.store(weights_ptr + slots[None, :], weights)


@triton.jit
def up_one(
    x_ptr, w_ptr, scale_ptr, shared_ptr, shared_scale_ptr, ids_ptr, act_ptr,
    D: tl.constexpr, F: tl.constexpr, S: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The act silu(gate) * up of one row, of the K picked experts [K * F] and a shared one [S].

    The shared one's programs come first: which weights they read is known before the picks are.
    """
    BLOCKS: tl.constexpr = (S + BLOCK_N - 1) // BLOCK_N
    PER_PICK: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    MASKED: tl.constexpr = D % BLOCK_K != 0
    p = tl.program_id(0)
    is_shared = p < BLOCKS
    if PDL:
        if is_shared:
            fetch(shared_ptr, p * BLOCK_N, S, D, BLOCK_N, LINES)
            fetch(shared_ptr + S * D, p * BLOCK_N, S, D, BLOCK_N, LINES)
        gdc_wait()
        gdc_launch_dependents()
    if is_shared:
        cols = p * BLOCK_N + tl.arange(0, BLOCK_N)
        width, put = S, act_ptr + K * F
        gate_at, s_at = shared_ptr, shared_scale_ptr
        gap = S
        live = True
    else:
        slot = (p - BLOCKS) // PER_PICK
        cols = (p - BLOCKS) % PER_PICK * BLOCK_N + tl.arange(0, BLOCK_N)
        e = tl.load(ids_ptr + slot)
        live = (e >= 0) & (e < E)
        e = tl.where(live, e, 0)
        width, put = F, act_ptr + slot * F
        gate_at, s_at = w_ptr + e * (2 * F * D), scale_ptr + e * (2 * F)
        gap = F
    near = cols % width
    ks = tl.arange(0, BLOCK_K)
    gate_at += near.to(tl.int64)[:, None] * D + ks[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    for k in tl.static_range(0, D, BLOCK_K):
        inside = k + ks < D
        x = tl.load(x_ptr + k + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
        gate_w = _tile(gate_at + k, inside[None, :], MASKED)
        up_w = _tile(gate_at + gap * D + k, inside[None, :], MASKED)
        gate += _folded(gate_w * x, FOLD)
        up += _folded(up_w * x, FOLD)
    g = tl.sum(gate, 1) * tl.load(s_at + near)
    u = tl.sum(up, 1) * tl.load(s_at + gap + near)
    act = tl.where(live, g * tl.sigmoid(g) * u, 0.0)
    tl.store(put + cols, act.to(act_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def down_one(
    act_ptr, w_ptr, scale_ptr, shared_ptr, shared_scale_ptr, ids_ptr, weights_ptr, plus_ptr,
    out_ptr,
    D: tl.constexpr, F: tl.constexpr, S: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr, HELD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Residual + shared part + sum over picks of weight * down @ act, of one row.

    The shared part's first HELD blocks of weights come into registers while up still runs.
    """
    first = tl.program_id(0) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    near = cols % D
    ks = tl.arange(0, BLOCK_K)
    MASKED: tl.constexpr = S % BLOCK_K != 0
    w_at = shared_ptr + near.to(tl.int64)[:, None] * S + ks[None, :]
    held = ()
    for k in tl.static_range(0, HELD):
        at = k * BLOCK_K + ks
        held += (_packed(w_at + k * BLOCK_K, (at < S)[None, :], MASKED),)
    if PDL:
        gdc_launch_dependents()
        fetch(shared_ptr, first, D, S, BLOCK_N, LINES)
        gdc_wait()
    total = tl.load(plus_ptr + near).to(tl.float32)
    part = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    for k in tl.static_range(0, HELD):
        at = k * BLOCK_K + ks
        a = tl.load(act_ptr + K * F + at, mask=at < S, other=0.0).to(tl.float32)
        part += _folded(_wide(held[k]) * a[None, :], FOLD)
    for start in tl.range(HELD * BLOCK_K, S, BLOCK_K, loop_unroll_factor=4):
        inside = start + ks < S
        w = _tile(w_at + start, inside[None, :], MASKED)
        a = tl.load(act_ptr + K * F + start + ks, mask=inside, other=0.0).to(tl.float32)
        part += _folded(w * a[None, :], FOLD)
    total += tl.sum(part, 1) * tl.load(shared_scale_ptr + near)
    sums = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    for slot in tl.range(0, K):
        e = tl.load(ids_ptr + slot)
        live = (e >= 0) & (e < E)
        e = tl.where(live, e, 0)
        weight = tl.load(weights_ptr + slot, mask=live, other=0.0)
        w_at = w_ptr + e * (D * F) + near.to(tl.int64)[:, None] * F + ks[None, :]
        part = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
        for k in tl.static_range(0, F, BLOCK_K):
            inside = k + ks < F
            w = _tile(w_at + k, inside[None, :], F % BLOCK_K != 0)
            a = tl.load(act_ptr + slot * F + k + ks, mask=inside, other=0.0).to(tl.float32)
            part += _folded(w * a[None, :], FOLD)
        sums += part * (weight * tl.load(scale_ptr + e * D + near))[:, None]
    total += tl.sum(sums, 1)
    tl.store(out_ptr + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def norm_rounded(
    x_ptr, norm_ptr, normed_ptr, value_ptr, scale_ptr,
    C: tl.constexpr, BLOCK_C: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Rows over their root mean square times a weight, as e4m3 with a scale; KEEP: in 16 bits too.

    A row is read once.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    live = cols < C
    x = tl.load(x_ptr + row * C + cols, mask=live, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / C + EPS)
    x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    x *= tl.load(norm_ptr + cols, mask=live, other=0.0).to(tl.float32)
    x = x.to(x_ptr.dtype.element_ty)
    if KEEP:
        tl.store(normed_ptr + row * C + cols, x, mask=live)
    x = x.to(tl.float32)
    scale = _scale(tl.abs(x).to(tl.int32, bitcast=True))
    _put_rounded(value_ptr + row * C + cols, x, scale, live, C, False)
    tl.store(scale_ptr + row, scale)


@triton.jit
def sum_added(
    y_ptr, ids_ptr, weights_ptr, more_ptr, plus_ptr, out_ptr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = plus[t] + more[t] + sum over k of weight * y[t * K + k]; null picks are skipped."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids_ptr + t * K + k)
        live = (e >= 0) & (e < E)
        y = tl.load(
            y_ptr + (t * K + k) * D + cols,
            mask=live & inside,
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        acc += y * tl.load(weights_ptr + t * K + k, mask=live, other=0.0).to(tl.float32)
    acc += tl.load(more_ptr + t * D + cols, mask=inside, other=0.0).to(tl.float32)
    acc += tl.load(plus_ptr + t * D + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + cols, acc.to(out_ptr.dtype.element_ty), mask=inside)
