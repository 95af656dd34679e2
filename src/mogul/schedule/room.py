"""Where tokens stand while their requests run: what the policy asks, and counting in tokens.

The policy never sees pages, only whether a request may come in, how many tokens fit, and that it
left. The engine answers from its pages, the simulator from a plain count (`TokenRoom`). Whoever
comes in is promised room for everything it must compute before its next token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mogul.schedule.policy import Request


class Room(Protocol):
    """The cache as the policy sees it."""

    def admit(self, request: Request, *, is_alone: bool) -> bool:
        """Take a request in and set `computed` to what the cache holds of it; or say no.

        With `is_alone` nobody else runs, so only what can never fit is turned away.
        """
        ...

    def fit(self, request: Request, tokens: int) -> int:
        """Make room for up to `tokens` tokens after the computed ones; returns how many fit."""
        ...

    def release(self, request: Request) -> None:
        """Forget a request that leaves or gives way."""
        ...


class TokenRoom:
    """Room counted in tokens: no pages, no sharing."""

    def __init__(self, cache_tokens: int, watermark: float) -> None:
        self.cache_tokens = cache_tokens
        self.watermark = watermark
        self.used = 0
        self._held: dict[int, int] = {}
        self._promised: dict[int, int] = {}
        self._sum_promised = 0

    def admit(self, request: Request, *, is_alone: bool) -> bool:
        """Whether the goal of the request fits beside what is held and promised."""
        growing = len(self._held) - len(self._promised)  # one token each for those that decode
        free = self.cache_tokens * (1 - self.watermark)
        free -= self.used + self._sum_promised + growing
        if request.goal > free and not is_alone:
            return False
        request.computed = min(request.cached_prefix, request.goal - 1)
        self._held[request.id] = request.computed
        self.used += request.computed
        self._promised[request.id] = request.goal - request.computed
        self._sum_promised += request.goal - request.computed
        return True

    def fit(self, request: Request, tokens: int) -> int:
        """As many tokens as are free."""
        held = self._held[request.id]
        grown = request.computed + tokens - held
        if grown <= 0:
            return tokens
        if (lacking := grown - self.cache_tokens + self.used) > 0:
            grown -= lacking
            tokens -= lacking
        self._held[request.id] = held + grown
        self.used += grown
        if self._promised and (promised := self._promised.get(request.id)) is not None:
            left = max(0, promised - grown)
            self._sum_promised -= promised - left
            self._promised[request.id] = left
            if not left:
                del self._promised[request.id]
        return tokens

    def release(self, request: Request) -> None:
        """Give back everything the request held."""
        self.used -= self._held.pop(request.id)
        self._sum_promised -= self._promised.pop(request.id, 0)
