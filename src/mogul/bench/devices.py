"""Measure one experts layer spread over devices: what each way to dispatch costs, and who waits.

Every rank runs `measure_cells`; rank 0's rows count. A way is captured in a graph where it reads no
size on the host, else called. Experts alone are timed on the very rows each rank got: the slowest
rank's experts are what a perfect dispatch would take, the rest of the layer's time is exposed
communication, and the difference between ranks is waiting. The floor is the larger of an even share
of the work at this run's limits and of the bytes over this run's link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mogul.bench.devices_cases import (
    Inputs,
    Way,
    Weights,
    dispatcher_of,
    local_weights,
    make_inputs,
    seeds_of,
    sent_bytes,
)
from mogul.bench.devices_clock import Clock, Link, best_s, host_waits, measure_link
from mogul.bench.kernels import DTYPES, LayerShape, Limits
from mogul.core.errors import BackendError, ConfigError
from mogul.core.log import log
from mogul.parallel import World
from mogul.parallel.dispatch import Experts
from mogul.parallel.move import gather_into

WAYS = (
    Way("grouped", "static"),
    Way("grouped", "static", wire="window"),
    Way("grouped", "all_to_all"),
    Way("top-k", "all_to_all"),
    Way("top-k", "all_to_all", capacity=1.0),
    Way("top-k", "gather"),
    Way("top-k", "gather", wire="window"),
    Way("top-k", "transformers"),
    Way("grouped", "static", chunks=2),
    Way("grouped", "static", chunks=4),
    Way("grouped", "static", chunks=2, wire="window"),
    Way("grouped", "static", chunks=4, wire="window"),
    Way("top-k", "all_to_all", chunks=2),
)
CHUNKED_TOKENS = 4096
"""Fewer tokens than this are not cut: every chunk reads the experts again."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    shape: LayerShape
    tokens: tuple[int, ...] = (16, 64, 456, 4096, 16384)
    """Of all ranks together."""
    routings: tuple[str, ...] = ("uniform", "skewed")
    ways: tuple[Way, ...] = WAYS
    dtype: str = "bf16"
    budget_s: float = 0.1
    """Seconds of measuring for one number."""
    draws: int = 1
    """Draws of a routing whose results are averaged."""
    traced_tokens: tuple[int, ...] = ()
    """Numbers of tokens for which the phases of every rank are recorded, and waits for the host
    are counted."""

    def __post_init__(self) -> None:
        """Refuse to measure nothing."""
        if any(count < 1 for count in self.tokens):
            raise ConfigError(f"{min(self.tokens)} tokens of all ranks", fix="use 1 or more")


