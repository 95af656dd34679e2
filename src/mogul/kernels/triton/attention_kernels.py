"""Kernels of paged attention: few queries a sequence (decode), writing pages, and shared parts.

Few queries: every worker takes an equal share of all key blocks of all sequences, whatever their
lengths, and leaves one partial result for each sequence it touched; `merge_few` adds them up. All
read lengths and tables on the device, so a captured launch serves any of them. Many queries:
`prompt_kernels`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.launch import INTERPRETED

LOG2E = tl.constexpr(1.4426950408889634)
NATIVE = tl.constexpr(not INTERPRETED)
"""Whether PTX can be used: the interpreter knows none."""
NEVER = tl.constexpr(-1.0e30)
"""Score of what may not be seen; finite, so that a row of nothing else has no NaN."""


@triton.jit
def sequence(
    starts_ptr, lengths_ptr, s, live, MAX_Q: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """First token, queries, length, first key block and number of key blocks of each of `s`.

    No blocks where there are no queries, or more than MAX_Q.
    """
    start = tl.load(starts_ptr + s, mask=live, other=0)
    queries = tl.load(starts_ptr + s + 1, mask=live, other=0) - start
    served = (queries > 0) & (queries <= MAX_Q)
    length = tl.load(lengths_ptr + s, mask=live & served, other=0)
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - queries + 1 - WINDOW, 0) // BLOCK_L
    return start, queries, length, first, (length + BLOCK_L - 1) // BLOCK_L - first


@triton.jit
def shares(
    starts_ptr, lengths_ptr, num_seqs, S: tl.constexpr, MAX_Q: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_L: tl.constexpr, WORKERS: tl.constexpr, MIN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Running end of every sequence's blocks, and how many blocks a worker takes."""
    s = tl.arange(0, S)
    count = sequence(starts_ptr, lengths_ptr, s, s < num_seqs, MAX_Q, WINDOW, BLOCK_L)[4]
    total = tl.sum(count)
    return tl.cumsum(count), total, tl.maximum(MIN_BLOCKS, (total + WORKERS - 1) // WORKERS)


@triton.jit
def key_block(
    table_ptr, base, length, n, c,
    N: tl.constexpr, C: tl.constexpr, Z: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Positions [L] of the keys from `base` on, their offsets [L, C] in the pages, which exist."""
    pos = base + tl.arange(0, BLOCK_L)
    inside = pos < length
    if Z % BLOCK_L == 0:
        page = tl.load(table_ptr + base // Z).to(tl.int64)
        row = page * Z + (base % Z) + tl.arange(0, BLOCK_L)
    else:
        page = tl.load(table_ptr + pos // Z, mask=inside, other=0).to(tl.int64)
        row = page * Z + pos % Z
    where = row[:, None] * (N * C) + n * C + c[None, :]
    return pos, where, inside[:, None] & (c < C)[None, :]


@triton.jit
def weigh(
    q, k, peak, norm, pos, at, length, factor,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Weights of one block of keys in the running softmax of every row; how what was shrinks."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    if MASKED:
        seen = (pos[None, :] <= at[:, None]) & (pos[None, :] < length)
        if WINDOW > 0:
            seen &= pos[None, :] > at[:, None] - WINDOW
        score = tl.where(seen, score, NEVER)
    higher = tl.maximum(peak, tl.max(score, 1))
    p = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(peak - higher)
    return p, shrink, higher, norm * shrink + tl.sum(p, 1)


@triton.jit
def absorb(
    q, k, v, acc, peak, norm, pos, at, length, factor,
    WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys and values into the running softmax of every row."""
    p, shrink, higher, norm = weigh(
        q, k, peak, norm, pos, at, length, factor, WINDOW, MASKED
    )  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, norm


@triton.jit
def halves(words):
    """Both e4m3 numbers of 16-bit words as fp16."""
    if NATIVE:  # bytes 0, 2 and 1, 3 of two words: two instructions turn each pair
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            .reg .b16 a, b;
            prmt.b32 t, $2, 0, 0x3120;
            mov.b32 {a, b}, t;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        low = (((words & 0x80) << 8) | ((words & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        high = ((words & -32768) | ((words & 0x7F00) >> 1)).to(tl.float16, bitcast=True) * 256.0
    return low, high


@triton.jit
def to_page(x, scale_ptr, n, dtype: tl.constexpr, FP8: tl.constexpr):
    """What the cache holds of new keys or values."""
    if FP8:
        x = x.to(tl.float32) / tl.load(scale_ptr + n)
        ALL: tl.constexpr = tl.PropagateNan.ALL
        x = tl.minimum(tl.maximum(x, -448.0, propagate_nan=ALL), 448.0, propagate_nan=ALL)
    return x.to(dtype)


@triton.jit
def turned(
    x_ptr, at, token, keep, known, c, cos_ptr, sin_ptr, norm_ptr,
    C: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rows [R, C] at offsets `at`, normed and rotated to their tokens' positions, in fp32.

    Tokens are one a row, or one for all: keep is [R, C], `known` is of their shape.
    """
    is_left = c < C // 2
    partner = tl.where(is_left, c + C // 2, c - C // 2)
    x = tl.load(x_ptr + at[:, None] + c[None, :], mask=keep, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + at[:, None] + partner[None, :], mask=keep, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / C + EPS)[:, None]
        x *= scale * tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        y *= scale * tl.load(norm_ptr + partner, mask=c < C, other=0.0).to(tl.float32)[None, :]
    angle = token[:, None] * C + c[None, :]
    cos = tl.load(cos_ptr + angle, mask=known, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=known, other=0.0).to(tl.float32)
    return x * cos + tl.where(is_left[None, :], -y, y) * sin


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_few(
    q_ptr, key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, tables_ptr, starts_ptr,
    lengths_ptr, key_scale_ptr, value_scale_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, acc_ptr,
    stat_ptr, num_seqs, table_stride,
    S: tl.constexpr, N: tl.constexpr, G: tl.constexpr, C: tl.constexpr, C_POW2: tl.constexpr,
    Z: tl.constexpr, MAX_Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_L: tl.constexpr,
    WORKERS: tl.constexpr, MIN_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    FP8: tl.constexpr, Q_T: tl.constexpr, Q_H: tl.constexpr, K_T: tl.constexpr, K_N: tl.constexpr,
    V_T: tl.constexpr, V_N: tl.constexpr, WRITE: tl.constexpr, STAGES: tl.constexpr,
    TURN: tl.constexpr, NORM: tl.constexpr, Q_EPS: tl.constexpr, K_EPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Worker `program_id(0)` of key head `program_id(1)`: partial sums of the blocks it owns.

    The owner of a new token's position also writes its key and value into the page. With TURN
    queries and new keys come as their products left them.
    """
    if PDL:
        gdc_launch_dependents()  # whose weights then come while this runs
        gdc_wait()
    w = tl.program_id(0)
    n = tl.program_id(1)
    ends, total, chunk = shares(
        starts_ptr, lengths_ptr, num_seqs, S, MAX_Q, WINDOW, BLOCK_L, WORKERS, MIN_BLOCKS
    )
    c = tl.arange(0, C_POW2)
    r = tl.arange(0, ROWS)
    factor = SCALE * LOG2E
    if FP8:
        factor = tl.load(key_scale_ptr + n)  # the rest of it is in the queries
    b = w * chunk
    stop = tl.minimum(b + chunk, total)
    while b < stop:
        s = tl.sum((ends <= b).to(tl.int32))
        start, queries, length, first, count = sequence(
            starts_ptr, lengths_ptr, s, True, MAX_Q, WINDOW, BLOCK_L
        )
        end = tl.sum(tl.where(tl.arange(0, S) == s, ends, 0))
        shift = first - (end - count)
        low = b + shift
        high = tl.minimum(stop, end) + shift
        new = length - queries
        if WRITE and high * BLOCK_L > new:
            for i in range(queries):
                pos_i = new + i
                token = (start + i).to(tl.int64)
                slot = tl.load(slots_ptr + token)
                mine = (pos_i >= low * BLOCK_L) & (pos_i < high * BLOCK_L) & (slot >= 0)
                keep = mine & (c < C)
                to = slot * (N * C) + n * C + c
                if TURN:
                    row = token + tl.zeros((1,), tl.int64)
                    k_new = tl.sum(
                        turned(
                            key_ptr, row * K_T + n * K_N, row, keep[None, :], keep[None, :], c,
                            cos_ptr, sin_ptr, k_norm_ptr, C, K_EPS, NORM,
                        ), 0,
                    ).to(key_ptr.dtype.element_ty)  # fmt: skip
                else:
                    k_new = tl.load(key_ptr + token * K_T + n * K_N + c, mask=keep, other=0.0)
                v_new = tl.load(value_ptr + token * V_T + n * V_N + c, mask=keep, other=0.0)
                k_new = to_page(k_new, key_scale_ptr, n, key_cache_ptr.dtype.element_ty, FP8)
                v_new = to_page(v_new, value_scale_ptr, n, value_cache_ptr.dtype.element_ty, FP8)
                tl.store(key_cache_ptr + to, k_new, mask=keep)
                tl.store(value_cache_ptr + to, v_new, mask=keep)
            tl.debug_barrier()
        i = r // G
        live = (i < queries) & (r < G * MAX_Q)
        q_at = (start + i).to(tl.int64) * Q_T + (n * G + r % G) * Q_H
        q_keep = live[:, None] & (c < C)[None, :]
        if TURN:
            token = (start + i).to(tl.int64)
            known = q_keep
            if MAX_Q == 1:
                token = start.to(tl.int64) + tl.zeros((1,), tl.int64)
                known = (c < C)[None, :]
            q = turned(
                q_ptr, q_at, token, q_keep, known, c, cos_ptr, sin_ptr, q_norm_ptr, C, Q_EPS,
                NORM,
            ).to(q_ptr.dtype.element_ty)  # fmt: skip
        else:
            q = tl.load(q_ptr + q_at[:, None] + c[None, :], mask=q_keep, other=0.0)
        at = new + i
        peak = tl.full((ROWS,), NEVER, tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        table_ptr = tables_ptr + s.to(tl.int64) * table_stride
        to = ((w + s) * N + n).to(tl.int64) * (G * MAX_Q) + r
        if FP8:
            # Values pass as pairs of neighbours: 16-bit numbers can be turned on their way.
            q = (q.to(tl.float32) * (SCALE * LOG2E)).to(tl.float16)
            half = tl.arange(0, C_POW2 // 2)
            even = tl.zeros((ROWS, C_POW2 // 2), tl.float32)
            odd = even
            for j in tl.range(low, high, num_stages=STAGES):
                pos, where, exists = key_block(
                    table_ptr, j * BLOCK_L, length, n, c, N, C, Z, BLOCK_L
                )
                _, where2, exists2 = key_block(
                    table_ptr, j * BLOCK_L, length, n, half, N, C // 2, Z, BLOCK_L
                )
                k = tl.load(key_cache_ptr + where, mask=exists, other=0.0)
                words_ptr = value_cache_ptr.to(tl.pointer_type(tl.int16))
                words = tl.load(words_ptr + where2, mask=exists2, other=0)
                p, shrink, peak, norm = weigh(
                    q, k.to(tl.float16), peak, norm, pos, at, length, factor, WINDOW, True
                )
                p = p.to(tl.float16)
                v_even, v_odd = halves(words)
                even = tl.dot(p, v_even, even * shrink[:, None], input_precision="ieee")
                odd = tl.dot(p, v_odd, odd * shrink[:, None], input_precision="ieee")
            put = acc_ptr + to[:, None] * C + 2 * half[None, :]
            keep_half = live[:, None] & (half < C // 2)[None, :]
            tl.store(put, even, mask=keep_half)
            tl.store(put + 1, odd, mask=keep_half)
        else:
            acc = tl.zeros((ROWS, C_POW2), tl.float32)
            for j in tl.range(low, high, num_stages=STAGES):
                pos, where, exists = key_block(
                    table_ptr, j * BLOCK_L, length, n, c, N, C, Z, BLOCK_L
                )
                k = tl.load(key_cache_ptr + where, mask=exists, other=0.0)
                v = tl.load(value_cache_ptr + where, mask=exists, other=0.0)
                acc, peak, norm = absorb(
                    q, k, v, acc, peak, norm, pos, at, length, factor, WINDOW, True
                )
            keep_all = live[:, None] & (c < C)[None, :]
            tl.store(acc_ptr + to[:, None] * C + c[None, :], acc, mask=keep_all)
        tl.store(stat_ptr + 2 * to, peak, mask=live)
        tl.store(stat_ptr + 2 * to + 1, norm, mask=live)
        b = tl.minimum(stop, end)


@triton.jit(do_not_specialize=["num_seqs", "num_tokens"])
def merge_few(
    acc_ptr, stat_ptr, out_ptr, starts_ptr, lengths_ptr, sinks_ptr, value_scale_ptr, num_seqs,
    num_tokens, S: tl.constexpr, N: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    C_POW2: tl.constexpr, MAX_Q: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_W: tl.constexpr,
    WORKERS: tl.constexpr, MIN_BLOCKS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[token of (sequence, query), head] from the partial sums; padding tokens become 0."""
    if PDL:
        gdc_launch_dependents()  # whose weights then come while this runs
        gdc_wait()
    x = tl.program_id(0)
    h = tl.program_id(1)
    c = tl.arange(0, C_POW2)
    s = x // MAX_Q
    i = x % MAX_Q
    padding = (x >= tl.load(starts_ptr + num_seqs)) & (x < num_tokens)
    zero = tl.zeros((C_POW2,), tl.float32).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (x.to(tl.int64) * (N * G) + h) * C + c, zero, mask=padding & (c < C))
    start, queries, _, _, count = sequence(
        starts_ptr, lengths_ptr, s, s < num_seqs, MAX_Q, WINDOW, BLOCK_L
    )
    if (i < queries) & (count > 0):
        ends, _, chunk = shares(
            starts_ptr, lengths_ptr, num_seqs, S, MAX_Q, WINDOW, BLOCK_L, WORKERS, MIN_BLOCKS
        )
        end = tl.sum(tl.where(tl.arange(0, S) == s, ends, 0))
        last = (end - 1) // chunk
        peak = tl.full((), NEVER, tl.float32)
        norm = tl.zeros((), tl.float32)
        if SINKS:
            peak = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
            norm += 1.0
        acc = tl.zeros((C_POW2,), tl.float32)
        row = i * G + h % G
        for w0 in tl.range((end - count) // chunk, last + 1, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            have = w <= last
            at = ((w + s) * N + h // G).to(tl.int64) * (G * MAX_Q) + row
            peaks = tl.load(stat_ptr + 2 * at, mask=have, other=NEVER)
            norms = tl.load(stat_ptr + 2 * at + 1, mask=have, other=0.0)
            part = tl.load(
                acc_ptr + at[:, None] * C + c[None, :],
                mask=have[:, None] & (c < C)[None, :],
                other=0.0,
            )
            higher = tl.maximum(peak, tl.max(peaks, 0))
            weight = tl.exp2(peaks - higher)
            shrink = tl.exp2(peak - higher)
            norm = norm * shrink + tl.sum(norms * weight, 0)
            acc = acc * shrink + tl.sum(part * weight[:, None], 0)
            peak = higher
        if FP8:
            acc *= tl.load(value_scale_ptr + h // G)
        to = ((start + i).to(tl.int64) * (N * G) + h) * C + c
        tl.store(out_ptr + to, (acc / norm).to(out_ptr.dtype.element_ty), mask=c < C)


@triton.jit(do_not_specialize=["num_seqs"])
def write_pages(
    q_ptr, key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, starts_ptr, key_scale_ptr,
    value_scale_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, turned_ptr, out_ptr, num_seqs,
    N: tl.constexpr, C: tl.constexpr, N_POW2: tl.constexpr, C_POW2: tl.constexpr, H: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_OUT: tl.constexpr, FP8: tl.constexpr, Q_T: tl.constexpr,
    Q_H: tl.constexpr, K_T: tl.constexpr, K_N: tl.constexpr, V_T: tl.constexpr, V_N: tl.constexpr,
    TURN: tl.constexpr, NORM: tl.constexpr, Q_EPS: tl.constexpr, K_EPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Key and value of one token into its slot; the output of a padding token becomes 0.

    With TURN the key is normed and rotated, and so are the queries, BLOCK_H of them by each further
    program of the token: both go to `turned_ptr`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    if t >= tl.load(starts_ptr + num_seqs):
        o = tl.arange(0, BLOCK_OUT)
        zero = tl.zeros((BLOCK_OUT,), tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + t * (H * C) + o, zero, mask=o < H * C)
    elif tl.program_id(1) == 0:
        slot = tl.load(slots_ptr + t)
        n = tl.arange(0, N_POW2)
        c = tl.arange(0, C_POW2)
        keep = (n < N)[:, None] & (c < C)[None, :] & (slot >= 0)
        if TURN:
            mine = (n < N)[:, None] & (c < C)[None, :]
            k = turned(
                key_ptr, t * K_T + n * K_N, t + tl.zeros((1,), tl.int64), mine, (c < C)[None, :], c,
                cos_ptr, sin_ptr, k_norm_ptr, C, K_EPS, NORM,
            ).to(key_ptr.dtype.element_ty)  # fmt: skip
        else:
            k = tl.load(key_ptr + t * K_T + (n * K_N)[:, None] + c[None, :], mask=keep, other=0.0)
        v = tl.load(value_ptr + t * V_T + (n * V_N)[:, None] + c[None, :], mask=keep, other=0.0)
        to = slot * (N * C) + (n * C)[:, None] + c[None, :]
        if TURN:
            put = turned_ptr + (t * (H + N) + H + n)[:, None] * C + c[None, :]
            tl.store(put, k, mask=mine)
        n = tl.minimum(n, N - 1)[:, None]
        k = to_page(k, key_scale_ptr, n, key_cache_ptr.dtype.element_ty, FP8)
        v = to_page(v, value_scale_ptr, n, value_cache_ptr.dtype.element_ty, FP8)
        tl.store(key_cache_ptr + to, k, mask=keep)
        tl.store(value_cache_ptr + to, v, mask=keep)
    elif TURN:
        h = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        at = tl.arange(0, C_POW2)
        wanted = (h < H)[:, None] & (at < C)[None, :]
        q = turned(
            q_ptr, t * Q_T + h * Q_H, t + tl.zeros((1,), tl.int64), wanted, (at < C)[None, :], at,
            cos_ptr, sin_ptr, q_norm_ptr, C, Q_EPS, NORM,
        ).to(turned_ptr.dtype.element_ty)  # fmt: skip
        tl.store(turned_ptr + (t * (H + N) + h)[:, None] * C + at[None, :], q, mask=wanted)


@triton.jit
def round_new(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, key_scale_ptr, value_scale_ptr, key_out_ptr,
    value_out_ptr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, K_T: tl.constexpr,
    K_N: tl.constexpr, V_T: tl.constexpr, V_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Key and value of one token as fp8 pages give them back, in rows [T, N * C]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, BLOCK)
    keep = x < N * C
    n = tl.where(keep, x // C, 0)
    k = tl.load(key_ptr + t * K_T + n * K_N + x % C, mask=keep, other=0.0)
    v = tl.load(value_ptr + t * V_T + n * V_N + x % C, mask=keep, other=0.0)
    k = to_page(k, key_scale_ptr, n, key_cache_ptr.dtype.element_ty, True).to(tl.float32)
    v = to_page(v, value_scale_ptr, n, value_cache_ptr.dtype.element_ty, True).to(tl.float32)
    k *= tl.load(key_scale_ptr + n)
    v *= tl.load(value_scale_ptr + n)
    to = t * (N * C) + x
    tl.store(key_out_ptr + to, k.to(key_out_ptr.dtype.element_ty), mask=keep)
    tl.store(value_out_ptr + to, v.to(value_out_ptr.dtype.element_ty), mask=keep)
