"""What an engine asks around each step: how many guesses, which, and what came of them.

speculator.wish(decoding)      before the step is planned, so that room is made for guesses
speculator.guess(decodes)      once the plan says how many fit
speculator.learn(...)          when the step's tokens are known
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mogul.serve.speculate.length import DraftLength, SpeculationStats
from mogul.serve.speculate.proposer import Drafting, Proposer

if TYPE_CHECKING:
    from mogul.serve.engine import Engine
    from mogul.serve.inputs import Entry


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

    def attach(self, engine: Engine) -> None:
        """Make ready for an engine whose cache is allocated, before its first step."""
        self.proposer.attach(engine)

    def observe(self, entries: Sequence[Entry]) -> None:
        """The engine's model has just computed these."""
        self.proposer.observe(entries)

    def close(self) -> None:
        """Give memory and hooks back."""
        self.proposer.close()

    def wish(self, requests: Sequence[Guessed]) -> None:
        """Set `drafts` of every decoding request: never past its last token."""
        most = self.length.choose(len(requests)) if requests else 0
        for request in requests:
            request.drafts = max(0, min(most, request.output_tokens - request.emitted - 1))

    def guess(self, requests: Sequence[Guessed]) -> None:
        """Fill `draft_ids` of planned requests with at most `drafts`, and set `drafts` to match."""
        asked = [request for request in requests if request.drafts]
        for request in requests:
            request.draft_ids = []
        if not asked:
            return
        guesses = self.proposer.propose(asked, [request.drafts for request in asked])
        for request, ids in zip(asked, guesses, strict=True):
            request.draft_ids = ids[: request.drafts]
            request.drafts = len(request.draft_ids)

    def learn(self, drafted: Sequence[int], gained: Sequence[int], seconds: float | None) -> None:
        """Take in a step.

        Args:
            drafted: guesses of each decoding request.
            gained: tokens each gained, from 1 to 1 + its guesses.
            seconds: from the end of the step before to the end of this one, guessing included;
                None where prompts were computed too, as then it tells nothing of guesses.
        """
        self.length.record(drafted, gained)
        if seconds is not None and drafted:
            self.length.time(len(drafted), -(-sum(drafted) // len(drafted)), seconds)

    def forget(self, request_id: int) -> None:
        """A request ended."""
        self.proposer.forget(request_id)

    @property
    def stats(self) -> SpeculationStats:
        """What guessing gave so far, by position."""
        return self.length.stats
