"""How fast the engine serves, beside the least that its bytes allow.

Decides the protocol: distinct experts are counted in a pass of their own; then for each load one
short run to warm up and `runs` measured ones, medians over runs. Greedy tokens of random weights
may all be alike; where they pick fewer than 90 % of the experts that uniform picks would, tokens
are drawn at random instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mogul.bench.calibrate_timing import copy_bandwidth, device_name
from mogul.bench.serve_floor import Weights, count_distinct, device_of, weights_of
from mogul.bench.serve_load import FORCED_TEMPERATURE, Timeline, Workload, drive
from mogul.core.errors import ConfigError
from mogul.core.log import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mogul.serve import Engine
    from mogul.serve.kv_scales import KvScales

LEAST_SPREAD = 0.9
"""Share of the uniform expectation of distinct experts below which tokens are forced."""


@dataclass(frozen=True)
class Request:
    """What to measure."""

    workloads: tuple[Workload, ...]
    runs: int = 3
    may_force: bool = True
    """Measure again with tokens at random where too few experts were picked."""

    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineOptions`."""

    guess: str = ""
    """Who guesses tokens: ngram, mtp, a draft model; nobody where empty."""

    guesses: int = 4
    """Guessed tokens a request at most."""

    kv_scales: KvScales | None = None
    """Of a cache in fp8."""

    def __post_init__(self) -> None:
        """Refuse to measure nothing."""
        if self.runs < 1 or not self.workloads:
            raise ConfigError("nothing to measure", fix="ask for one load and one run at least")


@dataclass(frozen=True)
class Cell:
    """One load, measured."""

    workload: Workload
    runs: tuple[Timeline, ...]
    distinct: float | None
    """Distinct experts a layer of a step that decodes `decoding` requests; None without experts."""

    uniform: float
    decoding: float
    """Requests that decode together: all of a closed load, the average of an open one."""

    floor_s: float
    acceptance: tuple[float, ...] = ()
    """Share of guessed tokens that stood, by position."""

    @property
    def decode_s(self) -> float | None:
        """Median time of a token while all requests decode together.

        Of an open load, the middle time between two tokens.
        """
        if self.workload.rate is not None:
            return self.percentile("itl_s", 50)
        found = [one for run in self.runs if (one := run.decode_s) is not None]
        return median(found) if found else None

    @property
    def ratio(self) -> float | None:
        """Measured over floor."""
        return None if self.decode_s is None else self.decode_s / self.floor_s

    def typical(self, what: str) -> float:
        """Median over runs of a rate."""
        return median(getattr(run, what) for run in self.runs)

    def percentile(self, what: str, share: float) -> float:
        """Median over runs of a percentile of `ttft_s`, `tpot_s` or `itl_s`."""
        return median(float(np.percentile(getattr(run, what)(), share)) for run in self.runs)


@dataclass(frozen=True)
class Result:
    """All loads."""

    model: str
    device: str
    dtype: str
    bytes_per_s: float
    cells: tuple[Cell, ...]


def open_and_measure(
    path: str,
    request: Request,
    *,
    load: str = "checkpoint",
    dtype: str = "auto",
    device: str | None = None,
    experts: str = "mogul",
    name: str = "",
    quantise: str | None = None,
    statistics: str | None = None,
) -> Result:
    """Open a model as the engine would, and measure it; see `measure`."""
    from mogul.models.quantise_load import packed_format
    from mogul.serve.loading import open_with_scales

    where = device_of(device)
    bytes_per_s = copy_bandwidth(where)
    model, scales = open_with_scales(
        path,
        kv_dtype=request.engine.get("kv_dtype", "auto"),
        load=load,  # pyright: ignore[reportArgumentType]
        dtype=dtype,
        device=where.type,
        experts=experts,
        quantise=quantise,
        statistics=statistics,
    )
    if scales is not None:
        request = replace(request, kv_scales=scales)
    result = measure(model, request, name=name or path, bytes_per_s=bytes_per_s)
    packed = quantise or packed_format(model)
    return replace(result, dtype=f"{result.dtype}, {packed}") if packed else result


