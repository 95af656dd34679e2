"""Which tile a program of a Hopper row product takes next, and how its multipliers learn of it.

The loader takes tiles in order from a counter of the sort, or by fixed turns, and writes for the
multipliers what they must know of each.  With a counter programs that got shorter tiles take more
of them, and none can run far ahead of the others, which would read everything from memory again.
"""

import triton.experimental.gluon as gluon
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

TURNS = gl.constexpr(8)
"""Tiles that the loader may have told of at once."""


@gluon.jit
def tile_at(
    tile, num_tiles, num_m, tiles_ptr, NUM_N: gl.constexpr, BLOCK_GROUP: gl.constexpr
):  # fmt: skip
    """Expert, first row, end row, column tile.

    Asked for ahead of time: past the end, the answer is that of the last tile.
    """
    tile = gl.maximum(gl.minimum(tile, num_tiles - 1), 0)
    span: gl.constexpr = BLOCK_GROUP * NUM_N
    first = (tile // span) * BLOCK_GROUP
    height = gl.maximum(gl.minimum(num_m - first, BLOCK_GROUP), 1)
    inside = tile % span
    entry_ptr = tiles_ptr + (first + inside % height) * 4
    return gl.load(entry_ptr), gl.load(entry_ptr + 1), gl.load(entry_ptr + 2), inside // height


@gluon.jit
def take_tile(counter_ptr, num_tiles):
    """The next tile that no program has; who takes the last leaves the counter at 0."""
    taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
    if taken == num_tiles - 1:
        gl.store(counter_ptr, 0)
    return taken + gl.num_programs(0)


@gluon.jit
def wait_for_wave(counter_ptr, wave, total, SLACK: gl.constexpr, PATIENCE: gl.constexpr):
    """Hold the loader until all programs but SLACK have begun their tile of this wave.

    Tiles that start together read the same columns together, so the cache serves all but the first.
    Only a hint: the wait is bounded, because nothing guarantees that all programs are resident.
    """
    gl.atomic_add(counter_ptr, 1, sem="relaxed")
    goal = gl.minimum((wave + 1) * gl.num_programs(0), total) - SLACK
    tries = 0
    while (gl.load(counter_ptr, volatile=True) < goal) & (tries < PATIENCE):
        tries += 1


@gluon.jit
def tell(entries, turn, start, end, n):
    """Leave a tile's rows and columns for the multipliers, who look when its first step is full.

    The ring is shorter than TURNS steps, so the entry written over has been read.
    """
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    at = gl.arange(0, 4, layout)
    entry = gl.where(at == 0, start, gl.where(at == 1, end, n))
    entries.index(turn % TURNS).store(entry)
    gl.thread_barrier()


@gluon.jit
def told(entries, turn, full, step, STAGES: gl.constexpr):
    """First row, end row and column tile of a multiplier's next tile; no column: there is none."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    at = gl.arange(0, 4, layout)
    entry = entries.index(turn % TURNS).load(layout)
    start = gl.sum(gl.where(at == 0, entry, 0), 0)
    end = gl.sum(gl.where(at == 1, entry, 0), 0)
    n = gl.sum(gl.where(at == 2, entry, 0), 0)
    return start, end, n
