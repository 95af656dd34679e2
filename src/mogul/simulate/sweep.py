"""Search deployments: every legal layout x format x batch -> the ones nothing else beats.

A point is kept when it fits the memory and meets the targets; the front holds those that no other
beats both in tokens a second and device and in tokens a second and user. Disaggregated serving
pairs the best prompt pool with the best decode pool of the same search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mogul.core.errors import ConfigError
from mogul.simulate.collectives import point_to_point_s
from mogul.simulate.engines import Engine
from mogul.simulate.memory import cache_bytes_per_sequence, most_sequences, serving_memory
from mogul.simulate.run import Prediction, Setting, price
from mogul.spec.grouping import divisors
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload

BATCHES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Requests a data-parallel copy, from which the fitting ones are priced."""


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    points: tuple[Prediction, ...]
    """Every point priced, in the order of the search."""

    front: tuple[Prediction, ...]
    """The ones that meet the targets and nothing beats, fastest for the user first."""

    num_too_big: int = 0
    """Layouts whose weights do not fit."""

    num_missed: int = 0
    """Points that miss the targets."""

    disaggregated: tuple[Disaggregated, ...] = field(default=())


@dataclass(frozen=True)
class Disaggregated:
    """A pool for prompts and a pool for tokens, in the ratio that keeps both busy."""

    prompt: Prediction
    decode: Prediction
    prompt_devices_share: float
    transfer_s: float
    """A prompt's cache on its way from pool to pool, after its last layer."""

    ttft_s: float
    tpot_s: float
    tokens_per_s_per_device: float


