"""What an engine asks around each step: how many guesses, which, and what came of them.

speculator.next_count(n)       how many guesses the next step asks for; 0 lets the host run ahead
speculator.wish(decoding)      before the step is planned, so that room is made for guesses
speculator.guess(decodes)      once the plan says how many fit
speculator.observe(entries)    while the results of a step lie on the device
speculator.follow(ids)         when its tokens are drawn and on their way to the host
speculator.learn(...)          when they are known
speculator.timed(...)          when the step is over

A guesser that fails is given up, with a line that says so, and no request ends by it: guesses may
be wrong, so they may be missing too. Ranks of one engine cannot give up one by one: they end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from mogul.core.log import log
from mogul.serve.speculate.length import DraftLength, SpeculationStats
from mogul.serve.speculate.proposer import Drafting, Proposer

if TYPE_CHECKING:
    from torch import Tensor

    from mogul.serve.engine import Engine
    from mogul.serve.inputs import Entry
    from mogul.serve.runner import Runner

T = TypeVar("T")


class Guessed(Drafting, Protocol):
    """A request of the engine."""

    drafts: int
    draft_ids: list[int]
    emitted: int
    output_tokens: int


class Speculator:
    """A proposer with the number of guesses that pays."""

    def __init__(self, proposer: Proposer, length: DraftLength) -> None:
        self.proposer = proposer
        self.length = length
        self.asked = 0
        """Guesses a request that the step now planned or running asked for."""

        self.has_failed = False
        """Whether the proposer broke and nothing is guessed any more."""

        self._wanted: dict[int, int] = {}
        self._is_steady = False
        """Whether nothing but decoding like this step's came right before it."""

        self._has_changed = False
        self._last_s = 0.0

    def token_bytes(self, runner: Runner) -> int:
        """Bytes of one token in pages that the proposer keeps beside the engine's."""
        return self.proposer.token_bytes(runner)

    def work_bytes(self, runner: Runner, step_tokens: int, captured_tokens: int) -> int:
        """Bytes of the proposer's work beside the engine's."""
        return self.proposer.work_bytes(runner, step_tokens, captured_tokens)

    def attach(self, engine: Engine) -> None:
        """Make ready for an engine whose cache is allocated, before its first step."""
        self.proposer.attach(engine)

    def warm_up(self) -> None:
        """Capture what can be, when the engine's own steps are."""
        self.proposer.warm_up()

    def close(self) -> None:
        """Give memory and hooks back."""
        self.proposer.close()

    def next_count(self, batch: int) -> int:
        """Guesses a request that the next step of so many requests asks for."""
        return self.length.choose(batch) if batch and not self.has_failed else 0

    def _try(self, call: Callable[[], T], otherwise: T) -> T:
        """What the proposer says; where it breaks, it is never asked again."""
        if self.has_failed:
            return otherwise
        try:
            return call()
        except Exception as error:  # whatever it is, the requests go on without guesses
            if self.length.agree is not None:
                raise
            self.has_failed = True
            log.warning(f"guessing is given up: {type(error).__name__}: {error}")
            return otherwise

    def wish(self, requests: Sequence[Guessed]) -> None:
        """Set `drafts` of every decoding request: never past its last token."""
        asked = self.next_count(len(requests))
        self._has_changed = self._is_steady and asked != self.asked
        self._is_steady = self._is_steady and asked == self.asked
        self.asked = asked
        if not asked:
            self._try(self.proposer.skip, None)
        else:
            for request in requests:
                request.drafts = max(0, min(asked, request.output_tokens - request.emitted - 1))

    def guess(self, requests: Sequence[Guessed]) -> None:
        """Fill `draft_ids` of planned requests with at most `drafts`, and set `drafts` to match."""
        if not self.asked:
            return
        asked = [request for request in requests if request.drafts]
        self._wanted = {request.id: request.drafts for request in asked}
        for request in requests:
            request.draft_ids = []
        if not asked:
            return
        counts = [request.drafts for request in asked]
        nothing: list[list[int]] = [[] for _ in asked]
        guesses = self._try(lambda: self.proposer.propose(asked, counts), nothing)
        for request, ids in zip(asked, guesses, strict=True):
            request.draft_ids = ids[: request.drafts]
            request.drafts = len(request.draft_ids)

    def observe(self, entries: Sequence[Entry]) -> None:
        """The engine's model has just computed these; passed on unless guesses do not pay."""
        is_decode = all(entry.count == entry.draws for entry in entries)
        if is_decode and self.length.is_off(len(entries)):
            return
        next_count = self.next_count(len(entries)) if is_decode else 0
        self._try(lambda: self.proposer.observe(entries, next_count), None)

    def follow(self, ids_R: Tensor) -> None:
        """The tokens that a step drew, still on the device: guess on from them, if it can be."""
        self._try(lambda: self.proposer.follow(ids_R), None)

    def settle(self, requests: Sequence[Guessed]) -> None:
        """The step has landed: replace guesses that lay on the device by their token ids.

        Where they cannot be read they stay numbers below 0, which no token equals: they fell.
        """
        for request in requests:
            ids = request.draft_ids
            if request.drafts and ids[0] < 0:
                request.draft_ids = self._try(partial(self.proposer.settle, ids), ids)

    def learn(self, requests: Sequence[Guessed], gained: Sequence[int]) -> None:
        """Take in what each decoding request gained, from 1 to 1 + its guesses."""
        wanted = [self._wanted.get(one.id, 0) for one in requests]
        self.length.record(wanted, [one.drafts for one in requests], gained)

    def timed(self, batch: int, *, is_pure: bool) -> None:
        """A step of so many decoding requests is over.

        What it took counts where the one before asked for as many guesses and prompts had no part
        in it: only then does it tell what such steps take.
        """
        now_s = time.perf_counter()
        if is_pure and self._is_steady:
            self.length.time(batch, self.asked, now_s - self._last_s)
        elif is_pure and self._has_changed:
            self.length.time_change(batch, now_s - self._last_s)
        self._is_steady, self._last_s = is_pure, now_s

    def forget(self, request_id: int) -> None:
        """A request ended."""
        self.proposer.forget(request_id)

    @property
    def stats(self) -> SpeculationStats:
        """What guessing gave so far, by position."""
        return self.length.stats
