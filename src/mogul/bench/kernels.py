"""Time one experts layer on this machine, beside the peers that are installed.

Decides what counts: (x, ids, weights) -> out with the sort inside and the router outside; inputs
rotate where a call is short, so that the cache stays cold; variants take turns; a GPU's calls are
also timed in a CUDA graph, and the better of both counts. The floor is the larger of arithmetic
and bytes (expected distinct experts, no intermediate in memory) at the limits of this run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mogul.bench import ledger
from mogul.bench.calibrate_timing import copy_bandwidth
from mogul.bench.kernels_layer import Forward, Layer
from mogul.bench.kernels_peers import PEERS, variants
from mogul.core.errors import ConfigError
from mogul.core.log import ProgressBar, progress
from mogul.core.table import Table

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_TOKENS = (1, 8, 64, 456, 4096)
CPU_TOKENS = (1, 8, 64, 456)
GRAPH_TOKENS = 4096
"""Above this the time to launch kernels hides behind them."""
CELL_S = 0.3
"""Seconds spent on one variant at one number of tokens."""
LIMIT_SIZE = {"cpu": 1536}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one experts layer."""

    experts: int
    picks: int
    width: int
    inner: int
    groups: int = 1

    def __post_init__(self) -> None:
        if min(self.experts, self.picks, self.width, self.inner, self.groups) < 1:
            raise ConfigError(f"{self} has a size below 1", fix="write ExKxDxF, all at least 1")
        if self.picks > self.experts or self.experts % self.groups or self.picks % self.groups:
            raise ConfigError(
                f"{self.picks} picks of {self.experts} experts in {self.groups} groups cannot be",
                fix="groups must divide experts and picks, and picks not exceed experts",
            )

    @property
    def name(self) -> str:
        """ExKxDxF, with the groups where there are some."""
        sizes = [self.experts, self.picks, self.width, self.inner]
        return "x".join(map(str, sizes + ([self.groups] if self.groups > 1 else [])))

    def flop(self, tokens: int) -> float:
        """Arithmetic of a forward."""
        return 6.0 * tokens * self.picks * self.width * self.inner

    def num_bytes(self, tokens: int, weight_bytes: float, row_bytes: int) -> float:
        """Least traffic of a forward: weights of the distinct experts, rows in and out, routing."""
        distinct = self.experts * (1 - (1 - self.picks / self.experts) ** tokens)
        weights = distinct * 3 * self.width * self.inner * weight_bytes
        return weights + 2 * tokens * self.width * row_bytes + 12 * tokens * self.picks


def layer_shape(text: str, of_model: Callable[[str], tuple[int, ...]]) -> LayerShape:
    """Read ExKxDxF[xM], or ask `of_model` for the sizes of a model."""
    parts = text.split("x")
    if len(parts) in (4, 5) and all(part.isdigit() for part in parts):
        return LayerShape(*map(int, parts))
    if text.strip("0123456789x") == "":
        raise ConfigError(f"shape {text!r} has no four sizes", fix="write ExKxDxF, or ExKxDxFxM")
    return LayerShape(*of_model(text))


@dataclass(frozen=True)
class Request:
    """What to measure."""

    shape: LayerShape
    tokens: tuple[int, ...] = ()
    dtype: str | None = None
    train: bool = False
    backend: str = "auto"
    quant: str | None = None
    """Format of a further variant with quantised experts (forward only)."""
    peers: tuple[str, ...] = PEERS
    """Who runs beside mogul."""

    def __post_init__(self) -> None:
        if self.train and self.quant:
            raise ConfigError("quantised experts have no backward", fix="drop --quant or --train")
        if any(count < 1 for count in self.tokens):
            raise ConfigError(f"{min(self.tokens)} tokens of a call", fix="use 1 or more")
        unknown = sorted(set(self.peers) - set(PEERS))
        if unknown:
            raise ConfigError(f"no peer {unknown[0]!r} is known", fix=f"use {', '.join(PEERS)}")

    def resolved(self) -> tuple[torch.device, str, tuple[int, ...]]:
        """Device, dtype and token counts after the defaults."""
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        on_cpu = device.type == "cpu"
        tokens = self.tokens or (CPU_TOKENS if on_cpu else GPU_TOKENS)
        return device, self.dtype or ("fp32" if on_cpu else "bf16"), tokens


