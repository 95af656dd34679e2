"""Guesses from the request's own text: what followed the last time these tokens stood here.

Costs no weights and no step of any model; pays where answers repeat their prompt (edits, quotes,
retrieved passages) or themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mogul.core.errors import ConfigError
from mogul.serve.speculate.proposer import Drafting, Proposer


@dataclass
class _Memory:
    """Where each run of tokens of one request was last seen."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Run of tokens -> position of the token after it."""

    seen: int = 0
    """Tokens whose runs are in it; a run at the very end is not, as nothing follows it yet."""


class NgramProposer(Proposer):
    """Looks up the longest run at the end of the text that stood in it before."""

    def __init__(self, longest: int = 5, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ConfigError(f"runs of {shortest} to {longest} tokens cannot be looked up")
        self.longest = longest
        self.shortest = shortest
        self._memories: dict[int, _Memory] = {}

    def propose(self, requests: Sequence[Drafting], counts: Sequence[int]) -> list[list[int]]:
        """The continuation of the latest earlier run; see `Proposer`."""
        return [self._guess(one, count) for one, count in zip(requests, counts, strict=True)]

    def forget(self, request_id: int) -> None:
        """Drop a request's memory."""
        self._memories.pop(request_id, None)

    def _guess(self, request: Drafting, count: int) -> list[int]:
        memory = self._memories.setdefault(request.id, _Memory())
        tokens = request.tokens
        self._learn(memory, tokens)
        if count < 1:
            return []
        for length in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            at = memory.after.get(tuple(tokens[-length:]))
            if at is not None:
                return self._copy(tokens, at, count)
        return []

    def _learn(self, memory: _Memory, tokens: Sequence[int]) -> None:
        """Remember the runs that end before each new token."""
        for end in range(max(memory.seen, self.shortest), len(tokens)):
            for length in range(self.shortest, min(self.longest, end) + 1):
                memory.after[tuple(tokens[end - length : end])] = end
        memory.seen = max(memory.seen, len(tokens))

    @staticmethod
    def _copy(tokens: Sequence[int], at: int, count: int) -> list[int]:
        """Tokens from `at` on; past the end of the text the repetition goes on."""
        period = len(tokens) - at
        return [tokens[at + i % period] for i in range(count)]
