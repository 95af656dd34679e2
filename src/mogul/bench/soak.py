"""Random adds and aborts for as long as one likes: nothing may fail, be lost, or grow.

Decides what is watched: how every request ends, the engine's books after every step, and the slope
of resident and device memory over the last two thirds of the time, by least squares.
"""

from __future__ import annotations

import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mogul.core.errors import MogulError

if TYPE_CHECKING:
    from mogul.serve import Engine

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
    from mogul.serve import SamplingParams

    chance = random.Random(seed)
    vocab_size, most = engine.runner.vocab_size, int(MOST_WAITING * engine.sizes.max_sequences)
    running: list[int] = []
    steps = finished = aborted = 0
    sizes: list[tuple[float, float, float]] = []
    start_s = time.perf_counter()
    while (now_s := time.perf_counter() - start_s) < seconds:
        if len(running) < most and chance.random() < 0.3:
            count = chance.randrange(1, prompt_tokens + 1)
            prompt = [chance.randrange(vocab_size) for _ in range(count)]
            temperature = chance.choice((0.0, 1.0))
            params = SamplingParams(
                max_tokens=chance.randrange(1, answer_tokens + 1),
                temperature=temperature,
                logprobs=chance.choice((None, 2)),
                ignore_eos=True,
            )
            running.append(engine.add(prompt, params, priority=chance.randrange(2)))
        if running and chance.random() < 0.02:
            number = running.pop(chance.randrange(len(running)))
            aborted += engine.abort(number)
            engine.take(number)
        for chunk in engine.step():
            if chunk.answer is not None and chunk.id in running:
                if chunk.answer.finish != "length":
                    raise MogulError(f"request {chunk.id} ended by {chunk.answer.error}")
                engine.take(chunk.id)
                running.remove(chunk.id)
                finished += 1
        engine.check()
        steps += 1
        if now_s >= len(sizes) * seconds / LOOKS:
            sizes.append((now_s / 60, resident_mb(), device_mb(engine)))
    for number in running:
        engine.abort(number)
    while engine.has_work:
        engine.step()
    engine.check()
    stats = engine.stats
    if stats.free_pages + stats.cached_pages != stats.num_pages:
        raise MogulError(f"{stats.num_pages} pages became {stats.free_pages + stats.cached_pages}")
    late = sizes[len(sizes) // 3 :]
    slopes = (slope([(t, size[at]) for t, *size in late]) for at in (0, 1))
    return Soak(seconds, steps, finished, aborted, stats.num_preemptions, *slopes)


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
