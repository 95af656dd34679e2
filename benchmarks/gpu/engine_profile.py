"""Device time of an engine's steps by kernel, for `bench_engine.py --profile`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from mogul.serve.engine import Engine
from mogul.serve.params import SamplingParams

Note = Callable[..., None]
"""Keeps the fields of a partial result."""

STEPS = 8
MOST_KERNELS = 24


def profile_decode(engine: Engine, prompts: list[list[int]], note: Note) -> None:
    """A step in which all prompts decode."""
    _add(engine, prompts, 40)
    while engine.scheduler.waiting or engine.scheduler.prompting or engine.stats.num_steps == 0:
        engine.step()
    for _ in range(3):
        engine.step()
    _watch_steps(engine, STEPS, f"decode, batch {len(prompts)}", note)
    _finish(engine)


def profile_prompts(engine: Engine, prompts: list[list[int]], note: Note) -> None:
    """One full step of prompts."""
    _add(engine, prompts, 2)
    _watch_steps(engine, 1, "prompts", note)
    _finish(engine)


def _add(engine: Engine, prompts: list[list[int]], tokens: int) -> None:
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for prompt in prompts:
        engine.add(prompt, params)


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _watch_steps(engine: Engine, steps: int, what: str, note: Note) -> None:
    """Note what the device does in some steps, the longest first."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as seen:
        start_s = time.perf_counter()
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - start_s
    events: list[Any] = [
        e
        for e in seen.key_averages()
        if e.self_device_time_total > 0 and not e.key.startswith("aten::")
    ]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / steps / 1e3
    note(kind="profile", what=what, device_ms=total, wall_ms=1e3 * wall_s / steps)
    for e in events[:MOST_KERNELS]:
        note(
            kind="kernel", what=what, name=e.key[:90],
            ms=round(e.self_device_time_total / steps / 1e3, 4), calls=e.count / steps,
        )  # fmt: skip