def measure(
    model: PreTrainedModel, request: Request, *, name: str, bytes_per_s: float | None = None
) -> Result:
    """Measure all loads on one engine, then count experts on another.

    Args:
        model: in eval mode, where it shall run.
        request: loads and options.
        name: for the table.
        bytes_per_s: bandwidth of the device, measured before the cache filled it.
    """
    where = torch.device(model.device)
    bytes_per_s = bytes_per_s or copy_bandwidth(where)
    weights = weights_of(model)
    workloads, distinct = _spread(model, weights, request)
    cells = []
    for (runs, acceptance, token_bytes), workload, count in zip(
        _timed(model, workloads, request), workloads, distinct, strict=True
    ):
        decoding = float(at_once(workload, request))
        uniform = weights.uniform_distinct(decoding)
        if workload.rate is not None:  # spread over experts as when all of them decode together
            decoding = median(run.decoding for run in runs)
            fewer = weights.uniform_distinct(decoding)
            count, uniform = None if count is None else count * fewer / uniform, fewer
        floor_s = step_bytes(weights, workload, decoding, count, token_bytes) / bytes_per_s
        cells.append(Cell(workload, runs, count, uniform, decoding, floor_s, acceptance))
    dtype = str(model.dtype).removeprefix("torch.")
    return Result(name, device_name(where), dtype, bytes_per_s, tuple(cells))


def _spread(
    model: PreTrainedModel, weights: Weights, request: Request
) -> tuple[list[Workload], list[float | None]]:
    """The workloads with the distinct experts of each; forced to random tokens where needed."""
    workloads = list(request.workloads)
    if not weights.num_experts:
        return workloads, [None] * len(workloads)
    engine = _engine(model, request, record_experts=True, graphs=False, compile=False)
    distinct: list[float | None] = []
    try:
        for i, workload in enumerate(workloads):
            few = replace(workload, requests=at_once(workload, request))
            count = count_distinct(engine, few)
            least = LEAST_SPREAD * weights.uniform_distinct(few.requests)
            is_forced = workload.temperature == FORCED_TEMPERATURE
            if count is not None and count < least and request.may_force and not is_forced:
                say(f"{count:.1f} distinct experts, below {least:.1f}: tokens at random instead")
                workloads[i] = replace(workload, temperature=FORCED_TEMPERATURE)
                count = count_distinct(engine, replace(few, temperature=FORCED_TEMPERATURE))
            distinct.append(count)
    finally:
        engine.close()
    return workloads, distinct


def at_once(workload: Workload, request: Request) -> int:
    """Requests of a workload that can run together."""
    return min(workload.requests, int(request.engine.get("max_sequences", workload.requests)))


def step_bytes(
    weights: Weights,
    workload: Workload,
    decoding: float,
    distinct: float | None,
    token_bytes: int,
) -> float:
    """Bytes a decode step reads: weights, and the keys and values halfway through the answers."""
    keys = workload.input_tokens + workload.output_tokens / 2
    kv_bytes = decoding * keys * token_bytes
    return weights.step_bytes(distinct or 0.0) + kv_bytes


def _engine(
    model: PreTrainedModel, request: Request, speculator: Any = None, **more: Any
) -> Engine:
    from mogul.serve import Engine
    from mogul.serve.options import EngineOptions

    most = max(workload.requests for workload in request.workloads)
    length = max(one.input_tokens + one.output_tokens for one in request.workloads)
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if made_for is not None and length > made_for:
        raise ConfigError(
            f"requests of {length} tokens exceed the {made_for} that the model was made for",
            fix="lower --input or --output",
        )
    options = {"max_sequences": most, "max_length": length, "reuse_prefix": False, "seed": 0}
    settled = EngineOptions(**{**options, **request.engine, **more})
    return Engine(model, None, settled, speculator=speculator, kv_scales=request.kv_scales)


def _timed(
    model: PreTrainedModel, workloads: Sequence[Workload], request: Request
) -> Iterator[tuple[tuple[Timeline, ...], tuple[float, ...], int]]:
    """Of each workload: its runs, guesses that stood by position, bytes of a token in the cache."""
    from mogul.serve.speculate import make_speculator

    speculator = None
    if request.guess:
        kind = {"dtype": model.dtype, "device": model.device.type}
        speculator = make_speculator(request.guess, guesses=request.guesses, **kind)
    engine = _engine(model, request, speculator)
    try:
        for workload in workloads:
            short = replace(workload, output_tokens=min(8, workload.output_tokens), rate=None)
            drive(engine, replace(short, requests=min(8, workload.requests)))
            before = speculator.stats if speculator is not None else None
            runs = tuple(
                drive(engine, replace(workload, seed=workload.seed + run))
                for run in range(request.runs)
            )
            acceptance: tuple[float, ...] = ()
            if speculator is not None and before is not None:
                acceptance = speculator.stats.since(before).acceptance
            yield runs, acceptance, engine.runner.token_bytes
    finally:
        engine.close()
