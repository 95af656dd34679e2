"""A request while it lives, and what its caller gets: chunks on the way, an answer at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from mogul.schedule.policy import Request

if TYPE_CHECKING:
    from mogul.serve.params import SamplingParams
    from mogul.serve.stops import TextStream
    from mogul.serve.structured import Matcher

Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model itself thought a token, and what it thought likeliest."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Likeliest tokens with their log-probabilities, falling."""


@dataclass(frozen=True)
class Answer:
    """Everything a finished request gave."""

    id: int
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish: Finish
    error: str = ""
    """Why a request failed; empty unless `finish` is "error"."""

    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One a prompt token; None for the first, which nothing predicts."""

    routed_experts: np.ndarray | None = None
    """Picked experts of every computed token, [tokens, layers with experts, K] (int16)."""

    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""

    num_preempted: int = 0
    arrival_s: float = 0.0
    token_times_s: tuple[float, ...] = ()
    """When each token was known, on the clock of `time.perf_counter`."""


@dataclass(frozen=True)
class Chunk:
    """What a step added to one request."""

    id: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    answer: Answer | None = None
    """Set in the last chunk of a request."""


@dataclass(slots=True, eq=False)
class Live(Request):
    """A request in the engine: the numbers of the policy, its tokens, its pages."""

    params: SamplingParams = field(kw_only=True)
    prompt_ids: tuple[int, ...] = field(kw_only=True)
    seed: int = field(kw_only=True)
    root: bytes = field(kw_only=True)
    """Salt of its pages' hashes."""

    end_ids: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    """Prompt and every known token of the answer."""

    output_ids: list[int] = field(default_factory=list)
    draft_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """The pages once more, as the device wants them."""

    home: int = 0
    """Where its first page should lie: pages in a row are read faster on a processor."""

    digests: list[bytes] = field(default_factory=list)
    """Of the pages that are full of known tokens."""

    cached_tokens: int | None = None
    stream: TextStream | None = None
    matcher: Matcher | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    """Nothing predicts the first token."""

    routed: list[np.ndarray] = field(default_factory=list)
    """Picked experts, one array a token."""

    times_s: list[float] = field(default_factory=list)
    finish: Finish | None = None
    error: str = ""
    text: str = ""

    @property
    def wants_whole_prompt(self) -> bool:
        """Whether every prompt token must be computed, known pages or not."""
        return self.params.prompt_logprobs is not None or self.params.routed_experts

    @property
    def needs_results(self) -> bool:
        """Whether its next token cannot be chosen before the last one is known."""
        return (
            self.params.has_penalties
            or self.params.structure is not None
            or self.params.prompt_logprobs is not None
            or self.params.routed_experts
        )

    def answer(self) -> Answer:
        """Freeze what it gave."""
        params = self.params
        routed = None
        if params.routed_experts and self.routed:
            routed = np.stack(self.routed)
        return Answer(
            id=self.id,
            prompt_ids=self.prompt_ids,
            token_ids=tuple(self.output_ids),
            text=self.text,
            finish=self.finish or "abort",
            error=self.error,
            logprobs=tuple(self.logprobs) if params.logprobs is not None else None,
            prompt_logprobs=tuple(self.prompt_logprobs)
            if params.prompt_logprobs is not None
            else None,
            routed_experts=routed,
            cached_tokens=self.cached_tokens or 0,
            num_preempted=self.num_preempted,
            arrival_s=self.arrival_s,
            token_times_s=tuple(self.times_s),
        )
