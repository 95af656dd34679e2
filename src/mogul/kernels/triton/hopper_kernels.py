"""Hopper row products with split roles: one loader partition, two multiplier partitions (Gluon).

The loader fills a ring of shared-memory stages: weights by TMA, rows by TMA or, where rows are
fetched by token, by asynchronous copies.  Each multiplier owns one half of the tile's rows and
skips it when no row of it is live, so a tile of 128 rows costs 64 where no more are needed.
The loader runs ahead across tiles (hopper_tile_kernels): epilogues never starve the next one.

Same results and arguments as row_kernels; used where capability is 9.0.
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

from mogul.kernels.triton import plans
from mogul.kernels.triton.hopper_tile_kernels import (
    TURNS,
    take_tile,
    tell,
    tile_at,
    told,
    wait_for_wave,
)

UP = gl.constexpr(0)
PRODUCT = gl.constexpr(1)
DOWN_GRAD = gl.constexpr(2)
AHEAD = gl.constexpr(6)
"""Steps before the end of a tile at which the loader takes its next one."""
last_width = gluon.constexpr_function(plans.last_width)


@gluon.jit
def follow_the_last_launch():
    """Wait until the launch before has written all it writes; let the next one set itself up."""
    for_no_one: gl.constexpr = "; // dummy $0"
    gl.inline_asm_elementwise(
        "griddepcontrol.wait" + for_no_one, "=r", [], gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents" + for_no_one, "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _load_pair(w_desc, row, k, is_last, ready, b, N: gl.constexpr, BLOCK_N: gl.constexpr):
    """Gate and up columns of one step, by boxes as high as the narrowest tile.

    In a narrow last tile the up columns follow the narrow gate columns at once.
    """
    BOX: gl.constexpr = w_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = w_desc.block_type.shape[1]
    if BOX < BLOCK_N and is_last:
        mbarrier.expect(ready, BOX * BLOCK_K * 4)
        tma.async_copy_global_to_shared(w_desc, [row, k], ready, b.slice(0, BOX))
        tma.async_copy_global_to_shared(w_desc, [row + N, k], ready, b.slice(BOX, BOX))
    else:
        mbarrier.expect(ready, BLOCK_N * BLOCK_K * 4)
        for part in gl.static_range(BLOCK_N // BOX):
            at = row + part * BOX
            tma.async_copy_global_to_shared(w_desc, [at, k], ready, b.slice(part * BOX, BOX))
            tma.async_copy_global_to_shared(
                w_desc, [at + N, k], ready, b.slice(BLOCK_N + part * BOX, BOX)
            )


@gluon.jit
def _load_pre(pre_desc, start, n, turn, pre, pre_full, pre_free, N: gl.constexpr):
    """Both up products of a tile, for its epilogue, as soon as the last epilogue is done."""
    ROWS: gl.constexpr = pre_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = pre_desc.block_type.shape[1]
    mbarrier.wait(pre_free, (turn + 1) & 1)
    mbarrier.expect(pre_full, 4 * ROWS * BLOCK_N * 2)
    for half in gl.static_range(4):
        at = [start + half // 2 * ROWS, n * BLOCK_N + half % 2 * N]
        tma.async_copy_global_to_shared(pre_desc, at, pre_full, pre.index(half))


@gluon.jit
def _load(
    a_ptr, a_desc, w_desc, pre_desc, order_ptr, head_ptr, tiles_ptr, a_ring, b_ring, full, free,
    pre, pre_full, pre_free, entries,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, COUNTER: gl.constexpr,
    COUNTED: gl.constexpr, SLACK: gl.constexpr, PATIENCE: gl.constexpr,
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
    e, start, end, n = tile_at(tile, num_tiles, num_m, tiles_ptr, NUM_N, BLOCK_GROUP)
    next_tile, next_e, next_start, next_end, next_n = tile, e, start, end, n
    while tile < num_tiles:
        tell(entries, turn, start, end, n)
        if COUNTER > 0 and not COUNTED:
            wait_for_wave(head_ptr + E + 1 + COUNTER, turn, num_tiles, SLACK, PATIENCE)
        if GATHER:
            rows = start + gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
            live = rows < end
            token = gl.load(order_ptr + rows, mask=live, other=0) // K
            cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
            at = a_ptr + token.to(gl.int64)[:, None] * C + cols[None, :]
            keep = live[:, None] & (cols >= 0)[None, :]
        for k in range(0, C, BLOCK_K):
            if k == take_at:
                next_tile = tile + gl.num_programs(0)
                if COUNTED:
                    next_tile = take_tile(head_ptr + E + 1 + COUNTER, num_tiles)
                next_e, next_start, next_end, next_n = tile_at(
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
    tell(entries, turn, 0, 0, -1)
    arrivals: gl.constexpr = 1 + (gl.num_warps() * 32 if GATHER else 0)
    mbarrier.arrive(full.index(s), count=arrivals)


@gluon.jit
def halves(acc):
    """Left and right half of the columns; in registers only."""
    return acc.reshape((acc.shape[0], 2, acc.shape[1] // 2)).permute((0, 2, 1)).split()


@gluon.jit
def _store(value, out_ptr, row, live, first, N: gl.constexpr, PITCH: gl.constexpr):
    """64 columns of registers to out[row, first..] where columns < N; rows are PITCH apart."""
    layout: gl.constexpr = row.type.layout.parent
    out = gl.convert_layout(value.to(out_ptr.dtype.element_ty), layout)
    cols = first + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    at = out_ptr + row[:, None] * PITCH + cols[None, :]
    gl.store(at, out, mask=live[:, None] & (cols < N)[None, :])


@gluon.jit
def store_columns(acc, out_ptr, row, live, first, N: gl.constexpr):
    """_store in pieces of 64 columns, which bounds the scratch memory."""
    if acc.shape[1] > 64:
        half: gl.constexpr = acc.shape[1] // 2
        left, right = halves(acc)
        store_columns(left, out_ptr, row, live, first, N)
        store_columns(right, out_ptr, row, live, first + half, N)
    else:
        _store(acc, out_ptr, row, live, first, N, N)


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) to some units in the last place; exp(-x) as a power of two."""
    asm: gl.constexpr = (
        "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
        " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
    )
    return gl.inline_asm_elementwise(asm, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _up_columns(gate, up, act_ptr, pre_ptr, row, live, first, F: gl.constexpr, SAVE: gl.constexpr):
    """SwiGLU of some columns, 64 at a time; SAVE also keeps both products."""
    if gate.shape[1] > 64:
        half: gl.constexpr = gate.shape[1] // 2
        gate_l, gate_r = halves(gate)
        up_l, up_r = halves(up)
        _up_columns(gate_l, up_l, act_ptr, pre_ptr, row, live, first, F, SAVE)
        _up_columns(gate_r, up_r, act_ptr, pre_ptr, row, live, first + half, F, SAVE)
    else:
        _store(gate * _sigmoid(gate) * up, act_ptr, row, live, first, F, F)
        if SAVE:
            _store(gate, pre_ptr, row, live, first, F, 2 * F)
            _store(up, pre_ptr + F, row, live, first, F, 2 * F)


@gluon.jit
def _pieces(acc, WIDTH: gl.constexpr):
    """The columns of acc, WIDTH at a time; in registers only."""
    if acc.shape[1] > WIDTH:
        left, right = halves(acc)
        return _pieces(left, WIDTH) + _pieces(right, WIDTH)
    else:  # noqa: RET505 (decided when compiled)
        return (acc,)


@gluon.jit
def _grad_piece(acc, g, u, weight, dpre_ptr, act_ptr, row, live, first, F: gl.constexpr):
    """Backward of SwiGLU for some columns; returns each row's share of d weight."""
    g = g.to(gl.float32)
    u = u.to(gl.float32)
    d = gl.convert_layout(acc, row.type.layout.parent)
    sig = _sigmoid(g)
    silu = g * sig
    act = silu * u
    share = gl.sum(d * act, 1)
    _store(act * weight[:, None], act_ptr, row, live, first, F, F)
    d = d * weight[:, None]
    _store(d * silu, dpre_ptr + F, row, live, first, F, 2 * F)
    _store(d * u * (sig + silu * (1.0 - sig)), dpre_ptr, row, live, first, F, 2 * F)
    return share


@gluon.jit
def _clear_after(total, num_slots, act_ptr, dpre_ptr, F: gl.constexpr):
    """Zero the 64 rows behind the last one: weight gradients read them against zeros."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    lane = gl.arange(0, 512, layout)
    zero = gl.zeros((512,), act_ptr.dtype.element_ty, layout)
    for row in range(total, gl.minimum(total + 64, num_slots)):
        for base in range(0, 2 * F, 512):
            cols = base + lane
            gl.store(dpre_ptr + row.to(gl.int64) * (2 * F) + cols, zero, mask=cols < 2 * F)
            gl.store(act_ptr + row.to(gl.int64) * F + cols, zero, mask=cols < F)


@gluon.jit
def _steps(
    ROWS: gl.constexpr, OFFSET: gl.constexpr, WIDE: gl.constexpr, step, a_ring, b_ring, full, free,
    C: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """Product of ROWS rows from OFFSET on with the first WIDE columns of the ring's weights."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 16])
    num_k: gl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = gl.zeros((ROWS, WIDE), gl.float32, layout)
    for k in range(num_k):
        s = (step + k) % STAGES
        mbarrier.wait(full.index(s), ((step + k) // STAGES) & 1)
        if GATHER:
            fence_async_shared()
        a = a_ring.index(s).slice(OFFSET, ROWS)
        if TRANSPOSED:
            b = b_ring.index(s).slice(0, WIDE, dim=1)
        else:
            b = b_ring.index(s).slice(0, WIDE).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        if k > 0:
            mbarrier.arrive(free.index((step + k - 1) % STAGES))
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index((step + num_k - 1) % STAGES))
    return acc


@gluon.jit
def _tile_product(
    ROWS: gl.constexpr, OFFSET: gl.constexpr, WIDTH: gl.constexpr, start, end, n, step, turn,
    out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, num_slots, order_ptr, a_ring, b_ring, full,
    free, pre, pre_full, pre_free,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """ROWS rows of a tile from row OFFSET on, WIDTH columns: all steps, then the epilogue."""
    wide: gl.constexpr = 2 * WIDTH if MODE == UP else WIDTH
    out_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = start + OFFSET + gl.arange(0, ROWS, gl.SliceLayout(1, out_layout))
    live = row < end
    if MODE == PRODUCT:
        row = gl.load(order_ptr + row, mask=live, other=0)
    acc = _steps(
        ROWS, OFFSET, wide, step, a_ring, b_ring, full, free, C, BLOCK_K, STAGES, GATHER, TRANSPOSED
    )
    row = row.to(gl.int64)
    if MODE == UP:
        gate, up = halves(acc)
        _up_columns(gate, up, out_ptr, pre_ptr, row, live, n * BLOCK_N, N, SAVE)
    else:
        store_columns(acc, out_ptr, row, live, n * BLOCK_N, N)


@gluon.jit
def _tile_grad(
    ROWS: gl.constexpr, OFFSET: gl.constexpr, WIDTH: gl.constexpr, start, end, n, step, turn,
    out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, num_slots, order_ptr, a_ring, b_ring, full,
    free, pre, pre_full, pre_free,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    """_tile_product for DOWN_GRAD; the epilogue takes 2,048 elements at a time.

    `pre` came to shared memory beside the steps. Columns of it past the width meet a product of 0.
    """
    PIECE: gl.constexpr = 2048 // ROWS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // PIECE, PIECE // 8], [4, 1], [1, 0])
    row = start + OFFSET + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    live = row < end
    slot = gl.load(order_ptr + row, mask=live, other=0)
    weight = gl.load(weights_ptr + slot, mask=live, other=0.0).to(gl.float32)
    row = row.to(gl.int64)
    acc = _steps(
        ROWS, OFFSET, WIDTH, step, a_ring, b_ring, full, free, C, BLOCK_K, STAGES, GATHER,
        TRANSPOSED,
    )  # fmt: skip
    pieces = _pieces(acc, PIECE)
    share = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, layout))
    mbarrier.wait(pre_full, turn & 1)
    gate = pre.index(2 * (OFFSET // ROWS))
    up = pre.index(2 * (OFFSET // ROWS) + 1)
    for i in gl.static_range(WIDTH // PIECE):
        g = gate.slice(i * PIECE, PIECE, dim=1).load(layout)
        u = up.slice(i * PIECE, PIECE, dim=1).load(layout)
        first = n * BLOCK_N + i * PIECE
        share += _grad_piece(pieces[i], g, u, weight, dpre_ptr, out_ptr, row, live, first, N)
    mbarrier.arrive(pre_free)
    gl.store(part_ptr + n.to(gl.int64) * num_slots + slot, share, mask=live)


@gluon.jit
def _skip(step, full, free, C: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """Pass over a tile's steps without using them."""
    num_k: gl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    for k in range(num_k):
        s = (step + k) % STAGES
        mbarrier.wait(full.index(s), ((step + k) // STAGES) & 1)
        mbarrier.arrive(free.index(s))


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
    start, end, n = told(entries, turn, full, step, STAGES)
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
        start, end, n = told(entries, turn, full, step, STAGES)


@gluon.jit(do_not_specialize=["num_slots"])
def row_product(
    a_ptr, a_desc, w_desc, pre_desc, out_ptr, pre_ptr, dpre_ptr, weights_ptr, part_ptr, order_ptr,
    head_ptr, tiles_ptr, num_slots,
    MODE: gl.constexpr, N: gl.constexpr, C: gl.constexpr, K: gl.constexpr, E: gl.constexpr,
    BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_GROUP: gl.constexpr,
    STAGES: gl.constexpr, GATHER: gl.constexpr, TRANSPOSED: gl.constexpr, SAVE: gl.constexpr,
    COUNTER: gl.constexpr, COUNTED: gl.constexpr, SLACK: gl.constexpr, PATIENCE: gl.constexpr,
    NARROW: gl.constexpr,
    LOAD_WARPS: gl.constexpr, LOAD_REGS: gl.constexpr, MULTIPLY_REGS: gl.constexpr,
):  # fmt: skip
    """UP: act[row] from x[token].  PRODUCT: out[slot] = a[row] @ w.  DOWN_GRAD: down_rows_grad.

    Contraction width C, N output columns; the weight is [E, N, C], or [E, C, N] when TRANSPOSED.
    COUNTER is the number of a counter in the sort's head, which hands out the tiles (COUNTED) or
    keeps all programs but SLACK in step (wait_for_wave); 0 for fixed turns.
    NARROW computes only what is needed of a last column tile (64 or 128 columns).
    """
    gl.static_assert(STAGES < TURNS, "a tile that is told of must not be written over")
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
                BLOCK_K, BLOCK_GROUP, STAGES, GATHER, TRANSPOSED, COUNTER, COUNTED, SLACK, PATIENCE,
            )),
        ],
        [4, LOAD_WARPS],
        [MULTIPLY_REGS, LOAD_REGS],
    )  # fmt: skip