def layouts(model: ModelSpec, num_devices: int, *, max_pp: int = 1) -> Iterator[Parallel]:
    """Every legal layout of one copy of the model on `num_devices`."""
    for pp in (n for n in divisors(num_devices) if n <= max_pp):
        stage = num_devices // pp
        for tp in divisors(stage):
            dp = stage // tp
            expert_ranks = divisors(stage) if model.moe else (1,)
            for ep in expert_ranks:
                layout = Parallel(tp=tp, dp=dp, pp=pp, ep=ep, moe_tp=stage // ep)
                if _is_legal(layout, model):
                    yield layout
                if model.moe and model.moe.shared_width and dp > 1 and ep > 1:
                    hybrid = layout.replace(shared_tp=stage)  # arXiv 2505.21411, section 5.1
                    if _is_legal(hybrid, model) and model.moe.shared_width % stage == 0:
                        yield hybrid


def _is_legal(layout: Parallel, model: ModelSpec) -> bool:
    try:
        layout.check(model)
    except ConfigError:
        return False
    return True


def search(
    model: ModelSpec,
    device: Hardware,
    workload: Workload,
    *,
    device_counts: Sequence[int] = (1, 2, 4, 8),
    quants: Sequence[QuantScheme] = (QuantScheme(),),
    engine: Engine | None = None,
    base: Setting | None = None,
    max_pp: int = 1,
    max_points: int = 100_000,
) -> Searched:
    """Price deployments and keep the front.

    Raises:
        ConfigError: nothing fits at all (with the smallest need).
    """
    template = base or Setting(model, device, engine=engine or Engine())
    points: list[Prediction] = []
    too_big = 0
    for count in device_counts:
        for layout in layouts(model, count, max_pp=max_pp):
            for quant in quants:
                setting = replace(template, parallel=layout, quant=quant)
                found = _batches(setting, workload)
                too_big += not found
                points += found
                if len(points) >= max_points:
                    break
    if not points:
        _refuse(template, workload, device_counts, quants)
    good = [one for one in points if one.meets_targets()]
    apart = _disaggregated(points, workload)
    return Searched(tuple(points), front(good), too_big, len(points) - len(good), apart)


def _batches(setting: Setting, workload: Workload) -> list[Prediction]:
    most = most_sequences(
        setting.model, setting.parallel, setting.quant, workload, setting.device, setting.engine
    )
    steps = setting.step_model()
    found = []
    for batch in (n for n in BATCHES if n <= most):
        load = workload.replace(batch=batch * setting.parallel.dp)
        memory = serving_memory(
            setting.model, setting.parallel, setting.quant, load, setting.device, setting.engine
        )
        found.append(price(steps, setting, load, memory))
    return found


def _refuse(
    template: Setting,
    workload: Workload,
    device_counts: Sequence[int],
    quants: Sequence[QuantScheme],
) -> None:
    most = max(device_counts)
    layout = next(iter(layouts(template.model, most)), None)
    if layout is None:
        raise ConfigError(
            f"{template.title} has no legal layout on {most} devices",
            fix="use a number of devices that divides its heads and experts",
        )
    one = workload.replace(batch=layout.dp, prefill_batch=1)
    memory = serving_memory(
        template.model, layout, quants[-1], one, template.device, template.engine
    )
    memory.check(f"{template.title} on {most} x {template.device.name}")


def front(points: Sequence[Prediction]) -> tuple[Prediction, ...]:
    """Points no other beats in both tokens/s a device and tokens/s a user."""
    ordered = sorted(points, key=lambda p: (-p.tokens_per_s_per_user, -p.tokens_per_s_per_device))
    kept: list[Prediction] = []
    best = 0.0
    for one in ordered:
        if one.tokens_per_s_per_device > best:
            kept.append(one)
            best = one.tokens_per_s_per_device
    return tuple(kept)


def _disaggregated(
    points: Sequence[Prediction], workload: Workload, keep: int = 3
) -> tuple[Disaggregated, ...]:
    """Pair the cheapest prompt pool that meets TTFT with decode pools that meet TPOT."""
    if not points:
        return ()

    def prompt_device_s(p: Prediction) -> float:
        return p.prefill.seconds / p.workload.prefill_batch * p.setting.parallel.tp

    def in_time(p: Prediction) -> bool:
        return workload.max_ttft_s is None or p.prefill.seconds <= 0.7 * workload.max_ttft_s

    prompts = [p for p in points if in_time(p)]
    if not prompts:
        return ()
    prompt = min(prompts, key=prompt_device_s)
    pairs = [_pair(prompt, p, prompt_device_s(prompt)) for p in points]
    limit = workload.max_tpot_s
    good = [pair for pair in pairs if limit is None or pair.tpot_s <= limit]
    good.sort(key=lambda pair: -pair.tokens_per_s_per_device)
    return tuple(good[:keep])


def _pair(prompt: Prediction, decode: Prediction, prompt_device_s: float) -> Disaggregated:
    tpot_s = decode.decode.seconds
    devices = decode.setting.parallel.devices
    requests_per_s = decode.workload.batch / (tpot_s * decode.workload.output_tokens)
    sent_s, taken_s = _transfer_s(prompt, prompt), _transfer_s(decode, prompt)
    # A prompt's devices are busy for the longer of computing and sending it.
    busy_s = max(prompt_device_s, sent_s * prompt.setting.parallel.tp)
    # A decode pool cannot take caches faster than its network brings them.
    arriving = decode.setting.parallel.dp / taken_s if taken_s else requests_per_s
    slowed = max(1.0, requests_per_s / arriving)
    prompt_devices = requests_per_s / slowed * busy_s
    share = prompt_devices / (prompt_devices + devices)
    rate = decode.workload.batch / (slowed * tpot_s) / (prompt_devices + devices)
    transfer_s = max(sent_s, taken_s)
    ttft_s = 1.4 * prompt.prefill.seconds + transfer_s
    return Disaggregated(prompt, decode, share, transfer_s, ttft_s, slowed * tpot_s, rate)


def _transfer_s(pool: Prediction, prompt: Prediction) -> float:
    """Seconds a pool needs for one prompt's cache: each of its devices sends or takes a part."""
    setting = pool.setting
    part = cache_bytes_per_sequence(
        setting.model, setting.parallel, setting.quant, prompt.workload.input_tokens
    )
    return point_to_point_s(part, setting.device, is_far=True)
