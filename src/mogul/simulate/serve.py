"""Serving as events: requests arrive, the policy of `schedule` plans steps, steps take time.

Each data-parallel copy has a scheduler of its own; with experts all copies step together, so the
slowest copy's step counts. A step costs its decode part plus its prompt part; costs are looked up
in buckets (an eighth of an octave), so that a run of many steps prices few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import read_json_line
from mogul.schedule.policy import Limits, Request, Scheduler, StepPlan
from mogul.simulate.memory import most_sequences
from mogul.simulate.operators import Step
from mogul.simulate.run import Setting
from mogul.simulate.step import StepModel
from mogul.spec.workload import Workload

STEPS_AN_OCTAVE = 8


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    cached_prefix: int = 0

    def __post_init__(self) -> None:
        """Refuse a request that asks for nothing, or comes at no time."""
        counts = (self.input_tokens, self.output_tokens, self.cached_prefix)
        if not all(isinstance(count, int) for count in counts) or self.cached_prefix < 0:
            raise ConfigError(
                f"a request of {counts[0]!r} input tokens, {counts[1]!r} output tokens and "
                f"{counts[2]!r} cached ones",
                fix="give whole numbers, none below 0",
            )
        is_time = isinstance(self.arrival_s, (int, float)) and 0 <= self.arrival_s < math.inf
        if not is_time:
            raise ConfigError(
                f"a request at {self.arrival_s!r} seconds", fix="give a finite time from 0 on"
            )
        if min(self.input_tokens, self.output_tokens) < 1:
            raise ConfigError(
                f"a request of {self.input_tokens} input and {self.output_tokens} output tokens",
                fix="give each 1 or more",
            )


@dataclass
class Served:
    """What a run of events gave."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    """Mean time between a request's tokens."""

    latency_s: list[float] = field(default_factory=list)
    num_steps: int = 0
    num_preemptions: int = 0
    end_s: float = 0.0
    output_tokens: int = 0
    most_running: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over the whole run."""
        return self.output_tokens / self.end_s if self.end_s else 0.0

    def percentiles(self, name: str) -> tuple[float, float, float]:
        """p50, p90 and p99 of `ttft_s`, `tpot_s` or `latency_s`."""
        values = getattr(self, name)
        if not values:
            return (math.nan, math.nan, math.nan)
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        return float(p50), float(p90), float(p99)


class StepCosts:
    """Time of a step by bucket: decoding requests, their context, prompt tokens, their prefix."""

    def __init__(self, steps: StepModel) -> None:
        self.steps = steps
        self._decode: dict[tuple[int, int], float] = {}
        self._prompt: dict[tuple[int, int, int], float] = {}

    def seconds(self, plan: StepPlan, mean_context: float) -> float:
        """Time of one copy's step."""
        seconds = 0.0
        if plan.decodes:
            seconds = self._decode_s(len(plan.decodes), mean_context)
        if plan.prompts:
            tokens = plan.prompt_tokens
            prior = sum(r.computed * n for r, n in plan.prompts) / tokens
            seconds += self._prompt_s(tokens, prior, len(plan.prompts))
        return seconds

    def _decode_s(self, sequences: int, context: float) -> float:
        key = (_bucket(sequences), _bucket(context))
        if (known := self._decode.get(key)) is None:
            step = Step(max(1, round(_center(key[0]))), 1, _center(key[1]))
            known = self._decode[key] = self.steps.time(step).seconds
        return known

    def _prompt_s(self, tokens: int, prior: float, count: int) -> float:
        key = (_bucket(tokens), _bucket(prior) if prior else 0, _bucket(count))
        if (known := self._prompt.get(key)) is None:
            new = max(1, round(_center(key[0])))
            cached = _center(key[1]) if key[1] else 0.0
            many = max(1, min(new, round(_center(key[2]))))
            step = Step(many, max(1, new // many), cached, is_prefill=True)
            known = self._prompt[key] = self.steps.time(step).seconds
        return known


def _bucket(value: float) -> int:
    return round(STEPS_AN_OCTAVE * math.log2(max(value, 1.0)))


def _center(bucket: int) -> float:
    return 2 ** (bucket / STEPS_AN_OCTAVE)


def serve(setting: Setting, arrivals: Sequence[Arrival], limits: Limits | None = None) -> Served:
    """Run a trace to its end.

    Raises:
        ConfigError: the model does not fit, or a request never could.
    """
    if not arrivals:
        raise ConfigError("the trace has no requests", fix="give one at least")
    setting.parallel.check(setting.model)
    copies = setting.parallel.dp
    bounds = limits or default_limits(setting, arrivals)
    schedulers = [Scheduler(bounds) for _ in range(copies)]
    costs = StepCosts(setting.step_model())
    run = _Run(schedulers, costs, sorted(arrivals, key=lambda one: one.arrival_s))
    return run.to_the_end()


class _Run:
    """The loop: admit, plan, let time pass, account."""

    def __init__(
        self, schedulers: list[Scheduler], costs: StepCosts, arrivals: list[Arrival]
    ) -> None:
        self.schedulers = schedulers
        self.costs = costs
        self.arrivals = arrivals
        self.served = Served()
        self.next = 0
        self.now_s = 0.0
        self.first_s: dict[int, float] = {}

    def to_the_end(self) -> Served:
        while True:
            self._admit()
            plans = [scheduler.plan() for scheduler in self.schedulers]
            if all(plan.is_empty for plan in plans):
                if self.next == len(self.arrivals):
                    break
                self.now_s = self.arrivals[self.next].arrival_s
                continue
            self._step(plans)
        self.served.end_s = self.now_s
        self.served.num_preemptions = sum(s.num_preemptions for s in self.schedulers)
        return self.served

    def _admit(self) -> None:
        """Hand over who has arrived, to the copy with the fewest requests."""
        while self.next < len(self.arrivals):
            one = self.arrivals[self.next]
            if one.arrival_s > self.now_s:
                return
            request = Request(
                self.next, one.input_tokens, one.output_tokens, one.arrival_s, one.cached_prefix
            )
            min(self.schedulers, key=lambda s: s.num_running + len(s.waiting)).add(request)
            self.next += 1

    def _step(self, plans: list[StepPlan]) -> None:
        times = []
        for scheduler, plan in zip(self.schedulers, plans, strict=True):
            prompting = sum(request.computed for request in scheduler.prompting)
            held = scheduler.held_tokens - prompting
            times.append(self.costs.seconds(plan, held / max(1, len(plan.decodes))))
        self.now_s += max(times)
        self.served.num_steps += 1
        for scheduler, plan in zip(self.schedulers, plans, strict=True):
            self._account(scheduler, plan)

    def _account(self, scheduler: Scheduler, plan: StepPlan) -> None:
        self.served.most_running = max(self.served.most_running, scheduler.num_running)
        prompts = [request for request, _ in plan.prompts]
        done = scheduler.finish(plan)
        for request in prompts:
            if request.emitted and request.id not in self.first_s:
                self.first_s[request.id] = self.now_s
                self.served.ttft_s.append(self.now_s - request.arrival_s)
        for request in done:
            first_s = self.first_s.pop(request.id)
            self.served.latency_s.append(self.now_s - request.arrival_s)
            self.served.output_tokens += request.emitted
            if request.emitted > 1:
                self.served.tpot_s.append((self.now_s - first_s) / (request.emitted - 1))


def default_limits(setting: Setting, arrivals: Iterable[Arrival]) -> Limits:
    """The cache that the memory leaves, in tokens; ConfigError when the weights do not fit."""
    longest = max(one.input_tokens + one.output_tokens for one in arrivals)
    load = Workload(input_tokens=longest, output_tokens=1, batch=setting.parallel.dp)
    most = most_sequences(
        setting.model, setting.parallel, setting.quant, load, setting.device, setting.engine
    )
    if most < 1:
        raise ConfigError(
            f"{setting.title} on {setting.device.name} has no room for one request of "
            f"{longest} tokens",
            fix="use more devices or fewer bits",
        )
    return Limits(cache_tokens=most * longest)


def poisson(
    rate_per_s: float, count: int, input_tokens: int, output_tokens: int, seed: int = 0
) -> list[Arrival]:
    """Requests of one length at random times."""
    if not (rate_per_s > 0 and count > 0):
        raise ConfigError(
            f"{count} requests at {rate_per_s:g} a second never arrive", fix="use more than 0"
        )
    gaps = np.random.default_rng(seed).exponential(1 / rate_per_s, count)
    return [Arrival(float(t), input_tokens, output_tokens) for t in np.cumsum(gaps)]


_REQUEST_KEYS = {"arrival_s", "input_tokens", "output_tokens"}
_ARRIVAL_KEYS = {*_REQUEST_KEYS, "cached_prefix"}
_REQUEST = 'write {"arrival_s": 0.5, "input_tokens": 900, "output_tokens": 200}'


def read_arrivals(path: Path) -> list[Arrival]:
    """Read a trace: one JSON object a line with arrival_s, input_tokens, output_tokens.

    Raises:
        ArtifactError: a line lacks a key, holds an unknown one or a value that cannot be.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", fix="check the path") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = read_json_line(line, path, number, fix=_REQUEST)
        if not (isinstance(record, dict) and _REQUEST_KEYS <= record.keys() <= _ARRIVAL_KEYS):
            told = line if len(line) < 80 else f"{line[:80]}..."
            raise ArtifactError(f"{path}, line {number} is no request: {told}", fix=_REQUEST)
        try:
            found.append(Arrival(**record))
        except ConfigError as error:
            raise ArtifactError(f"{path}, line {number}: {error}", fix=_REQUEST) from None
    if not found:
        raise ArtifactError(f"{path} holds no requests", fix="write one a line")
    return found
