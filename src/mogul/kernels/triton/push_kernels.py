"""Kernels that write rows into the memory of other GPUs, and sum what others have written."""

import triton
import triton.language as tl


@triton.jit
def _copy_block(source_ptr, target_ptr, count, block, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(source_ptr + at, mask=at < count)
    tl.store(target_ptr + at, words, mask=at < count)


@triton.jit(do_not_specialize=["rank"])
def push_words(
    addresses_ptr, first_ptr, second_ptr, third_ptr,
    first_words, second_words, third_words, second_at, third_at, rank, step,
    RANKS: tl.constexpr, PEERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write this rank's words into its place at every peer: the next rank first, itself last.

    A part lies at a peer as [ranks, words]; the second and third begin at `second_at` and
    `third_at`. `step` words of the first part are skipped for every peer: 0 sends all the same.
    With fewer PEERS than RANKS the rank itself is left out. Peers vary fastest, so that all links
    are busy at once; one axis holds all programs, as another would end at 65,535.
    """
    place = tl.program_id(0)
    block = place // PEERS
    peer = (rank + 1 + place % PEERS) % RANKS
    address = tl.load(addresses_ptr + peer)
    base_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
    first_blocks = tl.cdiv(first_words, BLOCK)
    second_blocks = tl.cdiv(second_words, BLOCK)
    if block < first_blocks:
        _copy_block(
            first_ptr + peer.to(tl.int64) * step,
            base_ptr + rank.to(tl.int64) * first_words,
            first_words, block, BLOCK,
        )  # fmt: skip
    elif block < first_blocks + second_blocks:
        target_ptr = base_ptr + second_at + rank.to(tl.int64) * second_words
        _copy_block(second_ptr, target_ptr, second_words, block - first_blocks, BLOCK)
    else:
        target_ptr = base_ptr + third_at + rank.to(tl.int64) * third_words
        block = block - first_blocks - second_blocks
        _copy_block(third_ptr, target_ptr, third_words, block, BLOCK)


@triton.jit(do_not_specialize=["rank"])
def sum_arrived(
    own_ptr, arrived_ptr, out_ptr, count, rank, RANKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum over ranks of what arrived from them [ranks, count]; this rank's part is `own`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    is_double: tl.constexpr = own_ptr.dtype.element_ty == tl.float64
    wide: tl.constexpr = tl.float64 if is_double else tl.float32
    total = tl.zeros((BLOCK,), wide)
    for source in tl.static_range(RANKS):
        if source == rank:
            part = tl.load(own_ptr + at, mask=inside)
        else:
            part = tl.load(arrived_ptr + source * count.to(tl.int64) + at, mask=inside)
        total += part.to(wide)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["slots", "first", "column"])
def take_picks(
    ids_ptr, weights_ptr, local_ptr, taken_ptr, slots, first, column,
    K: tl.constexpr, A: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A of K columns of picks: experts counted from `first`, E where none of the E is meant."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < slots
    source = at // A * K + column + at % A
    local = tl.load(ids_ptr + source, mask=inside, other=0) - first
    local = tl.where((local >= 0) & (local < E), local, E).to(tl.int32)
    tl.store(local_ptr + at, local, mask=inside)
    tl.store(taken_ptr + at, tl.load(weights_ptr + source, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["rank", "tokens"])
def push_sums(
    y_ptr, ids_ptr, weights_ptr, more_ptr, addresses_ptr, own_ptr, rank, tokens,
    D: tl.constexpr, K: tl.constexpr, E: tl.constexpr, RANKS: tl.constexpr,
    BLOCK_D: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The ordered weighted sum over a token's picks, written where the token came from.

    Rows of y are slots [ranks * tokens, K]; MORE adds a row for each token. A sum for a peer goes
    to its memory, [ranks, tokens, D] there; those of this rank to `own`. Peers vary fastest, so
    that the links carry sums while memory is read for others.
    """
    place = tl.program_id(0)
    peer = (rank + 1 + place % RANKS) % RANKS
    t = (place // RANKS).to(tl.int64)
    row = peer.to(tl.int64) * tokens + t
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids_ptr + row * K + k)
        live = (e >= 0) & (e < E)
        y = tl.load(y_ptr + (row * K + k) * D + cols, mask=live & (cols < D), other=0.0)
        weight = tl.load(weights_ptr + row * K + k, mask=live, other=0.0).to(tl.float32)
        acc += y.to(tl.float32) * weight
    if MORE:
        acc += tl.load(more_ptr + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = acc.to(own_ptr.dtype.element_ty)
    if peer == rank:
        tl.store(own_ptr + t * D + cols, total, mask=cols < D)
    else:
        base_ptr = tl.load(addresses_ptr + peer).to(tl.pointer_type(own_ptr.dtype.element_ty))
        base_ptr = tl.multiple_of(base_ptr, 16) + (rank.to(tl.int64) * tokens + t) * D
        tl.store(base_ptr + cols, total, mask=cols < D)
