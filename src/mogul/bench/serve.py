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

from mogul.bench import ledger
from mogul.bench.calibrate_timing import copy_bandwidth, device_name
from mogul.bench.serve_floor import Weights, count_distinct, device_of, weights_of
from mogul.bench.serve_load import FORCED_TEMPERATURE, Timeline, Workload, drive
from mogul.core.errors import ConfigError
from mogul.core.log import say
from mogul.core.table import Table

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
) -> Result:
    """Open a model as the engine would, and measure it; see `measure`."""
    from mogul.serve.kv_scales import read_scales
    from mogul.serve.loading import open_model

    where = device_of(device)
    bytes_per_s = copy_bandwidth(where)
    model = open_model(
        path,
        load=load,  # pyright: ignore[reportArgumentType]
        dtype=dtype,
        device=where.type,
        experts=experts,
        quantise=quantise,
    )
    if request.engine.get("kv_dtype") == "fp8" and load == "checkpoint":
        request = replace(request, kv_scales=read_scales(path))
    result = measure(model, request, name=name or path, bytes_per_s=bytes_per_s)
    return replace(result, dtype=f"{result.dtype}, {quantise}") if quantise else result


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


COLUMNS = (
    "load", "TTFT ms", "TTFT p95", "TPOT ms", "TPOT p95", "ITL p99 ms", "prefill tok/s",
    "output tok/s", "decode ms", "distinct", "floor ms", "ratio",
)  # fmt: skip


def table(result: Result) -> Table:
    """One row a load."""
    rows = [_table_row(cell) for cell in result.cells]
    one = result.cells[0].workload
    speed = f"{result.bytes_per_s / 1e9:.4g} GB/s measured by a copy"
    sizes = f"{one.input_tokens} + {one.output_tokens} tokens a request, none shared"
    notes = [
        f"{result.device}; {speed}; {sizes}",
        "decode: a token of every request while all decode (arriving at random: median ITL)",
        "floor: weights, distinct experts, keys and values read once",
    ]
    for cell in result.cells:
        if cell.workload.temperature == FORCED_TEMPERATURE:
            notes.append(f"{load_name(cell.workload)}: tokens at random")
        if cell.workload.rate is not None:
            notes.append(f"{load_name(cell.workload)}: {cell.decoding:.1f} decode together")
        if cell.acceptance:
            shares = ", ".join(f"{share:.2f}" for share in cell.acceptance)
            notes.append(f"{load_name(cell.workload)}: guesses that stood, by position: {shares}")
    return Table(f"Serving {result.model}, {result.dtype}", COLUMNS, rows, notes)


def _table_row(cell: Cell) -> list[Any]:
    return [
        load_name(cell.workload),
        cell.percentile("ttft_s", 50) * 1e3,
        cell.percentile("ttft_s", 95) * 1e3,
        cell.percentile("tpot_s", 50) * 1e3,
        cell.percentile("tpot_s", 95) * 1e3,
        cell.percentile("itl_s", 99) * 1e3,
        None if cell.workload.rate else round(cell.typical("prefill_per_s")),
        round(cell.typical("output_per_s"), 1),
        None if cell.decode_s is None else cell.decode_s * 1e3,
        None if cell.distinct is None else round(cell.distinct, 1),
        cell.floor_s * 1e3,
        None if cell.ratio is None else round(cell.ratio, 2),
    ]


def load_name(workload: Workload) -> str:
    """A load in a word."""
    if workload.rate is None:
        return f"batch {workload.requests}"
    return f"{workload.rate:g}/s x {workload.requests}"


PERCENTILES = (50, 95, 99)


def ledger_rows(result: Result) -> list[dict[str, Any]]:
    """Two rows a closed load (decode step, prefill), one an open load (time to first token)."""
    rows = []
    for cell in result.cells:
        one = cell.workload
        common = {
            "bench": "serve",
            "case": f"{result.model} {result.dtype}, {load_name(one)}, {one.input_tokens} + "
            f"{one.output_tokens} tokens",
            "runs": len(cell.runs),
            "tokens": "random" if one.temperature == FORCED_TEMPERATURE else "greedy",
        }
        more = _about(cell)
        if one.rate is not None:
            waits = [run.ttft_s().mean() * 1e3 for run in cell.runs]
            more["decoding"] = round(cell.decoding, 2)
            rows.append(_row(result, common, "time to first token", "ms", waits, **more))
            continue
        steps = [run.decode_s * 1e3 for run in cell.runs if run.decode_s is not None]
        if steps:
            rows.append(_row(result, common, "decode step", "ms", steps, **more))
        speeds = [run.prefill_per_s for run in cell.runs]
        rows.append(_row(result, common, "prefill speed", "tokens/s", speeds))
    return rows


def _about(cell: Cell) -> dict[str, Any]:
    """What stands beside a load's time: percentiles in milliseconds, experts, floor, ratio."""
    found: dict[str, Any] = {
        f"{what}_ms": {
            f"p{share}": round(cell.percentile(f"{what}_s", share) * 1e3, 4)
            for share in PERCENTILES
        }
        for what in ("ttft", "tpot", "itl")
    }
    return found | {
        "output_per_s": round(cell.typical("output_per_s"), 2),
        "distinct_experts": None if cell.distinct is None else round(cell.distinct, 3),
        "floor": round(cell.floor_s * 1e3, 4),
        "ratio": None if cell.ratio is None else round(cell.ratio, 3),
        "acceptance": list(cell.acceptance),
    }


def _row(
    result: Result, common: dict[str, Any], metric: str, unit: str, values: list[float], **more: Any
) -> dict[str, Any]:
    return ledger.row(
        result.device,
        **common,
        metric=metric,
        unit=unit,
        value=round(float(median(values)), 4),
        spread=[round(float(min(values)), 4), round(float(max(values)), 4)],
        bandwidth_tb_s=round(result.bytes_per_s / 1e12, 4),
        **more,
    )
