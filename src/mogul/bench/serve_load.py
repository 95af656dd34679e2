"""Requests for measuring an engine, driven through it, with the times of every token.

Decides what a workload is: distinct prompts of random tokens, answers of one length, no end of
text, no prefix shared. Closed loop: all requests stand ready at once. Open loop: they arrive by a
Poisson process, and waiting counts from when a request should have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mogul.core.errors import ConfigError, MogulError

if TYPE_CHECKING:
    from mogul.serve import Answer, Engine, SamplingParams

FORCED_TEMPERATURE = 1000.0
"""Makes every token about equally likely: tokens at random, through the ordinary sampler."""


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine."""

    requests: int
    input_tokens: int
    output_tokens: int
    rate: float | None = None
    """Requests a second, Poisson; None lets all arrive at once."""

    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if min(self.requests, self.input_tokens) < 1 or self.output_tokens < 2:
            raise ConfigError(
                f"{self.requests} requests of {self.input_tokens} + {self.output_tokens} tokens "
                "have no time per token",
                fix="ask for 1 request, 1 input and 2 output tokens at least",
            )
        if self.rate is not None and self.rate <= 0:
            raise ConfigError(f"{self.rate} requests a second never arrive", fix="give a rate > 0")

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of every prompt; the first one numbers the request, so that all differ."""
        dice = np.random.default_rng(self.seed)
        ids = dice.integers(0, vocab_size, (self.requests, self.input_tokens))
        ids[:, 0] = (np.arange(self.requests) + self.seed * 997) % vocab_size
        return ids.tolist()

    def arrivals_s(self) -> list[float]:
        """When each request arrives, from the start."""
        if self.rate is None:
            return [0.0] * self.requests
        gaps = np.random.default_rng(self.seed + 1).exponential(1 / self.rate, self.requests)
        return (np.cumsum(gaps) - gaps[0]).tolist()

    def params(self) -> list[SamplingParams]:
        """How the tokens of each request are chosen; every one draws numbers of its own."""
        from mogul.serve import SamplingParams

        return [
            SamplingParams(
                max_tokens=self.output_tokens,
                temperature=self.temperature,
                ignore_eos=True,
                seed=self.seed * self.requests + number,
            )
            for number in range(self.requests)
        ]


@dataclass(frozen=True)
class Timeline:
    """When each request arrived and each of its tokens was known, in seconds from the start."""

    arrivals_s: tuple[float, ...]
    tokens_s: tuple[tuple[float, ...], ...]
    input_tokens: int

    def ttft_s(self) -> np.ndarray:
        """Time to the first token of each request."""
        return np.array([t[0] - at for at, t in zip(self.arrivals_s, self.tokens_s, strict=True)])

    def tpot_s(self) -> np.ndarray:
        """Time per output token after the first, of each request."""
        return np.array([(t[-1] - t[0]) / (len(t) - 1) for t in self.tokens_s])

    def itl_s(self) -> np.ndarray:
        """Every time between two tokens of a request."""
        return np.concatenate([np.diff(t) for t in self.tokens_s])

    @property
    def end_s(self) -> float:
        """When the last token was known."""
        return max(t[-1] for t in self.tokens_s)

    @property
    def output_per_s(self) -> float:
        """Output tokens a second over everything."""
        return sum(map(len, self.tokens_s)) / self.end_s

    @property
    def prefill_per_s(self) -> float:
        """Prompt tokens a second until the last request has its first token (closed loop)."""
        return len(self.tokens_s) * self.input_tokens / max(t[0] for t in self.tokens_s)

    @property
    def decoding(self) -> float:
        """Requests that decode together, on the average over the steps that decode any."""
        steps = {at for t in self.tokens_s for at in t[1:]}
        return sum(len(set(t[1:])) for t in self.tokens_s) / len(steps)

    @property
    def decode_s(self) -> float | None:
        """Time of a token while all requests decode together; None where they never do.

        From the last first token to the first last token, over the tokens gained in between.
        """
        start, stop = max(t[0] for t in self.tokens_s), min(t[-1] for t in self.tokens_s)
        gained = [sum(start < at <= stop for at in t) for t in self.tokens_s]
        return (stop - start) / (sum(gained) / len(gained)) if min(gained) > 0 else None


def drive(engine: Engine, workload: Workload) -> Timeline:
    """Run a workload to its end.

    Raises:
        MogulError: a request ended otherwise than by its length.
    """
    prompts = workload.prompts(engine.runner.vocab_size)
    arrivals_s, params = workload.arrivals_s(), workload.params()
    answers: dict[int, Answer] = {}
    numbers: list[int] = []
    start_s = time.perf_counter()
    while len(answers) < len(prompts):
        now_s = time.perf_counter() - start_s
        while len(numbers) < len(prompts) and arrivals_s[len(numbers)] <= now_s:
            numbers.append(engine.add(prompts[len(numbers)], params[len(numbers)]))
        if not engine.has_work:
            time.sleep(max(0.0, arrivals_s[len(numbers)] - now_s))
            continue
        for chunk in engine.step():
            if chunk.answer is not None:
                answers[chunk.id] = chunk.answer
    for number in numbers:
        engine.take(number)
    found = [answers[number] for number in numbers]
    _check(found, workload)
    return Timeline(
        tuple(arrivals_s),
        tuple(tuple(at - start_s for at in answer.token_times_s) for answer in found),
        workload.input_tokens,
    )


def _check(answers: Sequence[Answer], workload: Workload) -> None:
    for answer in answers:
        if answer.finish != "length" or len(answer.token_ids) != workload.output_tokens:
            raise MogulError(
                f"request {answer.id} ended by {answer.finish} after {len(answer.token_ids)} "
                f"tokens: {answer.error or 'no time per token can be told'}"
            )
