"""Kernels that walk tokens: the ordered sum over picks, and two launches for very few tokens."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def sum_slots(
    y_ptr, ids_ptr, weights_ptr, plus_ptr, out_ptr,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of (weight *) y[t * K + k], in the order of k; null picks are skipped.

    ADD: and plus[t], last.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids_ptr + t * K + k)
        live = (e >= 0) & (e < E)
        # evicted first: what down wrote last stays in the cache until it is read
        y = tl.load(
            y_ptr + (t * K + k) * D + cols,
            mask=live & (cols < D),
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + t * K + k, mask=live, other=0.0).to(tl.float32)
        acc += y
    if ADD:
        acc += tl.load(plus_ptr + t * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["num_slots"])
def sum_parts(
    part_ptr, ids_ptr, dweights_ptr, num_slots,
    E: tl.constexpr, PARTS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dweights[slot] = sum over column tiles of part[:, slot]; 0 for a null pick."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside = slots < num_slots
    e = tl.load(ids_ptr + slots, mask=inside, other=-1)
    live = (e >= 0) & (e < E)
    total = tl.zeros((BLOCK_S,), tl.float32)
    for n in range(PARTS):
        total += tl.load(part_ptr + n * num_slots.to(tl.int64) + slots, mask=live, other=0.0)
    tl.store(dweights_ptr + slots, total.to(dweights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def up_tokens(
    x_ptr, w_ptr, ids_ptr, act_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[slot] for each slot on its own, without a sort: for a handful of slots."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    slot = tl.program_id(1)
    e = tl.load(ids_ptr + slot)
    if (e >= 0) & (e < E):
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        x_at = x_ptr + (slot // K).to(tl.int64) * D + ks
        gate_at = w_ptr + e.to(tl.int64) * (2 * F * D) + (cols % F)[:, None] * D + ks[None, :]
        up_at = gate_at + F * D
        gate = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for k in tl.range(0, D, BLOCK_K, num_stages=STAGES):
            live = k + ks < D
            x = tl.load(x_at + k, mask=live, other=0.0).to(tl.float32)[None, :]
            keep = live[None, :] | (cols < 0)[:, None]
            gate += (
                tl.load(gate_at + k, mask=keep, other=0.0, eviction_policy="evict_first").to(
                    tl.float32
                )
                * x
            )
            up += (
                tl.load(up_at + k, mask=keep, other=0.0, eviction_policy="evict_first").to(
                    tl.float32
                )
                * x
            )
        g = tl.sum(gate, 1)
        tl.store(act_ptr + slot * F + cols, g * tl.sigmoid(g) * tl.sum(up, 1), mask=cols < F)


@triton.jit
def down_tokens(
    act_ptr, w_ptr, ids_ptr, weights_ptr, plus_ptr, out_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weight * down[e] @ act[slot]: product and combine in one launch.

    ADD: and plus[t], last.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    per_expert: tl.constexpr = (F + BLOCK_K - 1) // BLOCK_K
    for step in tl.range(0, K * per_expert, num_stages=STAGES):
        slot = t * K + step // per_expert
        at = (step % per_expert) * BLOCK_K + ks
        e = tl.load(ids_ptr + slot)
        live = (e >= 0) & (e < E) & (at < F)
        weight = tl.load(weights_ptr + slot, mask=(e >= 0) & (e < E), other=0.0).to(tl.float32)
        a = tl.load(act_ptr + slot * F + at, mask=live, other=0.0) * weight
        w_at = w_ptr + e.to(tl.int64) * (D * F) + (cols % D)[:, None] * F + at[None, :]
        keep = live[None, :] | (cols < 0)[:, None]
        acc += (
            tl.load(w_at, mask=keep, other=0.0, eviction_policy="evict_first").to(tl.float32)
            * a[None, :]
        )
    out = tl.sum(acc, 1)
    at = t.to(tl.int64) * D + cols
    if ADD:
        out += tl.load(plus_ptr + at, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=cols < D)
