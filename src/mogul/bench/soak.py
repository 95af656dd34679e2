"""Random adds and aborts for as long as one likes: nothing may fail, be lost, or grow.

Decides what is watched: how every request ends, the engine's books after every step, and the slope
of resident and device memory over the last two thirds of the time, by least squares.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mogul.core.errors import MogulError
from mogul.core.log import progress

if TYPE_CHECKING:
    from mogul.serve import Chunk, Engine

LOOKS = 500
"""Times that memory is looked at: what a look keeps must not be what grows."""

MOST_WAITING = 1.5
"""Requests that run or wait at most, in sequences of the engine."""


@dataclass(frozen=True)
class Soak:
    """What came of it."""

    seconds: float
    steps: int
    finished: int
    aborted: int
    preemptions: int
    resident_mb_min: float
    """Growth of the process's memory, MB a minute."""

    device_mb_min: float
    """Growth of memory that tensors hold on the accelerator, MB a minute; 0 on a processor."""


def soak(
    engine: Engine, seconds: float, *, prompt_tokens: int, answer_tokens: int, seed: int = 0
) -> Soak:
    """Add and abort at random, and check the books after every step.

    Args:
        engine: fresh, its cache small enough that requests give way to each other.
        seconds: how long.
        prompt_tokens: of the longest prompt.
        answer_tokens: of the longest answer.
        seed: of the dice.

    Raises:
        MogulError: a request ended otherwise than by its length, or pages are missing in the end.
        AssertionError: the books do not add up after a step.
    """
    guests = _Guests(engine, random.Random(seed), prompt_tokens, answer_tokens)
    steps = 0
    sizes: list[tuple[float, float, float]] = []
    start_s = time.perf_counter()
    with progress("adding and aborting", seconds) as bar:
        while (now_s := time.perf_counter() - start_s) < seconds:
            guests.come_and_go()
            guests.see_out(engine.step())
            engine.check()
            steps += 1
            if now_s >= len(sizes) * seconds / LOOKS:
                sizes.append((now_s / 60, resident_mb(), device_mb(engine)))
                bar.update(now_s, f"{guests.finished} answered")
    guests.end()
    late = sizes[len(sizes) // 3 :]
    slopes = (slope([(t, size[at]) for t, *size in late]) for at in (0, 1))
    preemptions = engine.stats.num_preemptions
    return Soak(seconds, steps, guests.finished, guests.aborted, preemptions, *slopes)


class _Guests:
    """Requests that come and go as the dice say."""

    def __init__(
        self, engine: Engine, chance: random.Random, prompt_tokens: int, answer_tokens: int
    ) -> None:
        self.engine, self.chance = engine, chance
        self.prompt_tokens, self.answer_tokens = prompt_tokens, answer_tokens
        self.most = int(MOST_WAITING * engine.sizes.max_sequences)
        self.running: list[int] = []
        self.finished = self.aborted = 0

    def come_and_go(self) -> None:
        """Perhaps add one, perhaps abort one."""
        chance, running = self.chance, self.running
        if len(running) < self.most and chance.random() < 0.3:
            running.append(self._add())
        if running and chance.random() < 0.02:
            number = running.pop(chance.randrange(len(running)))
            self.aborted += self.engine.abort(number)
            self.engine.take(number)

    def _add(self) -> int:
        from mogul.serve import SamplingParams

        chance, vocab_size = self.chance, self.engine.runner.vocab_size
        count = chance.randrange(1, self.prompt_tokens + 1)
        prompt = [chance.randrange(vocab_size) for _ in range(count)]
        params = SamplingParams(
            temperature=chance.choice((0.0, 1.0)),
            max_tokens=chance.randrange(1, self.answer_tokens + 1),
            logprobs=chance.choice((None, 2)),
            ignore_eos=True,
        )
        return self.engine.add(prompt, params, priority=chance.randrange(2))

    def see_out(self, chunks: Iterable[Chunk]) -> None:
        """Take the answers of those that ended; each must have ended by its length."""
        for chunk in chunks:
            if chunk.answer is None or chunk.id not in self.running:
                continue
            if chunk.answer.finish != "length":
                raise MogulError(f"request {chunk.id} ended by {chunk.answer.error}")
            self.engine.take(chunk.id)
            self.running.remove(chunk.id)
            self.finished += 1

    def end(self) -> None:
        """Abort the rest; every page must be free or cached then."""
        for number in self.running:
            self.engine.abort(number)
        while self.engine.has_work:
            self.engine.step()
        self.engine.check()
        stats = self.engine.stats
        found = stats.free_pages + stats.cached_pages
        if found != stats.num_pages:
            raise MogulError(f"{stats.num_pages} pages became {found}")


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through points, by least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def resident_mb() -> float:
    """Memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 1e6


def device_mb(engine: Engine) -> float:
    """Memory that tensors hold on the engine's accelerator."""
    if engine.runner.device.type == "cpu":
        return 0.0
    return torch.accelerator.memory_allocated(engine.runner.device) / 1e6