@dataclass
class Setup:
    """What all cells of a run share."""

    world: World
    request: Request
    clock: Clock
    limits: Limits
    link: Link
    weights: Weights
    phases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and tokens."""
        return DTYPES[self.request.dtype]


def measured_limits(clock: Clock, dtype: torch.dtype) -> Limits:
    """Arithmetic and memory that the slowest device reaches now."""
    size = 8192 if clock.on_gpu else 1024
    a = torch.randn(size, size, device=clock.device, dtype=dtype)
    seconds = clock.most(clock.own_s(lambda: a @ a, 0.2))
    return Limits(2.0 * size**3 / seconds, -clock.most(-_copy_rate(clock)))


def _copy_rate(clock: Clock) -> float:
    source = torch.ones(1 << (30 if clock.on_gpu else 26), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.own_s(lambda: target.copy_(source), 0.1)


def prepare(world: World, request: Request) -> Setup:
    """Weights and limits."""
    clock = Clock(world.device)
    dtype = DTYPES[request.dtype]
    limits = measured_limits(clock, dtype)
    link = measure_link(clock, (1 << 28) if clock.on_gpu else (1 << 22))
    return Setup(world, request, clock, limits, link, local_weights(world, request.shape, dtype))


def measure_cells(setup: Setup) -> Iterator[dict[str, Any]]:
    """The rows of a prepared run."""
    for routing, way, tokens in cells_of(setup.request):
        yield _cell(setup, routing, way, tokens)


def cells_of(request: Request) -> list[tuple[str, Way, int]]:
    """(routing, way, tokens) of every cell."""
    return [
        (routing, way, tokens)
        for tokens in request.tokens
        for routing in request.routings
        for way in request.ways
        if way.chunks == 1 or tokens >= CHUNKED_TOKENS
    ]


@torch.no_grad()
def _cell(setup: Setup, routing: str, way: Way, tokens: int) -> dict[str, Any]:
    world, shape, clock = setup.world, setup.request.shape, setup.clock
    row: dict[str, Any] = {
        "shape": shape.name, "ranks": world.size, "tokens": tokens, "routing": routing,
        "way": way.name,
    }  # fmt: skip
    try:
        _dispatcher(setup, way, tokens)
    except BackendError as refused:
        return {**row, "refused": str(refused)}
    seeds = seeds_of(shape, routing, world.size, setup.request.draws)
    drawn = [_draw(setup, way, routing, tokens, seed) for seed in seeds]
    row |= _mean(drawn)
    if tokens in setup.request.traced_tokens and routing == setup.request.routings[-1]:
        dispatcher, run = _dispatcher(setup, way, tokens)
        middle = seeds[len(seeds) // 2]
        inputs = make_inputs(world, shape, way, routing, tokens, setup.dtype, middle)
        if clock.on_gpu:
            profiled = way.dispatch == "static" and way.chunks == 1
            call = partial(dispatcher, inputs.x, inputs.ids, inputs.weights, run)
            row |= host_waits(call, profiled=profiled)
        setup.phases += record_phases(setup, dispatcher, run, inputs, row)
    return row


def _draw(setup: Setup, way: Way, routing: str, tokens: int, seed: int) -> dict[str, Any]:
    """One draw of the picks."""
    world, shape, clock = setup.world, setup.request.shape, setup.clock
    dispatcher, run = _dispatcher(setup, way, tokens)
    inputs = make_inputs(world, shape, way, routing, tokens, setup.dtype, seed)
    call = partial(dispatcher, inputs.x, inputs.ids, inputs.weights, run)
    budget = setup.request.budget_s
    row = best_s(clock, call, budget, graph=clock.on_gpu and way.fits_a_graph)
    row["layer_s"] = row.get("graph_s") or row["called_s"]
    experts = clock.of_all(_experts_s(setup, dispatcher, run, inputs, budget))
    return row | _verdict(setup, inputs, way, row["layer_s"], experts)


def _mean(drawn: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the draws; experts and waits slowest rank first, ratios of the means."""
    found: dict[str, Any] = {"draws_s": [one["layer_s"] for one in drawn]}
    for key, value in drawn[0].items():
        values = [one.get(key, value) for one in drawn]
        if isinstance(value, list):
            ordered = [sorted(one, reverse=key == "experts_s") for one in values]
            found[key] = [sum(one) / len(one) for one in zip(*ordered, strict=True)]
        else:
            found[key] = value if isinstance(value, str) else sum(values) / len(values)
    found["exposed"] = found["exposed_s"] / found["layer_s"]
    found["ratio"] = found["layer_s"] / found["floor_s"]
    return found


def _dispatcher(setup: Setup, way: Way, tokens: int) -> tuple[Any, Experts]:
    """What runs a way, and the experts it runs."""
    if way.dispatch != "transformers":
        return dispatcher_of(setup.world, setup.request.shape, way, tokens), setup.weights.run
    from mogul.bench.devices_peer import TransformersEP, stock_experts

    if tokens % setup.world.size:
        raise BackendError("its ranks hold equally many tokens", fix="measure an even number")
    peer = TransformersEP(setup.world, setup.request.shape.experts)
    return peer, stock_experts(setup.weights)


def _experts_s(
    setup: Setup, dispatcher: Any, run: Experts, inputs: Inputs, budget_s: float
) -> float:
    """This rank's experts alone, on the rows that the dispatcher brings it."""
    seen: list[tuple[Tensor, ...]] = []

    def note(*rows: Tensor) -> Tensor:
        seen.append(tuple(part.clone() for part in rows))
        return run(*rows)

    dispatcher(inputs.x, inputs.ids, inputs.weights, note)

    def alone() -> None:
        for rows in seen:
            run(*rows)

    if not setup.clock.on_gpu:
        return setup.clock.own_s(alone, budget_s, busy=True)
    with setup.clock.captured(alone) as replay:
        return setup.clock.own_s(replay, budget_s)


