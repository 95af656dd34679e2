"""Measure this machine for the simulator: products, experts, attention, launches.

Writes one table a kind and format in the form `mogul.simulate.measurements.read_table` reads, and
`machine.json` with the copy bandwidth and the time to launch a kernel. Inputs rotate through
enough copies to leave the cache; on a GPU calls are captured in a graph, so that kernels are
timed and not their launches.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from mogul.bench import ledger
from mogul.core.files import atomic_write
from mogul.core.log import progress
from mogul.kernels import moe_forward
from mogul.spec.quant import bytes_of

TORCH_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPIES_BYTES = 200 * 2**20
"""Inputs rotate through at least this much memory."""

MOE_SHAPES = ((5120, 1344, 64, 8), (2048, 768, 128, 8), (1536, 256, 128, 8), (7168, 2048, 32, 8))
"""Hidden, width, experts, picks."""


@dataclass(frozen=True)
class Grid:
    """What to measure; `small` is for tests and a first look."""

    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    products: tuple[tuple[int, int], ...] = (
        (1024, 5120), (5120, 5120), (6144, 4096), (2048, 7168), (16384, 4096), (4096, 12288),
        (51200, 5120),
    )  # fmt: skip
    experts: tuple[tuple[int, int, int, int], ...] = MOE_SHAPES
    contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    heads: tuple[tuple[int, int], ...] = ((8, 1), (32, 4), (40, 8))
    budget_s: float = 540.0
    """After this nothing new is measured."""


SMALL = Grid(
    tokens=(1, 16),
    products=((64, 64),),
    experts=((64, 32, 8, 2),),
    contexts=(32,),
    batches=(1, 4),
    heads=((4, 2),),
)

Case = tuple[str, Mapping[str, float], Callable[[int], object], int]
"""Kind, dimensions, a call on input copy i, and how many copies there are."""


def calibrate(folder: Path, device_name: str, grid: Grid, dtype: str = "bf16") -> list[Path]:
    """Measure and write the tables; returns their paths.

    `device_name` is the simulator's name of this machine (`mogul simulate hw`).
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    rows: dict[str, list[dict[str, float]]] = {}
    start_s = time.monotonic()
    cases = list(_cases(grid, device, TORCH_TYPES[dtype]))
    with progress("measuring", len(cases)) as bar:
        for build in cases:
            if time.monotonic() - start_s > grid.budget_s:
                break
            kind, dims, call, copies = build()
            rows.setdefault(kind, []).append({**dims, "seconds": seconds_of(call, copies, device)})
            bar.advance(1, kind)
    paths = [
        _write(folder, kind, device_name, dtype, table, _source(device))
        for kind, table in rows.items()
    ]
    machine = {"copy_bytes_per_s": copy_bandwidth(device), "launch_s": launch_s(device)}
    machine |= {"device": device_name, "source": _source(device)}
    atomic_write(folder / "machine.json", json.dumps(machine, indent=2) + "\n")
    return [*paths, folder / "machine.json"]


def _source(device: torch.device) -> str:
    name = ledger.cpu_name()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, CUDA {torch.version.cuda}"
    found = ledger.row(bench="calibrate", case="", metric="", unit="", value=0, runs=1)
    return f"own run, {found['date']}, {name}, torch {torch.__version__}, mogul {found['commit']}"


