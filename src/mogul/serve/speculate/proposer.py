"""What every way of guessing tokens has in common, and what those with a cache share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mogul.serve.params import SamplingRow

if TYPE_CHECKING:
    from torch import Tensor

    from mogul.serve.engine import Engine
    from mogul.serve.inputs import Entry
    from mogul.serve.requests import Live
    from mogul.serve.runner import Runner


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


class Proposer:
    """Guesses the next tokens of requests."""

    def token_bytes(self, runner: Runner) -> int:
        """Bytes of one token in pages of its own, beside those of the engine's runner."""
        del runner
        return 0

    def work_bytes(self, runner: Runner, step_tokens: int, captured_tokens: int) -> int:
        """Bytes on an accelerator besides pages, of its largest steps, eager and captured."""
        del runner, step_tokens, captured_tokens
        return 0

    def attach(self, engine: Engine) -> None:
        """Make ready for an engine, before its first step."""

    def warm_up(self) -> None:
        """Capture what can be: the engine's steps are compiled and captured by now."""

    def observe(self, entries: Sequence[Entry], next_count: int) -> None:
        """The engine's model has just computed these; the next step may ask for so many guesses."""

    def follow(self, ids_R: Tensor) -> None:
        """These tokens were drawn from the step just observed, and lie on the device."""

    def skip(self) -> None:
        """The next step asks for no guesses."""

    def propose(self, requests: Sequence[Drafting], counts: Sequence[int]) -> list[list[int]]:
        """At most `counts[i]` guesses for request i; fewer, or none, where it has no guess.

        All of a request's guesses are token ids, or all are numbers below 0 (see `inputs.Entry`)
        that `settle` turns into token ids once the step that verifies them has landed.
        """
        raise NotImplementedError

    def settle(self, guesses: Sequence[int]) -> list[int]:
        """Token ids of guesses that lay on the device."""
        raise NotImplementedError

    def forget(self, request_id: int) -> None:
        """A request ended: drop what was kept of it."""

    def close(self) -> None:
        """The engine is closed: give memory and hooks back."""


@dataclass
class _Trail:
    length: int
    """Positions computed with known tokens."""

    guessed: list[int]
    """Tokens taken as said at the positions after them."""

    epoch: int
    """Preemptions so far: the pages of an earlier epoch are gone."""


class Trails:
    """How much of each request a proposer's own pages hold."""

    def __init__(self) -> None:
        self._trails: dict[int, _Trail] = {}

    def valid(self, request: Live, most: int) -> int:
        """Positions whose keys and values are those of the request's tokens, at most `most`."""
        trail = self._trails.get(request.id)
        if trail is None or trail.epoch != request.num_preempted:
            return 0
        length = trail.length
        for token in trail.guessed:
            if length >= len(request.tokens) or request.tokens[length] != token:
                break
            length += 1
        return min(length, most)

    def leave(self, request: Live, length: int, guessed: list[int]) -> None:
        """Remember what was computed now."""
        self._trails[request.id] = _Trail(length, guessed, request.num_preempted)

    def forget(self, request_id: int) -> None:
        """A request ended."""
        self._trails.pop(request_id, None)


def guess_row(request: Live, guesses: list[int]) -> SamplingRow:
    """How a guess is drawn: as the model's own draw at that position, with its random number.

    The same number makes guess and draw equal more often than two draws of their own would.
    """
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        prompt_ids=request.prompt_ids,
        output_ids=[*request.output_ids, *guesses],
        end_ids=tuple(request.end_ids),
    )
