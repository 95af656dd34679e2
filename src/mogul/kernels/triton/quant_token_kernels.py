"""int4 experts for very few tokens: two launches, no sort, as token_kernels has it for 16 bit.

fp8 has no such path: on an H100 it took 33 us in place of 24 (Qwen3-30B-A3B's layer, one token).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.quant_kernels import _int4_tile, _joined

FOLD = tl.constexpr(16)
"""Neighbouring products that one thread adds up at once."""


@triton.jit
def _folded(product, WIDTH: tl.constexpr):
    """[N, K] summed over WIDTH neighbours: inside a thread, so that sums take few registers."""
    return tl.sum(product.reshape(product.shape[0], product.shape[1] // WIDTH, WIDTH), 2)


@triton.jit
def up_tokens_quantised(
    x_ptr, w_ptr, scale_ptr, bias_ptr, ids_ptr, act_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot] for each slot on its own."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(1)
    e = tl.load(ids_ptr + slot)
    if (e >= 0) & (e < E):
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        near = cols % F
        e64 = e.to(tl.int64)
        x_at = x_ptr + (slot // K).to(tl.int64) * D
        w_at = w_ptr + e64 * (2 * F * (D // 2))
        s_at = scale_ptr + e64 * (2 * F * ((D + GROUP - 1) // GROUP))
        gate = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            ks = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_at + ks, mask=ks < D, other=0.0).to(tl.float32)[None, :]
            gate_w = _int4_tile(w_at, s_at, near, k, x_ptr, 2 * F, D, GROUP, BLOCK_N, BLOCK_K)
            up_w = _int4_tile(w_at, s_at, F + near, k, x_ptr, 2 * F, D, GROUP, BLOCK_N, BLOCK_K)
            gate += _folded(x * gate_w.to(tl.float32), FOLD)
            up += _folded(x * up_w.to(tl.float32), FOLD)
        g = tl.sum(gate, 1)
        u = tl.sum(up, 1)
        if BIAS:
            bias_at = bias_ptr + e64 * (2 * F) + near
            g += tl.load(bias_at).to(tl.float32)
            u += tl.load(bias_at + F).to(tl.float32)
        tl.store(act_ptr + slot * F + cols, _joined(g, u, ACT, ALPHA, LIMIT), mask=cols < F)


@triton.jit
def down_tokens_quantised(
    act_ptr, w_ptr, scale_ptr, bias_ptr, ids_ptr, weights_ptr, out_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight * (down[e] @ act[slot] + bias): product and combine in one."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = cols % D
    PER_EXPERT: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_K // FOLD), tl.float32)
    added = tl.zeros((BLOCK_N,), tl.float32)
    for step in tl.range(0, K * PER_EXPERT, num_stages=STAGES):
        slot = t * K + step // PER_EXPERT
        k = (step % PER_EXPERT) * BLOCK_K
        ks = k + tl.arange(0, BLOCK_K)
        pick = tl.load(ids_ptr + slot)
        is_true = (pick >= 0) & (pick < E)
        e64 = tl.where(is_true, pick, 0).to(tl.int64)
        weight = tl.load(weights_ptr + slot, mask=is_true, other=0.0).to(tl.float32)
        a = tl.load(act_ptr + slot * F + ks, mask=is_true & (ks < F), other=0.0) * weight
        w_at = w_ptr + e64 * (D * (F // 2))
        s_at = scale_ptr + e64 * (D * ((F + GROUP - 1) // GROUP))
        tile = _int4_tile(w_at, s_at, near, k, out_ptr, D, F, GROUP, BLOCK_N, BLOCK_K)
        acc += _folded(tile.to(tl.float32) * a[None, :], FOLD)
        if BIAS:
            first = tl.where(k == 0, weight, 0.0)
            added += first * tl.load(bias_ptr + e64 * D + near).to(tl.float32)
    out = tl.sum(acc, 1) + added
    at = out_ptr + t.to(tl.int64) * D + cols
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=cols < D)
