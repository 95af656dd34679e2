"""One point: a model on devices under a load -> TTFT, TPOT, throughput, memory, price, and doubt.

Steady aggregated serving is a closed loop: `batch` requests stay in flight, and each new prompt
is computed between decode steps, so that a token waits for the prompts that arrive meanwhile:

    TPOT = step + (requests of a copy - 1) * prompt / output tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mogul.simulate.calibration import Calibration, shipped
from mogul.simulate.collectives import CollectiveTables
from mogul.simulate.engines import Engine
from mogul.simulate.machine import shipped_collectives
from mogul.simulate.memory import Memory, cache_bytes_per_sequence, serving_memory
from mogul.simulate.operators import Layout, Step
from mogul.simulate.routing import Routing
from mogul.simulate.step import StepModel, StepTime
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload

P90 = 1.2816


@dataclass(frozen=True)
class Setting:
    """Everything a prediction depends on but the load."""

    model: ModelSpec
    device: Hardware
    parallel: Parallel = field(default_factory=Parallel)
    quant: QuantScheme = field(default_factory=QuantScheme)
    routing: Routing = field(default_factory=Routing)
    engine: Engine = field(default_factory=Engine)
    calibration: Calibration | None = None
    collectives: CollectiveTables | None = None
    model_name: str = ""
    """What the user called the model."""

    @property
    def title(self) -> str:
        """The model's name, or its family where it has none."""
        return self.model_name or self.model.family

    def step_model(self) -> StepModel:
        """The pricer of this setting's steps."""
        domain = self.device.link_devices
        layout = Layout(self.model, self.parallel, self.quant, self.engine, domain)
        calibration = self.calibration or shipped(self.engine.kernels)
        collectives = self.collectives
        if collectives is None and self.engine.uses_nccl:
            collectives = shipped_collectives(self.device.name)
        return StepModel(layout, self.device, self.routing, calibration, collectives)


@dataclass(frozen=True)
class Prediction:
    """What one deployment does under one load; times in seconds."""

    setting: Setting
    workload: Workload
    ttft_s: float
    tpot_s: float
    decode: StepTime
    prefill: StepTime
    memory: Memory
    sigma: float
    """Standard deviation of log TPOT."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of the whole deployment."""
        return self.workload.batch / self.tpot_s

    @property
    def tokens_per_s_per_device(self) -> float:
        """Output tokens a device."""
        return self.tokens_per_s / self.setting.parallel.devices

    @property
    def tokens_per_s_per_user(self) -> float:
        """Output tokens a request."""
        return 1 / self.tpot_s

    @property
    def dollars_per_million(self) -> float | None:
        """Price of a million output tokens; None where the device has no price."""
        price = self.setting.device.price_per_hour
        return None if price is None else price / self.tokens_per_s_per_device / 3600 * 1e6

    def tpot_band(self) -> tuple[float, float, float]:
        """p10, p50, p90 of TPOT."""
        factor = math.exp(P90 * self.sigma)
        return self.tpot_s / factor, self.tpot_s, self.tpot_s * factor

    @property
    def tier(self) -> str:
        """How most of the decode time is known."""
        by_tier: dict[str, float] = {}
        for one in self.decode.operators:
            tier = one.estimate.tier
            by_tier[tier] = by_tier.get(tier, 0.0) + one.seconds
        return max(by_tier, key=lambda name: by_tier[name])

    def meets_targets(self) -> bool:
        """Whether the workload's TTFT and TPOT targets hold."""
        w = self.workload
        return (w.max_ttft_s is None or self.ttft_s <= w.max_ttft_s) and (
            w.max_tpot_s is None or self.tpot_s <= w.max_tpot_s
        )


def predict(setting: Setting, workload: Workload, *, check_memory: bool = True) -> Prediction:
    """Price one point.

    Raises:
        ConfigError: an impossible layout, or a model that does not fit (what, and by how much).
    """
    setting.parallel.check(setting.model)
    memory = serving_memory(
        setting.model, setting.parallel, setting.quant, workload, setting.device, setting.engine
    )
    if check_memory:
        each = cache_bytes_per_sequence(
            setting.model,
            setting.parallel,
            setting.quant,
            workload.input_tokens + workload.output_tokens,
        )
        memory.check(f"{setting.title} on {setting.device.name}", each)
    return price(setting.step_model(), setting, workload, memory)


def price(steps: StepModel, setting: Setting, workload: Workload, memory: Memory) -> Prediction:
    """Price one point with a pricer that may be shared by many (see `sweep`)."""
    sequences = -(-workload.batch // setting.parallel.dp)
    decode, step_s = _decode(steps, setting, workload, sequences)
    prefill, prompt_s = _prefill(steps, workload)
    tpot_s = step_s
    is_steady = workload.arrival == "steady"
    if is_steady and setting.engine.mixes_prefill:
        tpot_s += (sequences - 1) * prompt_s / workload.output_tokens
    wait_s = _wait_s(workload, sequences, prompt_s, tpot_s) if is_steady else 0.0
    if not is_steady:  # the last prompt's first token comes after all of them
        wait_s = (sequences - workload.prefill_batch) * prompt_s
    ttft_s = wait_s + prompt_s * workload.prefill_batch + 0.5 * step_s
    return Prediction(setting, workload, ttft_s, tpot_s, decode, prefill, memory, decode.sigma)


def _decode(
    steps: StepModel, setting: Setting, workload: Workload, sequences: int
) -> tuple[StepTime, float]:
    """The step and the time it takes for one emitted token."""
    drafted = workload.speculation
    new_tokens = 1 + (drafted.draft_tokens if drafted else 0)
    stages = setting.parallel.pp
    micro = -(-sequences // stages)  # stages work on different requests at once
    step = Step(micro, new_tokens, workload.mean_context)
    time = steps.time(step)
    if drafted is None:
        return time, time.seconds
    draft = 1 + drafted.draft_tokens * drafted.draft_cost
    return time, time.seconds * draft / drafted.tokens_per_step


def _prefill(steps: StepModel, workload: Workload) -> tuple[StepTime, float]:
    """The prompt step and its time for one request, the host's part left out."""
    cached = workload.input_tokens - workload.new_prompt_tokens
    step = Step(workload.prefill_batch, workload.new_prompt_tokens, float(cached), is_prefill=True)
    time = steps.time(step)
    return time, time.seconds / workload.prefill_batch


def _wait_s(workload: Workload, sequences: int, prompt_s: float, tpot_s: float) -> float:
    """Mean wait of a prompt for the prompts before it (one server, fixed service time)."""
    if sequences <= 1:
        return 0.0
    cycle_s = workload.output_tokens * tpot_s + prompt_s
    busy = min(0.95, (sequences - 1) * prompt_s / cycle_s)
    return prompt_s * busy / (2 * (1 - busy))
