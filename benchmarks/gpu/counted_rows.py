"""Hopper row products whose programs take their tiles from a counter, to compare with the others.

As `mogul.kernels.triton.hopper_kernels`, with another loader and another loop around it.  The
loader takes tiles in order from a counter of the sort's head and writes for the multipliers what
they must know of each: programs that got shorter tiles take more of them, and none can run far
ahead of the others, so nothing has to keep them in step.
"""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from mogul.kernels.triton.hopper_kernels import (
    DOWN_GRAD,
    UP,
    _clear_after,
    _load_pair,
    _load_pre,
    _skip,
    _tile_at,
    _tile_grad,
    _tile_product,
    follow_the_last_launch,
    last_width,
)

AHEAD = gl.constexpr(6)
"""Steps before the end of a tile at which the loader takes its next one."""
TURNS = gl.constexpr(8)
"""Tiles that the loader may have told of at once."""


@gluon.jit
def _take_tile(counter_ptr, num_tiles):
    """The next tile that no program has; who takes the last leaves the counter at 0."""
    taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if taken == num_tiles - 1:
        gl.store(counter_ptr, 0)
    return taken + gl.num_programs(0)


@gluon.jit
def _tell(entries, turn, start, end, n):
    """Leave a tile's rows and columns for the multipliers, who look when its first step is full.

    The ring is shorter than TURNS steps, so the entry written over has been read.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    at = gl.arange(0, 4, layout)
    entry = gl.where(at == 0, start, gl.where(at == 1, end, n))
    entries.index(turn % TURNS).store(entry)
    gl.thread_barrier()


@gluon.jit
def _told(entries, turn, full, step, STAGES: gl.constexpr):
    """First row, end row and column tile of a multiplier's next tile; no column: there is none."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    at = gl.arange(0, 4, layout)
    entry = entries.index(turn % TURNS).load(layout)
    start = gl.sum(gl.where(at == 0, entry, 0), 0)
    end = gl.sum(gl.where(at == 1, entry, 0), 0)
    n = gl.sum(gl.where(at == 2, entry, 0), 0)
    return start, end, n