def seconds_of(call: Callable[[int], object], copies: int, device: torch.device) -> float:
    """Median time of a call over rotated inputs; a graph of them on a GPU."""
    for index in range(min(copies, 3)):
        call(index)
    if device.type == "cuda":
        return _graph_s(call, copies)
    times = []
    start_s = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start_s < 0.05 and len(times) < 100):
        before = time.perf_counter()
        call(len(times) % copies)
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def _graph_s(call: Callable[[int], object], copies: int) -> float:
    """Time a call inside one graph of `copies` calls; what cannot be captured runs as it is."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for index in range(copies):
                call(index)
        replay: Callable[[], object] = graph.replay
    except RuntimeError:
        replay = lambda: [call(index) for index in range(copies)]  # noqa: E731

    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / copies)
    return sorted(times[2:])[len(times[2:]) // 2]


def _cases(grid: Grid, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], Case]]:
    """Builders of every case; inputs are made only when a case is measured."""
    for tokens in grid.tokens:
        for n, k in grid.products:
            yield lambda m=tokens, n=n, k=k: _gemm(m, n, k, device, dtype)
        for shape in grid.experts:
            yield lambda m=tokens, shape=shape: _moe(m, shape, device, dtype)
    for context in grid.contexts:
        for heads, kv_heads in grid.heads:
            for batch in grid.batches:
                if batch * context <= 2**20:
                    yield lambda b=batch, c=context, h=heads, n=kv_heads: _decode(
                        b, c, h, n, device, dtype
                    )
            yield lambda c=context, h=heads, n=kv_heads: _prefill(c, h, n, device, dtype)


def _copies(num_bytes: float) -> int:
    return int(max(1, min(16, COPIES_BYTES // max(1, num_bytes))))


def _gemm(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Case:
    copies = _copies(n * k * dtype.itemsize)
    x = torch.randn(m, k, device=device, dtype=dtype)
    weights = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
    return "gemm", {"m": m, "n": n, "k": k}, lambda i: functional.linear(x, weights[i]), copies


def _moe(
    tokens: int, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> Case:
    hidden, width, experts, picks = shape
    copies = _copies(3 * hidden * width * experts * dtype.itemsize)
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    up = [
        torch.randn(experts, 2 * width, hidden, device=device, dtype=dtype) * 0.02
        for _ in range(copies)
    ]
    down = [
        torch.randn(experts, hidden, width, device=device, dtype=dtype) * 0.02
        for _ in range(copies)
    ]
    ids = torch.rand(tokens, experts, device=device).topk(picks).indices
    weights = torch.full((tokens, picks), 1 / picks, device=device)
    distinct = float(ids.unique().numel())
    dims = {"rows": tokens * picks, "distinct": distinct, "hidden": hidden, "width": width}
    return "moe", dims, lambda i: moe_forward(x, up[i], down[i], ids, weights), copies


def _decode(
    batch: int, context: int, heads: int, kv_heads: int, device: torch.device, dtype: torch.dtype
) -> Case:
    width = 128
    query = torch.randn(batch, heads, 1, width, device=device, dtype=dtype)
    key = torch.randn(batch, kv_heads, context, width, device=device, dtype=dtype)
    dims = {"batch": batch, "context": context, "heads": heads, "kv_heads": kv_heads}
    dims |= {"key_dim": width, "value_dim": width, "kv_bytes": dtype.itemsize}
    return "attention_decode", dims, lambda _: _attend(query, key, is_causal=False), 1


def _prefill(
    tokens: int, heads: int, kv_heads: int, device: torch.device, dtype: torch.dtype
) -> Case:
    width = 128
    query = torch.randn(1, heads, tokens, width, device=device, dtype=dtype)
    key = torch.randn(1, kv_heads, tokens, width, device=device, dtype=dtype)
    dims = {"batch": 1, "tokens": tokens, "heads": heads, "kv_heads": kv_heads}
    dims |= {"key_dim": width, "value_dim": width}
    return "attention_prefill", dims, lambda _: _attend(query, key, is_causal=True), 1


def _attend(query: torch.Tensor, key: torch.Tensor, *, is_causal: bool) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        query, key, key, is_causal=is_causal, enable_gqa=True
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    count = 2**27 if device.type != "cpu" else 2**25
    source = torch.empty(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * count / seconds_of(lambda _: target.copy_(source), 1, device)


def launch_s(device: torch.device) -> float:
    """Host time to launch one small kernel without a graph."""
    x = torch.zeros(8, device=device)
    for _ in range(100):
        x.add_(1)
    torch.accelerator.synchronize() if device.type != "cpu" else None
    start_s = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    return (time.perf_counter() - start_s) / 1000


def _write(
    folder: Path,
    kind: str,
    device_name: str,
    dtype: str,
    rows: list[dict[str, float]],
    source: str,
) -> Path:
    text = io.StringIO()
    head: Mapping[str, Any] = {
        "kind": kind,
        "device": device_name,
        "engine": "mogul",
        "dtype": dtype,
        "source": source,
        "note": f"weights of {bytes_of(dtype):g} bytes a number",
    }
    text.writelines(f"# {key} = {value}\n" for key, value in head.items())
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = folder / f"{device_name}-{kind}-{dtype}.csv"
    atomic_write(path, text.getvalue())
    return path
