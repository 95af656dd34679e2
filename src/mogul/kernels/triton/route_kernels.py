# ruff: noqa: SIM102 (an `if` on a constant is decided when compiled)
"""Routing in one launch: scores, picks by group, weights, rows of every expert and their offsets.

A program holds a few tokens and all columns.  A pick is an argmax over the columns that may still
be picked, the lowest first in a tie; its column then leaves.  Counts are integer atomics, so their
order doesn't matter; the last program to finish turns them into offsets.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
PROBABILITY = tl.constexpr(0)
RENORMALISED = tl.constexpr(1)


@triton.jit
def _best(choice, cols, free):
    """Column of the largest choice among the free ones, and its one-hot row."""
    value = tl.where(free, choice, float("-inf"))
    top = tl.max(value, 1)
    # a free column always wins over one that is not, even where its own value is -inf
    wins = free & (value == top[:, None])
    place = tl.min(tl.where(wins, cols[None, :], 1 << 30), 1)
    return place, cols[None, :] == place[:, None]


@triton.jit
def _best_groups(
    choice, cols, is_column,
    E: tl.constexpr, M: tl.constexpr, L: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Columns of the L groups whose two best choices sum highest."""
    SIZE: tl.constexpr = E // M
    groups = tl.arange(0, GROUPS)
    total = tl.full((choice.shape[0], GROUPS), float("-inf"), tl.float32)
    for g in tl.static_range(M):
        free = is_column & ((cols // SIZE) == g)[None, :]
        _place, taken = _best(choice, cols, free)
        best = tl.sum(tl.where(taken, choice, 0.0), 1)
        if SIZE > 1:
            _place, taken = _best(choice, cols, free & ~taken)
            best += tl.sum(tl.where(taken, choice, 0.0), 1)
        total = tl.where((groups == g)[None, :], best[:, None], total)
    allowed = is_column & (cols < 0)[None, :]
    left = (groups < M)[None, :] & (total == total)
    for _ in tl.static_range(L):
        group, taken = _best(total, groups, left)
        left = left & ~taken
        allowed = allowed | (is_column & ((cols // SIZE)[None, :] == group[:, None]))
    return allowed


@triton.jit
def _pool_shares(log, is_true, slots, K: tl.constexpr, POOLS: tl.constexpr):
    """exp(log) over its sum within each pool of K / POOLS picks; null picks count nothing."""
    SIZE: tl.constexpr = K // POOLS
    lowest: tl.constexpr = -3.4028234663852886e38
    shares = tl.zeros_like(log)
    for pool in tl.static_range(POOLS):
        inside = is_true & ((slots // SIZE) == pool)[None, :]
        top = tl.maximum(tl.max(tl.where(inside, log, float("-inf")), 1), lowest)
        part = tl.where(inside, tl.exp(log - top[:, None]), 0.0)
        total = tl.maximum(tl.sum(part, 1), 1.1754943508222875e-38)
        shares = tl.where(inside, part / total[:, None], shares)
    return shares


@triton.jit
def _best_of_each(choice, logits, scores, cols, M: tl.constexpr):
    """One pick in each of M equal groups, all at once: ids, logits and scores [T, M], one-hot."""
    SIZE: tl.constexpr = choice.shape[1] // M
    grouped = choice.reshape(choice.shape[0], M, SIZE)
    place = tl.zeros_like(grouped).to(tl.int32) + cols.reshape(M, SIZE)[None, :, :]
    wins = grouped == tl.max(grouped, 2)[:, :, None]
    ids = tl.min(tl.where(wins, place, 1 << 30), 2)
    one = place == ids[:, :, None]
    logit = tl.sum(tl.where(one, logits.reshape(choice.shape[0], M, SIZE), 0.0), 2)
    score = tl.sum(tl.where(one, scores.reshape(choice.shape[0], M, SIZE), 0.0), 2)
    return ids, logit, score, one.reshape(choice.shape[0], choice.shape[1])


@triton.jit
def scores_of(logits, is_column, SCORE: tl.constexpr):
    """Scores of fp32 logits [T, C], and what their exponentials are shares of."""
    if SCORE == SOFTMAX:
        top = tl.max(tl.where(is_column, logits, float("-inf")), 1)
        part = tl.where(is_column, tl.exp(logits - top[:, None]), 0.0)
        scores = part / tl.sum(part, 1)[:, None]
        log = logits
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
        log = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    return scores, log


@triton.jit
def weights_of(
    log_K, score_K, is_true, slots, WEIGHTING: tl.constexpr, K: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Weights of the picks [T, K] by one of three rules."""
    if WEIGHTING == PROBABILITY:
        weights = tl.where(is_true, score_K, 0.0)
    elif WEIGHTING == RENORMALISED:
        weights = _pool_shares(log_K, is_true, slots, K, 1)
    elif K == M:  # one pick a group has all of its group's weight
        weights = tl.where(is_true, 1.0, 0.0)
    else:
        weights = _pool_shares(log_K, is_true, slots, K, M)
    return weights


@triton.jit(do_not_specialize=["num_tokens"])
def route_tokens(
    logits_ptr, bias_ptr, scale_ptr, ids_ptr, weights_ptr, scores_ptr, rows_ptr, num_tokens,
    FACTOR: tl.constexpr,
    E: tl.constexpr, NULLS: tl.constexpr, M: tl.constexpr, K: tl.constexpr, LIMIT: tl.constexpr,
    SCORE: tl.constexpr, WEIGHTING: tl.constexpr, NUM_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """ids, weights [T, K], scores [T, E]; rows: count of each expert, offsets [E + 1], done."""
    C: tl.constexpr = E + NULLS
    ONE_EACH: tl.constexpr = (K == M) & (M == SLOTS) & (C == COLUMNS) & (NULLS == 0) & (LIMIT == 0)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = (tokens < num_tokens)[:, None]
    cols = tl.arange(0, COLUMNS)
    slots = tl.arange(0, SLOTS)
    is_column = is_token & (cols < C)[None, :]
    row = tokens.to(tl.int64)[:, None]
    logits = tl.load(logits_ptr + row * C + cols[None, :], mask=is_column, other=0.0)
    logits = logits.to(tl.float32)
    scores, log = scores_of(logits, is_column, SCORE)
    keep = is_token & (cols < E)[None, :]
    tl.store(scores_ptr + row * E + cols[None, :], scores, mask=keep)
    choice = scores
    if NUM_BIAS > 0:
        choice += tl.load(bias_ptr + cols, mask=cols < NUM_BIAS, other=0.0).to(tl.float32)[None, :]
    # not a number is the largest, as in torch's own picks: else no column wins and ids leave [0, E]
    choice = tl.where(choice == choice, choice, float("inf"))

    if ONE_EACH:
        ids, log_K, score_K, taken = _best_of_each(choice, log, scores, cols, M)
        used = taken & is_column
    else:
        ids = tl.full((BLOCK_T, SLOTS), E, tl.int32)
        log_K = tl.zeros((BLOCK_T, SLOTS), tl.float32)
        score_K = log_K
        used = is_column & (cols < 0)[None, :]
        if LIMIT > 0:
            free = _best_groups(choice, cols, is_column, E, M, LIMIT, GROUPS)
        for k in tl.static_range(K):
            if LIMIT == 0:
                if k % (K // M) == 0:
                    mine = (cols < E) & ((cols // (E // M)) == k // (K // M))
                    if NULLS > 0:
                        null_group = (cols - E) // (NULLS // M)
                        mine = mine | ((cols >= E) & (null_group == k // (K // M)))
                    free = is_column & mine[None, :]
            place, taken = _best(choice, cols, free)
            free = free & ~taken
            used = used | (taken & is_column)
            here = (slots == k)[None, :]
            ids = tl.where(here, tl.minimum(place, E)[:, None], ids)
            log_K = tl.where(here, tl.sum(tl.where(taken, log, 0.0), 1)[:, None], log_K)
            score_K = tl.where(here, tl.sum(tl.where(taken, scores, 0.0), 1)[:, None], score_K)

    is_true = (ids < E) & (slots < K)[None, :]
    weights = weights_of(log_K, score_K, is_true, slots, WEIGHTING, K, M) * FACTOR
    if SCALED:
        weights = weights * tl.load(scale_ptr + tl.minimum(ids, E - 1)).to(tl.float32)
    slot_at = row * K + slots[None, :]
    is_slot = is_token & (slots < K)[None, :]
    tl.store(ids_ptr + slot_at, ids.to(tl.int64), mask=is_slot)
    tl.store(weights_ptr + slot_at, weights, mask=is_slot)

    count = tl.sum(used.to(tl.int32), 0)
    tl.atomic_add(rows_ptr + cols, count, mask=(cols < E) & (count > 0))
    tl.debug_barrier()
    finished = tl.atomic_add(rows_ptr + 2 * E + 1, 1)
    if finished == tl.num_programs(0) - 1:
        total = tl.atomic_add(rows_ptr + cols, 0, mask=cols < E)
        total = tl.where(cols < E, total, 0)
        first = tl.cumsum(total, 0)
        tl.store(rows_ptr + E + cols, first - total, mask=cols < E)
        tl.store(rows_ptr + 2 * E, tl.sum(total))