@dataclass(frozen=True)
class Limits:
    """What this machine reached in this run."""

    flop_per_s: float
    bytes_per_s: float

    def floor_s(self, flop: float, num_bytes: float) -> float:
        """The least time for this much work."""
        return max(flop / self.flop_per_s, num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Cell:
    """One variant at one number of tokens; seconds and bytes."""

    variant: str
    tokens: int
    seconds: float
    spread_s: float
    floor_s: float
    flop: float
    num_bytes: float
    error: float
    """Relative to the same layer in fp32 on up to 32 tokens."""
    kept_bytes: int | None = None


@dataclass
class Result:
    """All cells of a run."""

    request: Request
    device: str
    dtype: str
    limits: Limits
    cells: list[Cell] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that did not run, with the reason."""

    def write(self, folder: Path | None, *, record: bool) -> None:
        """Ledger rows: into `folder`/kernels.jsonl, and with `record` into the ledger."""
        rows = [ledger_row(self, cell) for cell in self.cells if cell.variant.startswith("mogul")]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            ledger.append(rows, folder / "kernels.jsonl")
        if record:
            ledger.append(rows)


def measure(request: Request) -> Result:
    """Run every cell; peers may compile for minutes, so it tells of each before it starts."""
    device, dtype, token_counts = request.resolved()
    with progress(f"timing {request.shape.name}", 2 + len(token_counts)) as bar:
        bar.update(0, "the machine's limits")
        result = Result(request, device_name(device), dtype, measure_limits(device, DTYPES[dtype]))
        layer = Layer.random(request.shape, DTYPES[dtype], device)
        bar.advance()
        forwards, result.absent = variants(
            layer, request.backend, request.quant, train=request.train, peers=request.peers,
            tell=lambda name: bar.update(bar.done, f"first call of {name}"),
        )  # fmt: skip
        for tokens in token_counts:
            bar.advance()
            result.cells += _cells(request, layer, tokens, forwards, result.limits, bar)
        bar.advance()
    return result


def _cells(
    request: Request, layer: Layer, tokens: int, forwards: dict[str, Forward], limits: Limits,
    bar: ProgressBar,
) -> list[Cell]:  # fmt: skip
    inputs = [layer.tokens(tokens) for _ in range(16 if tokens <= 8 else 4 if tokens <= 456 else 1)]
    errors = {}
    for name, forward in forwards.items():
        bar.update(bar.done, f"{tokens} tokens, {name}")
        errors[name] = layer.error(forward, inputs[0])
    calls = {name: _calls(forward, layer, inputs, request) for name, forward in forwards.items()}
    bar.update(bar.done, f"{tokens} tokens, in turns")
    times = interleaved_s(calls, layer.device, graph=tokens <= GRAPH_TOKENS and not request.train)
    cells = []
    for name, seconds in times.items():
        weight_bytes = forwards[name].weight_bytes or layer.gate_up.element_size()
        flop = request.shape.flop(tokens)
        num_bytes = request.shape.num_bytes(tokens, weight_bytes, layer.gate_up.element_size())
        if request.train:
            flop, num_bytes = 3 * flop, 3 * num_bytes
        floor_s = limits.floor_s(flop / forwards[name].flop_gain, num_bytes)
        cell = Cell(name, tokens, median(seconds), max(seconds) - min(seconds), floor_s, flop,
                    num_bytes, errors[name])  # fmt: skip
        if request.train and layer.device.type != "cpu":
            cell = replace(cell, kept_bytes=_kept_bytes(forwards[name], layer, inputs[0]))
        cells.append(cell)
    return cells


Inputs = tuple[Tensor, Tensor, Tensor]


def _calls(
    forward: Forward, layer: Layer, inputs: list[Inputs], request: Request
) -> list[Callable[[], object]]:
    """One call an input set: forward, or forward and backward."""
    if not request.train:
        return [lambda q=q: _inference(forward, q) for q in inputs]
    return [lambda q=q: _train_step(forward, layer, q) for q in inputs]


def _inference(forward: Forward, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        return forward.run(*inputs)


def _train_step(forward: Forward, layer: Layer, inputs: Inputs) -> tuple[Tensor, ...]:
    x, ids, weights = inputs
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_()]
    with layer.training() as parameters:
        out = forward.run(leaves[0], ids, leaves[1])
        return torch.autograd.grad(out, [*leaves, *parameters], torch.ones_like(out))


def _kept_bytes(forward: Forward, layer: Layer, inputs: Inputs) -> int:
    """Memory that a forward leaves allocated until its backward, output included."""
    x, ids, weights = (tensor.detach() for tensor in inputs)
    torch.accelerator.synchronize()
    before = torch.accelerator.memory_allocated()
    with layer.training():
        out = forward.run(x.requires_grad_(), ids, weights.requires_grad_())
        torch.accelerator.synchronize()
        kept = torch.accelerator.memory_allocated() - before
    del out
    return kept


def interleaved_s(
    calls: dict[str, list[Callable[[], object]]], device: torch.device, *, graph: bool
) -> dict[str, list[float]]:
    """Seconds of each variant, taking turns; on a GPU the better of plain calls and a graph."""
    for variant in calls.values():
        for call in variant[:2]:
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    if device.type == "cpu":
        end = time.perf_counter() + CELL_S * len(calls)
        turn = 0
        while time.perf_counter() < end or turn < 3:
            for name, variant in calls.items():
                times[name].append(_wall_s(variant[turn % len(variant)]))
            turn += 1
        return times
    from mogul.bench.calibrate_timing import seconds_of

    for _ in range(3):
        for name, variant in calls.items():
            plain = _event_s(variant)
            if graph:
                in_graph = seconds_of(lambda i, v=variant: v[i](), len(variant), device)
                plain = min(plain, in_graph)
            times[name].append(plain)
    return times


def _wall_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _event_s(calls: list[Callable[[], object]]) -> float:
    """Median seconds of single calls between device events."""
    pairs = []
    for index in range(max(10, len(calls))):
        begin, end = (torch.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[index % len(calls)]()
        end.record()
        pairs.append((begin, end))
    torch.accelerator.synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairs) * 1e-3


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Matrix product and copy (a processor: reading by matrix-vector products), best of several."""
    size = LIMIT_SIZE.get(device.type, 8192)
    square = torch.randn(size, size, device=device, dtype=dtype)
    if device.type == "cpu":
        big = torch.ones(2**28 // dtype.itemsize // 4096, 4096, dtype=dtype)
        vector = torch.ones(4096, dtype=dtype)
        bytes_per_s = big.nbytes / min(_wall_s(lambda: big @ vector) for _ in range(8))
        product_s = min(_wall_s(lambda: square @ square) for _ in range(8))
    else:
        bytes_per_s = copy_bandwidth(device)
        product_s = min(_event_s([lambda: square @ square]) for _ in range(3))
    return Limits(2 * size**3 / product_s, bytes_per_s)


def device_name(device: torch.device) -> str:
    """The processor or GPU as its system names it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return ledger.cpu_name() if device.type == "cpu" else str(device)


def table(result: Result) -> Table:
    """The result for people and scripts."""
    columns = ["tokens", "variant", "ms", "floor ms", "ratio", "TFLOP/s", "GB/s", "error"]
    if result.request.train:
        columns.append("kept MiB")
    rows = []
    for cell in result.cells:
        row: list[Any] = [cell.tokens, cell.variant, cell.seconds * 1e3, cell.floor_s * 1e3,
                          round(cell.seconds / cell.floor_s, 3), cell.flop / cell.seconds / 1e12,
                          cell.num_bytes / cell.seconds / 1e9, cell.error]  # fmt: skip
        if result.request.train:
            row.append(None if cell.kept_bytes is None else cell.kept_bytes / 2**20)
        rows.append(row)
    limits = result.limits
    reached = f"{limits.flop_per_s / 1e12:.3g} TFLOP/s, {limits.bytes_per_s / 1e9:.4g} GB/s"
    notes = [
        f"{result.device}, torch {torch.__version__}; limits of this run: {reached}",
        *(f"{name} did not run: {reason}" for name, reason in result.absent.items()),
    ]
    kind = "forward and backward" if result.request.train else "forward"
    title = f"Experts layer {result.request.shape.name}, {result.dtype}, {kind}"
    return Table(title, columns, rows, notes)


def ledger_row(result: Result, cell: Cell) -> dict[str, Any]:
    """One cell as a ledger row, with the peers at the same number of tokens."""
    peers = {
        other.variant: round(other.seconds * 1e3, 5)
        for other in result.cells
        if other.tokens == cell.tokens and other.variant != cell.variant
    }
    kind = "train" if result.request.train else "forward"
    return ledger.row(
        result.device,
        bench="kernels",
        case=f"{result.request.shape.name} {result.dtype} {cell.variant} {kind} {cell.tokens}",
        metric="time",
        unit="ms",
        value=round(cell.seconds * 1e3, 5),
        spread=round(cell.spread_s * 1e3, 5),
        runs=3,
        floor=round(cell.floor_s * 1e3, 5),
        ratio=round(cell.seconds / cell.floor_s, 4),
        peers=peers,
        relative_error=float(f"{cell.error:.2e}"),
        kept_bytes=cell.kept_bytes,
        ceilings={
            "tflop_per_s": round(result.limits.flop_per_s / 1e12, 3),
            "tb_per_s": round(result.limits.bytes_per_s / 1e12, 4),
        },
    )
