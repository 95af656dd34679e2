"""From a landed step to what callers see: tokens, text, log-probabilities, reasons to end."""

from __future__ import annotations

import time

import numpy as np

from mogul.core.log import log
from mogul.serve.requests import Chunk, Finish, Live, TokenLogprob
from mogul.serve.sampling import Sampled
from mogul.serve.steps import Flight, Piece

BAD_LOGITS = "the logits hold no finite number to choose from"


def take(flight: Flight) -> list[tuple[Live, Chunk]]:
    """Hand every request its new tokens; one that ended has `finish` set.

    Requests that ended since the launch (stopped, aborted) are passed over.
    """
    flight.wait()
    now_s = time.perf_counter()
    given: list[tuple[Live, Chunk]] = []
    for live, reason in flight.failed:
        if live.finish is None:
            given.append((live, fail(live, reason)))
    for piece in flight.pieces:
        _take_prompts(piece)
        _take_picks(piece)
        for live, rows in piece.draws():
            if live.finish is None:
                given.append((live, _try_give(live, rows, piece.sampled, now_s)))
    return given


def fail(live: Live, reason: str) -> Chunk:
    """End a request by an error."""
    live.finish, live.error = "error", reason
    return Chunk(live.id, "", ())


def _try_give(live: Live, rows: range, sampled: Sampled, now_s: float) -> Chunk:
    """`_give`, where an error ends this request and not the reading of everybody's step."""
    try:
        return _give(live, rows, sampled, now_s)
    except Exception as error:  # a tokenizer or a grammar that breaks on this answer
        log.warning(f"request {live.id} cannot be read: {type(error).__name__}: {error}")
        return fail(live, f"{type(error).__name__}: {error}")


def _give(live: Live, rows: range, sampled: Sampled, now_s: float) -> Chunk:
    """Add the tokens of some rows to a request until it ends."""
    new: list[int] = []
    text = ""
    first = len(live.logprobs)
    for row in rows:
        if not bool(sampled.is_valid[row]):
            return fail(live, BAD_LOGITS)
        token = int(sampled.ids[row])
        new.append(token)
        live.tokens.append(token)
        live.output_ids.append(token)
        live.times_s.append(now_s)
        if live.params.logprobs is not None:
            live.logprobs.append(logprob(sampled, row, live.params.logprobs))
        text += _advance(live, token)
        if live.finish is not None:
            break
    live.text += text
    given = tuple(live.logprobs[first:]) if live.params.logprobs is not None else None
    return Chunk(live.id, text, tuple(new), given)


def _advance(live: Live, token: int) -> str:
    """Text that a token makes certain; sets `finish` when the request ends by it."""
    finish: Finish | None = None
    is_end = token in live.end_ids
    if is_end:
        finish = "stop"
    elif len(live.output_ids) >= live.params.max_tokens:
        finish = "length"
    text = ""
    if live.stream is not None:
        if not is_end:
            text = live.stream.push(token)
        if finish is not None:
            text += live.stream.close()
        if live.stream.is_stopped:
            finish = "stop"
    if live.matcher is not None and finish is None:
        live.matcher.advance(token)
        if live.matcher.is_done:
            finish = "stop"
    live.finish = finish
    return text


def logprob(sampled: Sampled, row: int, count: int) -> TokenLogprob:
    """One token's record, with `count` of the likeliest."""
    assert sampled.logprobs is not None
    top: tuple[tuple[int, float], ...] = ()
    if count and sampled.top_ids is not None and sampled.top_logprobs is not None:
        ids = sampled.top_ids[row, :count].tolist()
        top = tuple(zip(ids, sampled.top_logprobs[row, :count].tolist(), strict=True))
    return TokenLogprob(int(sampled.ids[row]), float(sampled.logprobs[row]), top)


def _take_prompts(piece: Piece) -> None:
    """Log-probabilities of prompt tokens; what a request has already is not added again."""
    if piece.prompt is None:
        return
    at = 0
    for entry in piece.entries:
        live = entry.request
        for row in range(at, at + entry.rows - entry.draws):
            position = entry.first + 1 + row - at
            if position == len(live.prompt_logprobs):
                count = live.params.prompt_logprobs or 0
                live.prompt_logprobs.append(logprob(piece.prompt, row, count))
        at += entry.rows - entry.draws


def _take_picks(piece: Piece) -> None:
    """Picked experts of every token of requests that ask for them."""
    if piece.picks_TLK is None:
        return
    if not any(entry.request.params.routed_experts for entry in piece.entries):
        return
    picks_TLK = piece.picks_TLK.numpy().astype(np.int16)
    stand = {live.id: len(rows) for live, rows in piece.draws()}
    at = 0
    for entry in piece.entries:
        live = entry.request
        wrong = entry.draws - stand.get(live.id, entry.draws)
        if live.params.routed_experts:
            for offset in range(entry.count - wrong):
                if entry.first + offset == len(live.routed):
                    live.routed.append(picks_TLK[at + offset].copy())
        at += entry.count
