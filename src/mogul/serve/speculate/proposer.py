"""What every way of guessing tokens has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafting(Protocol):
    """What a proposer may read of a request."""

    @property
    def id(self) -> int:
        """Its number."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Prompt and answer so far, all known."""
        ...


class Proposer(Protocol):
    """Guesses the next tokens of requests."""

    def propose(self, requests: Sequence[Drafting], counts: Sequence[int]) -> list[list[int]]:
        """At most `counts[i]` guesses for request i; fewer, or none, where it has no guess."""
        ...

    def forget(self, request_id: int) -> None:
        """A request ended: drop what was kept of it."""
        ...