@gluon.jit
def _load(
    a_ptr, a_desc, w_desc, pre_desc, order_ptr, head_ptr, tiles_ptr, a_ring, b_ring, full, free,
    pre, pre_full, pre_free, entries,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, COUNTER: gl.constexpr,
):  # fmt: skip
    """Load weights [columns, BLOCK_K] and rows [BLOCK_T, BLOCK_K], every step of its tiles."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    num_m = gl.load(head_ptr + E + 1)
    NUM_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_bytes: gl.constexpr = 0 if GATHER else BLOCK_T * BLOCK_K * 2
    num_k: gl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    # the multipliers have left the last tile when the ring has gone round once
    pre_at: gl.constexpr = min(STAGES + 1, num_k - 1) * BLOCK_K
    take_at: gl.constexpr = max(num_k - AHEAD, 0) * BLOCK_K
    step = 0
    turn = 0
    num_tiles = num_m * NUM_N
    tile = gl.program_id(0)
    e, start, end, n = _tile_at(tile, num_tiles, num_m, tiles_ptr, NUM_N, BLOCK_GROUP)
    next_tile, next_e, next_start, next_end, next_n = tile, e, start, end, n
    while tile < num_tiles:
        _tell(entries, turn, start, end, n)
        if GATHER:
            rows = start + gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
            live = rows < end
            token = gl.load(order_ptr + rows, mask=live, other=0) // K
            cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
            at = a_ptr + token.to(gl.int64)[:, None] * C + cols[None, :]
            keep = live[:, None] & (cols >= 0)[None, :]
        for k in range(0, C, BLOCK_K):
            if k == take_at:
                next_tile = _take_tile(head_ptr + E + 1 + COUNTER, num_tiles)
                next_e, next_start, next_end, next_n = _tile_at(
                    next_tile, num_tiles, num_m, tiles_ptr, NUM_N, BLOCK_GROUP
                )
            if GATHER and C % BLOCK_K != 0:
                # behind a row lies the next one, which would meet the next expert's weights
                keep = live[:, None] & (k + cols < C)[None, :]
            if MODE == DOWN_GRAD and k == pre_at:
                # before the step itself: no multiplier can be done with the tile earlier
                _load_pre(pre_desc, start, n, turn, pre, pre_full, pre_free, N)
            s = step % STAGES
            mbarrier.wait(free.index(s), (step // STAGES + 1) & 1)
            ready = full.index(s)
            b = b_ring.index(s)
            if MODE == UP:
                _load_pair(w_desc, e * 2 * N + n * BLOCK_N, k, n == NUM_N - 1, ready, b, N, BLOCK_N)
            else:
                mbarrier.expect(ready, BLOCK_N * BLOCK_K * 2 + row_bytes)
                at_w = [e * C + k, n * BLOCK_N] if TRANSPOSED else [e * N + n * BLOCK_N, k]
                tma.async_copy_global_to_shared(w_desc, at_w, ready, b)
            if GATHER:
                async_copy.async_copy_global_to_shared(a_ring.index(s), at + k, mask=keep)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            else:
                tma.async_copy_global_to_shared(a_desc, [start, k], ready, a_ring.index(s))
            step += 1
        tile, e, start, end, n = next_tile, next_e, next_start, next_end, next_n
        turn += 1
    s = step % STAGES
    mbarrier.wait(free.index(s), (step // STAGES + 1) & 1)
    _tell(entries, turn, 0, 0, -1)
    arrivals: gl.constexpr = 1 + (gl.num_warps() * 32 if GATHER else 0)
    mbarrier.arrive(full.index(s), count=arrivals)


@gluon.jit
def _multiply(
    PART: gl.constexpr, out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, num_slots, order_ptr,
    head_ptr, a_ring, b_ring, full, free, pre, pre_full, pre_free, entries,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, E: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, SAVE: gl.constexpr,
    NARROW: gl.constexpr,
):  # fmt: skip
    """Multiplier PART (0 or 1): its half of the rows of every tile."""
    HALF: gl.constexpr = BLOCK_T // 2
    OFFSET: gl.constexpr = PART * HALF
    LAST: gl.constexpr = last_width(N, BLOCK_N) if NARROW else BLOCK_N
    product: gl.constexpr = _tile_grad if MODE == DOWN_GRAD else _tile_product
    NUM_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_k: gl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    if MODE == DOWN_GRAD and PART == 0:  # noqa: SIM102 (decided when compiled)
        if gl.program_id(0) == 0:
            _clear_after(gl.load(head_ptr + E), num_slots, out_ptr, dpre_ptr, N)
    step = 0
    turn = 0
    start, end, n = _told(entries, turn, full, step, STAGES)
    while n >= 0:
        if start + OFFSET >= end:
            _skip(step, full, free, C, BLOCK_K, STAGES)
            if MODE == DOWN_GRAD:
                mbarrier.arrive(pre_free)
        elif LAST < BLOCK_N and n == NUM_N - 1:
            product(
                HALF, OFFSET, LAST, start, end, n, step, turn, out_ptr, pre_ptr, dpre_ptr,
                weights_ptr, part_ptr, num_slots, order_ptr, a_ring, b_ring, full, free, pre,
                pre_full, pre_free, MODE, N, C, BLOCK_N, BLOCK_K, STAGES, GATHER, TRANSPOSED, SAVE,
            )  # fmt: skip
        else:
            product(
                HALF, OFFSET, BLOCK_N, start, end, n, step, turn, out_ptr, pre_ptr, dpre_ptr,
                weights_ptr, part_ptr, num_slots, order_ptr, a_ring, b_ring, full, free, pre,
                pre_full, pre_free, MODE, N, C, BLOCK_N, BLOCK_K, STAGES, GATHER, TRANSPOSED, SAVE,
            )  # fmt: skip
        step += num_k
        turn += 1
        start, end, n = _told(entries, turn, full, step, STAGES)


@gluon.jit(do_not_specialize=["num_slots"])
def row_product(
    a_ptr, a_desc, w_desc, pre_desc, out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, order_ptr,
    head_ptr, tiles_ptr, num_slots,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, SAVE: gl.constexpr,
    COUNTER: gl.constexpr, NARROW: gl.constexpr,
    LOAD_WARPS: gl.constexpr, LOAD_REGS: gl.constexpr, MULTIPLY_REGS: gl.constexpr,
):  # fmt: skip
    """UP: act[row] from x[token].  PRODUCT: out[slot] = a[row] @ w.  DOWN_GRAD: down_rows_grad.

    Contraction width C, N output columns; the weight is [E, N, C], or [E, C, N] when TRANSPOSED.
    Tiles are handed out by number COUNTER of the counters in the sort's head.
    NARROW computes only what is needed of a last column tile (64 or 128 columns).
    """
    dtype: gl.constexpr = a_ptr.dtype.element_ty
    wide: gl.constexpr = 2 * BLOCK_N if MODE == UP else BLOCK_N
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_T, BLOCK_K], dtype)
    b_shape: gl.constexpr = [BLOCK_K, wide] if TRANSPOSED else [wide, BLOCK_K]
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b_shape, dtype)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_K], a_layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES] + b_shape, b_layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    entries = gl.allocate_shared_memory(
        gl.int32, [TURNS, 4], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    pre, pre_full, pre_free = full, full, full  # of no use
    if MODE == DOWN_GRAD:
        pre_box: gl.constexpr = pre_desc.block_type.shape
        pre = gl.allocate_shared_memory(dtype, [4] + pre_box, pre_desc.layout)  # noqa: RUF005
        pre_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        pre_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(pre_full, 1)
        mbarrier.init(pre_free, 2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), 1 + (LOAD_WARPS * 32 if GATHER else 0))
        mbarrier.init(free.index(s), 2)
    fence_async_shared()
    follow_the_last_launch()
    gl.warp_specialize(
        [
            (_multiply, (
                0, out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, num_slots, order_ptr,
                head_ptr, a_ring, b_ring, full, free, pre, pre_full, pre_free, entries, MODE, N, C,
                E, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, GATHER, TRANSPOSED, SAVE, NARROW,
            )),
            (_multiply, (
                1, out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, num_slots, order_ptr,
                head_ptr, a_ring, b_ring, full, free, pre, pre_full, pre_free, entries, MODE, N, C,
                E, BLOCK_T, BLOCK_N, BLOCK_K, STAGES, GATHER, TRANSPOSED, SAVE, NARROW,
            )),
            (_load, (
                a_ptr, a_desc, w_desc, pre_desc, order_ptr, head_ptr, tiles_ptr, a_ring, b_ring,
                full, free, pre, pre_full, pre_free, entries, MODE, N, C, K, E, BLOCK_T, BLOCK_N,
                BLOCK_K, BLOCK_GROUP, STAGES, GATHER, TRANSPOSED, COUNTER,
            )),
        ],
        [4, LOAD_WARPS],
        [MULTIPLY_REGS, LOAD_REGS],
    )  # fmt: skip
