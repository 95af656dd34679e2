"""Weight gradients on Hopper with split roles (Gluon); see weight_kernels for what is computed.

One loader, two multipliers of 64 output rows each.  The side sorted by expert comes by TMA, the
other one is gathered by token with asynchronous copies; rows past an expert's end are zero there.
The TMA side may hold rows of the next expert behind the end: they meet those zeros.
"""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mogul.kernels.triton.hopper_kernels import last_width, store_columns
from mogul.kernels.triton.hopper_tile_kernels import wait_for_wave


@gluon.jit
def _place(tile, head_ptr, NUM_M: gl.constexpr, NUM_N: gl.constexpr, BLOCK_GROUP: gl.constexpr):
    """Expert, row tile, column tile, first and end row."""
    e = tile // (NUM_M * NUM_N)
    place = tile % (NUM_M * NUM_N)
    span: gl.constexpr = BLOCK_GROUP * NUM_N
    first = (place // span) * BLOCK_GROUP
    height = gl.minimum(NUM_M - first, BLOCK_GROUP)
    inside = place % span
    return (
        e,
        first + inside % height,
        inside // height,
        gl.load(head_ptr + e),
        gl.load(head_ptr + e + 1),
    )


@gluon.jit
def _load(
    left_ptr, left_desc, right_ptr, right_desc, order_ptr, head_ptr, left_ring, right_ring, full,
    free,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER_LEFT: gl.constexpr, SYNC: gl.constexpr, SLACK: gl.constexpr,
    PATIENCE: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    NUM_M: gl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pitch: gl.constexpr = M if GATHER_LEFT else N
    wide: gl.constexpr = BLOCK_M if GATHER_LEFT else BLOCK_N
    tma_bytes: gl.constexpr = (BLOCK_N if GATHER_LEFT else BLOCK_M) * BLOCK_R * 2
    lane = gl.arange(0, BLOCK_R, gl.SliceLayout(1, layout))
    step = 0
    for tile in range(gl.program_id(0), E * NUM_M * NUM_N, gl.num_programs(0)):
        _, m, n, start, end = _place(tile, head_ptr, NUM_M, NUM_N, BLOCK_GROUP)
        if SYNC > 0:
            wave = tile // gl.num_programs(0)
            wait_for_wave(head_ptr + E + 1 + SYNC, wave, E * NUM_M * NUM_N, SLACK, PATIENCE)
        cols = (m if GATHER_LEFT else n) * wide + gl.arange(0, wide, gl.SliceLayout(0, layout))
        source = left_ptr if GATHER_LEFT else right_ptr
        slot = gl.load(order_ptr + start + lane, mask=start + lane < end, other=0)
        for row in range(start, end, BLOCK_R):
            s = step % STAGES
            live = row + lane < end
            at = source + (slot // K).to(gl.int64)[:, None] * pitch + cols[None, :]
            after = row + BLOCK_R + lane
            slot = gl.load(order_ptr + after, mask=after < end, other=0)
            mbarrier.wait(free.index(s), (step // STAGES + 1) & 1)
            ready = full.index(s)
            mbarrier.expect(ready, tma_bytes)
            keep = live[:, None] & (cols < pitch)[None, :]
            if GATHER_LEFT:
                tma.async_copy_global_to_shared(
                    right_desc, [row, n * BLOCK_N], ready, right_ring.index(s)
                )
                async_copy.async_copy_global_to_shared(left_ring.index(s), at, mask=keep)
            else:
                tma.async_copy_global_to_shared(
                    left_desc, [row, m * BLOCK_M], ready, left_ring.index(s)
                )
                async_copy.async_copy_global_to_shared(right_ring.index(s), at, mask=keep)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _tile_product(
    PART: gl.constexpr, WIDTH: gl.constexpr, step, num_k, out_ptr, e, m, n,
    left_ring, right_ring, full, free,
    M: gl.constexpr, N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Half the rows of one tile, its first WIDTH columns."""
    HALF: gl.constexpr = BLOCK_M // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    acc = gl.zeros((HALF, WIDTH), gl.float32, layout)
    for k in range(num_k):
        s = (step + k) % STAGES
        mbarrier.wait(full.index(s), ((step + k) // STAGES) & 1)
        fence_async_shared()
        left = left_ring.index(s).slice(PART * HALF, HALF, dim=1).permute((1, 0))
        right = right_ring.index(s).slice(0, WIDTH, dim=1)
        acc = warpgroup_mma(left, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if k > 0:
            mbarrier.arrive(free.index((step + k - 1) % STAGES))
    acc = warpgroup_mma_wait(0, deps=[acc])
    if num_k > 0:
        mbarrier.arrive(free.index((step + num_k - 1) % STAGES))
    rows = m * BLOCK_M + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, out_layout))
    store_columns(acc, out_ptr, e.to(gl.int64) * M + rows, rows < M, n * BLOCK_N, N)


@gluon.jit
def _multiply(
    PART: gl.constexpr, out_ptr, head_ptr, left_ring, right_ring, full, free,
    M: gl.constexpr, N: gl.constexpr, E: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, NARROW: gl.constexpr,
):  # fmt: skip
    NUM_M: gl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    LAST: gl.constexpr = last_width(N, BLOCK_N) if NARROW else BLOCK_N
    step = 0
    for tile in range(gl.program_id(0), E * NUM_M * NUM_N, gl.num_programs(0)):
        e, m, n, start, end = _place(tile, head_ptr, NUM_M, NUM_N, BLOCK_GROUP)
        num_k = gl.cdiv(end - start, BLOCK_R)
        if LAST < BLOCK_N and n == NUM_N - 1:
            _tile_product(
                PART, LAST, step, num_k, out_ptr, e, m, n, left_ring, right_ring, full, free,
                M, N, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        else:
            _tile_product(
                PART, BLOCK_N, step, num_k, out_ptr, e, m, n, left_ring, right_ring, full, free,
                M, N, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        step += num_k


@gluon.jit
def split_weight_grad(
    left_ptr, left_desc, right_ptr, right_desc, out_ptr, order_ptr, head_ptr,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER_LEFT: gl.constexpr, SYNC: gl.constexpr, SLACK: gl.constexpr,
    PATIENCE: gl.constexpr, NARROW: gl.constexpr,
    LOAD_WARPS: gl.constexpr, LOAD_REGS: gl.constexpr, MULTIPLY_REGS: gl.constexpr,
):  # fmt: skip
    """out[e] [M, N] = left[rows of e].T @ right[rows of e]; one side gathered by token.

    NARROW computes only what is needed of a last column tile (64 or 128 columns).
    """
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    left_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, BLOCK_M], dtype)
    right_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_R, BLOCK_N], dtype)
    left_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_R, BLOCK_M], left_layout)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_R, BLOCK_N], right_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), 1 + LOAD_WARPS * 32)
        mbarrier.init(free.index(s), 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (
                0, out_ptr, head_ptr, left_ring, right_ring, full, free, M, N, E, BLOCK_M, BLOCK_N,
                BLOCK_R, BLOCK_GROUP, STAGES, NARROW,
            )),
            (_multiply, (
                1, out_ptr, head_ptr, left_ring, right_ring, full, free, M, N, E, BLOCK_M, BLOCK_N,
                BLOCK_R, BLOCK_GROUP, STAGES, NARROW,
            )),
            (_load, (
                left_ptr, left_desc, right_ptr, right_desc, order_ptr, head_ptr, left_ring,
                right_ring, full, free,
                M, N, K, E, BLOCK_M, BLOCK_N, BLOCK_R, BLOCK_GROUP, STAGES, GATHER_LEFT, SYNC,
                SLACK, PATIENCE,
            )),
        ],
        [4, LOAD_WARPS],
        [MULTIPLY_REGS, LOAD_REGS],
    )  # fmt: skip
