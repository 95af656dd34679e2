"""Triton kernels behind `byte_linear.py`: rows in 16 bits times a weight of whole numbers.

A 16-bit word holds number k of a column's row and number k + K / 2, each plus 128, so that both
meet neighbouring numbers of x.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mogul.kernels.triton.launch import INTERPRETED
from mogul.kernels.triton.quant_token_kernels import _folded

NATIVE = tl.constexpr(not INTERPRETED)
"""Whether PTX can be used: the interpreter knows none."""
WORD_FOLD = tl.constexpr(8)
"""Neighbouring words that one thread adds up at once."""


@triton.jit
def _as_fp16(words):
    """Both numbers of words: 1024 + byte is a byte under fp16's exponent of 1024."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, less;
        mov.b32 less, 0x64806480;
        prmt.b32 t, $2, 0x64646464, 0x4240;
        sub.f16x2 $0, t, less;
        prmt.b32 t, $2, 0x64646464, 0x4341;
        sub.f16x2 $1, t, less;
        }
        """,
        "=r,=r,r",
        [words],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _as_bf16(words):
    """The same: 128 + 7 bits under bf16's exponent of 128, less 128 or 256 by the eighth bit."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, most, less, minus;
        mov.b32 minus, 0xBF80BF80;
        prmt.b32 t, $2, 0x43434343, 0x4240;
        and.b32 most, t, 0xFF7FFF7F;
        and.b32 less, t, 0x00800080;
        xor.b32 less, less, 0x43804380;
        fma.rn.bf16x2 $0, less, minus, most;
        prmt.b32 t, $2, 0x43434343, 0x4341;
        and.b32 most, t, 0xFF7FFF7F;
        and.b32 less, t, 0x00800080;
        xor.b32 less, less, 0x43804380;
        fma.rn.bf16x2 $1, less, minus, most;
        }
        """,
        "=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def bytes_of(words, dtype: tl.constexpr):
    """The first and the second numbers of words, exactly."""
    if NATIVE:
        if dtype == tl.bfloat16:
            low, high = _as_bf16(words)
        else:
            low, high = _as_fp16(words)
    else:
        whole = words.to(tl.int32)
        low = ((whole & 255) - 128).to(dtype)
        high = (((whole >> 8) & 255) - 128).to(dtype)
    return low, high


@triton.jit
def bytes_one(
    x_ptr, w_ptr, scale_ptr, out_ptr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[0, some columns] by plain sums in fp32; BLOCK_K counts words."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = cols % N
    ks = tl.arange(0, BLOCK_K)
    HALF: tl.constexpr = K // 2
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    w_at = w_ptr + near.to(tl.int64)[:, None] * HALF + ks[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K // WORD_FOLD), tl.float32)
    for k in tl.static_range(0, HALF, BLOCK_K):
        inside = k + ks < HALF
        if HALF % BLOCK_K == 0:
            words = tl.load(w_at + k, eviction_policy="evict_first")
        else:
            words = tl.load(w_at + k, mask=inside[None, :], other=0, eviction_policy="evict_first")
        low, high = bytes_of(words, tl.float16)
        a = tl.load(x_ptr + k + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
        b = tl.load(x_ptr + HALF + k + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
        total += _folded(low.to(tl.float32) * a + high.to(tl.float32) * b, WORD_FOLD)
    out = tl.sum(total, 1) * tl.load(scale_ptr + near)
    tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["num_rows"])
def bytes_few(
    x_ptr, w_ptr, scale_ptr, out_ptr, num_rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCKS_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[row, col] of some rows.

    Programs of the same columns follow each other: one reads the weight from memory, the others
    from the cache.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = K // 2
    p = tl.program_id(0)
    cols = p // BLOCKS_T * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = p % BLOCKS_T * BLOCK_T + tl.arange(0, BLOCK_T)
    ks = tl.arange(0, BLOCK_K)
    live = rows < num_rows
    near = cols % N
    w_at = w_ptr + near.to(tl.int64)[:, None] * HALF + ks[None, :]
    x_at = x_ptr + rows.to(tl.int64)[:, None] * K + ks[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for k in tl.range(0, HALF, BLOCK_K, num_stages=STAGES):
        if HALF % BLOCK_K == 0:
            words = tl.load(w_at + k, eviction_policy="evict_first")
            a = tl.load(x_at + k, mask=live[:, None], other=0.0)
            b = tl.load(x_at + HALF + k, mask=live[:, None], other=0.0)
        else:
            inside = (k + ks < HALF)[None, :]
            words = tl.load(w_at + k, mask=inside, other=0, eviction_policy="evict_first")
            a = tl.load(x_at + k, mask=live[:, None] & inside, other=0.0)
            b = tl.load(x_at + HALF + k, mask=live[:, None] & inside, other=0.0)
        low, high = bytes_of(words, x_ptr.dtype.element_ty)
        acc = tl.dot(low, a.T, acc, input_precision="ieee")
        acc = tl.dot(high, b.T, acc, input_precision="ieee")
    acc *= tl.load(scale_ptr + near)[:, None]
    at = rows.to(tl.int64)[None, :] * N + cols[:, None]
    keep = live[None, :] & (cols < N)[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=keep)
