"""Which guesses the model itself would have said.

Decides nothing by chance of its own. The model draws a token for every guessed position exactly as
it would without guesses: same distribution (options, penalties and structure applied as if the
guesses before it had been said), same random number of the request's stream. Guesses stand as far
as they equal the draws, and the first draw that differs is kept too. So speculation changes speed
alone: greedy or sampled, the tokens of a seed are those of plain decoding, and for a guess x the
share that stands is p(x), as in rejection sampling with a certain draft (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mogul.serve.params import SamplingRow
    from mogul.serve.structured import Matcher


def draft_rows(
    row: SamplingRow, drafts: Sequence[int], matcher: Matcher | None = None
) -> list[SamplingRow]:
    """What to sample from each of a request's 1 + K rows of logits, guesses taken as said.

    Args:
        row: the request before any guess.
        drafts: its guesses.
        matcher: of a request with a structure; stands where it stood when this returns.
    """
    if not drafts:
        return [row]
    known, params = row.output_ids, row.params
    is_read = params.has_penalties
    if params.is_greedy and not is_read and matcher is None and len(known) >= params.min_tokens:
        return [row] * (len(drafts) + 1)  # nothing of a row depends on what was said before it
    rows, walked = [row], 0
    for i in range(1, len(drafts) + 1):
        said = [*known, *drafts[:i]] if is_read else range(len(known) + i)
        allowed_V = rows[-1].allowed_V
        if matcher is not None and walked == i - 1 and matcher.count_allowed(drafts[i - 1 : i]):
            matcher.advance(drafts[i - 1])
            walked = i
            allowed_V = matcher.allowed()
        rows.append(replace(row, output_ids=said, allowed_V=allowed_V))
    if matcher is not None:
        matcher.back(walked)
    return rows


def count_tokens(ids_R: Sequence[int], drafts: Sequence[Sequence[int]]) -> list[int]:
    """How many of each request's drawn tokens are its next tokens: from 1 to 1 + K.

    Args:
        ids_R: tokens drawn, 1 + K rows for a request with K guesses, one request after the other.
        drafts: the guesses of each.
    """
    counts, at = [], 0
    for guesses in drafts:
        drawn = ids_R[at : at + len(guesses)]
        falls = (i for i, pair in enumerate(zip(drawn, guesses, strict=True)) if pair[0] != pair[1])
        counts.append(1 + next(falls, len(guesses)))
        at += 1 + len(guesses)
    return counts