def _verdict(
    setup: Setup, inputs: Inputs, way: Way, layer_s: float, experts: list[float]
) -> dict[str, Any]:
    """Floor, ratio, waiting, exposed communication, balance."""
    shape, ranks = setup.request.shape, setup.world.size
    tokens, element = len(inputs.all_ids), setup.dtype.itemsize
    rows = 2 * tokens * shape.width * element
    weights = inputs.distinct * 3 * shape.width * shape.inner * element
    work_s = setup.limits.floor_s(shape.flop(tokens) / ranks, (weights + rows) / ranks)
    sent = sent_bytes(inputs, way, ranks, shape, element)
    floor_s = max(work_s, sent / setup.link.bytes_per_s)
    slowest = max(experts)
    return {
        "experts_s": experts,
        "wait_s": [slowest - one for one in experts],
        "exposed_s": layer_s - slowest,
        "exposed": (layer_s - slowest) / layer_s,
        "sent_bytes": sent,
        "floor_s": floor_s,
        "ratio": layer_s / floor_s,
        "rho": inputs.rho,
        "delta": inputs.delta,
    }


def record_phases(
    setup: Setup, dispatcher: Any, run: Experts, inputs: Inputs, row: dict[str, Any]
) -> list[dict[str, Any]]:
    """When this rank's experts ran within one call, chunk by chunk; of all ranks, on rank 0."""
    clock = setup.clock
    marks: list[Any] = []

    def mark() -> None:
        marks.append(_now(clock))

    def noted(*rows: Tensor) -> Tensor:
        mark()
        out = run(*rows)
        mark()
        return out

    for _ in range(3):
        marks.clear()
        clock.line_up()
        mark()
        dispatcher(inputs.x, inputs.ids, inputs.weights, noted)
        mark()
        clock.sync()
    times = [_between(marks[0], one) for one in marks]
    gathered: list[Any] = [None] * setup.world.size
    torch.distributed.all_gather_object(gathered, times)
    return [
        {**{k: row[k] for k in ("shape", "tokens", "routing", "way")}, "rank": r, "marks_s": m}
        for r, m in enumerate(gathered)
    ]


def _now(clock: Clock) -> Any:
    if clock.on_gpu:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return perf_counter()


def _between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return last - first
    return first.elapsed_time(last) / 1e3


def check_exact(setup: Setup, way: Way, tokens: int) -> float:
    """Largest relative error of a way, forward and backward, against all experts on one device.

    Ways through a window have no backward.
    """
    world, shape = setup.world, setup.request.shape
    inputs = make_inputs(world, shape, way, "skewed", tokens, setup.dtype)
    dispatcher = dispatcher_of(world, shape, way, tokens)
    whole = Weights(*(_all_experts(part) for part in (setup.weights.gate_up, setup.weights.down)))
    if way.wire is not None:
        with torch.no_grad():
            y = dispatcher(inputs.x, inputs.ids, inputs.weights, setup.weights.run)
            wanted = whole.run(inputs.x, inputs.ids, inputs.weights)
        return setup.clock.most(_error(y, wanted))
    x = inputs.x.clone().requires_grad_()
    y = dispatcher(x, inputs.ids, inputs.weights, setup.weights.run)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wanted_x = inputs.x.clone().requires_grad_()
    wanted = whole.run(wanted_x, inputs.ids, inputs.weights)
    (wanted_dx,) = torch.autograd.grad(wanted, wanted_x, torch.ones_like(wanted))
    errors = [_error(y.detach(), wanted.detach()), _error(dx, wanted_dx)]
    return setup.clock.most(max(errors))


def _all_experts(part: Tensor) -> Tensor:
    out = part.new_empty((part.shape[0] * torch.distributed.get_world_size(), *part.shape[1:]))
    gather_into(out, part)
    return out


def _error(given: Tensor, wanted: Tensor) -> float:
    error = float((given.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-20))
    return error if error == error else float("inf")


def explain(setup: Setup) -> dict[str, Any]:
    """The limits of this run, for tables and the ledger."""
    found = {
        "tflop_per_s": setup.limits.flop_per_s / 1e12,
        "memory_gb_per_s": setup.limits.bytes_per_s / 1e9,
        "link_gb_per_s": setup.link.bytes_per_s / 1e9,
        "link_latency_s": setup.link.latency_s,
    }
    log.info("limits of this run: %s", found)
    return found
