"""How far is paged attention on one GPU from reading its keys and values once?

Decode rows: one query a sequence, every length the same, scattered pages, keys and values written
in the same call; a CUDA graph over as many caches as the L2 cache cannot hold, times a call. The
floor is the bytes of keys and values over the copy bandwidth measured in this run. Prompt rows:
whole prompts; the floor is the arithmetic of the causal half at the matrix peak measured in this
run. Peer: PyTorch's attention over keys that lie in one piece.

    python benchmarks/bench_paged_attention.py --shapes qwen,pangu --out rows.jsonl
    python benchmarks/bench_paged_attention.py --backends triton,flashinfer,flashinfer-fa2

FlashInfer's rows are planned before the graph, as in the engine; `plan_us` is what the host took
for the plan of one step. "flashinfer-fa2" has prompts attended by the kernels for all devices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from common import ceilings, rel, time_graph

from mogul.bench import ledger
from mogul.kernels import paged_attention
from mogul.kernels.triton import paged

SHAPES = {"qwen": (32, 4, 128), "pangu": (40, 8, 128), "small": (9, 3, 64)}
"""Query heads, key heads, width: Qwen3-30B-A3B, Pangu Pro MoE, SmolLM2."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
L2_BYTES = 128 << 20


def make(
    shape: str,
    sequences: list[tuple[int, int]],
    cache: str,
    page_size: int,
    *,
    padding: int = 0,
    spare_pages: int = 0,
) -> dict[str, Any]:
    """One call for sequences of (queries, length)."""
    heads, kv_heads, width = SHAPES[shape]
    dtype = torch.float16 if cache == "fp16" else torch.bfloat16
    tokens = sum(queries for queries, _ in sequences) + padding
    counts = [-(-length // page_size) for _, length in sequences]
    order = torch.randperm(sum(counts) + spare_pages)
    tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
    slots = torch.full((tokens,), -1)
    starts, used = [0], 0
    for s, (queries, length) in enumerate(sequences):
        pages = order[used : used + counts[s]]
        used += counts[s]
        tables[s, : counts[s]] = pages
        position = torch.arange(length - queries, length)
        slots[starts[-1] : starts[-1] + queries] = (
            pages[position // page_size] * page_size + position % page_size
        )
        starts.append(starts[-1] + queries)
    pages_shape = (len(order), page_size, kv_heads, width)

    def new(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=dtype)

    def ints(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32).cuda()

    return {
        "query_THC": new(tokens, heads, width),
        "key_TNC": new(tokens, kv_heads, width),
        "value_TNC": new(tokens, kv_heads, width),
        "key_cache": new(*pages_shape).to(DTYPES[cache]),
        "value_cache": new(*pages_shape).to(DTYPES[cache]),
        "slots_T": slots.cuda(),
        "tables_SB": tables.cuda(),
        "query_starts": ints(starts),
        "lengths_S": ints([length for _, length in sequences]),
        "max_query_len": max(queries for queries, _ in sequences),
        "scaling": width**-0.5,
    }


def error_of(call: dict[str, Any], backend: str, **more: Any) -> dict[str, float]:
    """Relative errors against the reference; caches compared byte by byte."""
    found = []
    for one in (backend, "reference"):
        mine = {name: call[name].clone() for name in ("key_cache", "value_cache")}
        out = paged_attention(**{**call, **mine}, **more, backend=one)
        found.append((out, mine["key_cache"], mine["value_cache"]))
    got, want = found
    return {
        "out": rel(got[0], want[0]),
        "bytes_off": float(
            sum(
                (a.view(torch.uint8) != b.view(torch.uint8)).sum()
                for a, b in zip(got[1:], want[1:], strict=True)
            )
        ),
        "padding": float(got[0][int(call["query_starts"][-1]) :].abs().sum()),
    }


MIXED = [(1, 900), (0, 50), (5, 5), (300, 700), (1, 1), (130, 130), (8, 2000)]
DECODE = [(1, 1), (1, 17), (1, 64), (1, 1000), (1, 3000), (4, 77), (0, 0)]


def check(
    shape: str, cache: str, name: str, window: int | None, has_sinks: bool, backend: str = "triton"
) -> dict[str, Any]:
    """One ragged batch against the reference."""
    heads, kv_heads, _ = SHAPES[shape]
    call = make(shape, MIXED if name == "mixed" else DECODE, cache, 16, padding=3)
    options: dict[str, Any] = {"sliding_window": window}
    if has_sinks:
        options["sinks"] = torch.randn(heads, device="cuda")
    if cache == "fp8":
        options["key_scale"] = torch.rand(kv_heads, device="cuda") + 0.5
        options["value_scale"] = torch.full((1,), 0.7, device="cuda")
    row = {"kind": "check", "shape": shape, "cache": cache, "name": name, "window": window}
    row["backend"] = backend
    try:
        return {**row, "sinks": has_sinks, **error_of(call, backend, **options)}
    except Exception as error:
        traceback.print_exc()
        return {**row, "sinks": has_sinks, "failed": repr(error)[:300]}


def checks(shapes: list[str], caches: list[str], backends: list[str]) -> list[dict[str, Any]]:
    """Every shape and kind of cache; windows and sinks on the first; a graph with new lengths."""
    names = ("mixed", "decode")
    rows = []
    for backend in dict.fromkeys(one.split("-")[0] for one in backends):
        for shape in shapes:
            for cache in caches:
                rows += [check(shape, cache, name, None, False, backend) for name in names]
    if "triton" not in backends:
        return rows
    for name in names:
        rows.append(check(shapes[0], caches[0], name, 128, True))
    rows.append({"kind": "check", "name": "replay", **replay()})
    return rows


def replay() -> dict[str, float]:
    """Capture at one set of lengths, replay with another."""
    call = make("qwen", [(1, 64)] * 8, "bf16", 16, spare_pages=600)
    call["tables_SB"] = torch.zeros(8, 128, dtype=torch.int32, device="cuda")
    out = torch.empty_like(call["query_THC"])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        paged_attention(**call, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(paged_attention(**call, backend="triton"))
    fresh = make("qwen", [(1, n) for n in (1, 5, 900, 1100, 64, 65, 333)], "bf16", 16, padding=1)
    count = fresh["key_cache"].shape[0]
    for name in ("key_cache", "value_cache"):
        call[name][:count] = fresh[name]
    for name in ("query_THC", "key_TNC", "value_TNC", "slots_T"):
        call[name].copy_(fresh[name])
    call["tables_SB"][:7, : fresh["tables_SB"].shape[1]] = fresh["tables_SB"]
    call["query_starts"].copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 7]))
    call["lengths_S"].copy_(torch.tensor([1, 5, 900, 1100, 64, 65, 333, 0]))
    graph.replay()
    want = paged_attention(**fresh, backend="reference")
    return {"out": rel(out, want), "padding": float(out[7:].abs().sum())}


def clones(call: dict[str, Any]) -> list[dict[str, Any]]:
    """As many calls, with caches of their own, as outgrow the L2 cache."""
    size = 2 * call["key_cache"].nbytes
    copies = [call]
    while len(copies) * size < L2_BYTES and len(copies) < 64:
        mine = {name: call[name].clone() for name in ("key_cache", "value_cache")}
        copies.append({**call, **mine})
    return copies


def decode_cell(
    shape: str,
    cache: str,
    batch: int,
    context: int,
    page_size: int,
    tiles: list[paged.FewTile | None],
) -> list[dict[str, Any]]:
    """Milliseconds of each tile at one size."""
    calls = clones(make(shape, [(1, context)] * batch, cache, page_size))
    kv_heads, width = SHAPES[shape][1:]
    size = 2 * batch * context * kv_heads * width * calls[0]["key_cache"].element_size()
    rows = []
    for tile in tiles:
        paged.few_tile = tile
        row = {
            "kind": "decode", "shape": shape, "cache": cache, "batch": batch, "context": context,
            "page": page_size, "bytes": size, "tile": asdict(tile) if tile else "chosen",
        }  # fmt: skip
        try:
            run = [lambda c=c: paged_attention(**c, backend="triton") for c in calls]
            row["ms"] = time_graph(run, 7)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        rows.append(row)
    return rows


def sdpa_ms(shape: str, batch: int, queries: int, context: int) -> float:
    """The peer on keys in one piece."""
    heads, kv_heads, width = SHAPES[shape]

    def new(n: int, length: int) -> torch.Tensor:
        return torch.randn(batch, n, length, width, device="cuda", dtype=torch.bfloat16)

    size = 4 * batch * kv_heads * context * width
    sets = [
        (new(heads, queries), new(kv_heads, context), new(kv_heads, context))
        for _ in range(max(1, min(64, L2_BYTES // size)))
    ]
    calls: list[Callable[[], object]] = [
        lambda s=s: scaled_dot_product_attention(*s, is_causal=queries > 1, enable_gqa=True)
        for s in sets
    ]
    return time_graph(calls, 7)


def prompt_of(text: str) -> tuple[int, int, int]:
    """Sequences, queries and keys of `8x1024`, or `1x2048/8192` where earlier keys are there."""
    batch, _, rest = text.partition("x")
    queries, _, keys = rest.partition("/")
    return int(batch), int(queries), int(keys or queries)


def causal_flop(shape: str, batch: int, queries: int, context: int) -> int:
    """Operations of the keys that each query sees."""
    heads, _, width = SHAPES[shape]
    return 2 * batch * heads * width * queries * (2 * context - queries)


def prompt_cell(
    shape: str, prompt: tuple[int, int, int], page_size: int, tiles: list[paged.ManyTile]
) -> list[dict[str, Any]]:
    """Whole prompts, or their last parts."""
    batch, queries, context = prompt
    call = make(shape, [(queries, context)] * batch, "bf16", page_size)
    rows = []
    for tile in tiles:
        paged.many_tile = tile
        row = {
            "kind": "prompt", "shape": shape, "batch": batch, "queries": queries,
            "context": context, "flop": causal_flop(shape, *prompt), "page": page_size,
            "tile": asdict(tile),
        }  # fmt: skip
        try:
            row["ms"] = time_graph([lambda: paged_attention(**call, backend="triton")], 7)
        except Exception as error:
            row["failed"] = repr(error)[:300]
        rows.append(row)
    return rows


def planned(call: dict[str, Any]) -> tuple[Any, float]:
    """FlashInfer's plan of a call, as a captured step has it, and the microseconds of making it."""
    from mogul.kernels.triton.flashinfer_paged import Plans

    numbers = tuple(call[name].cpu() for name in ("query_starts", "lengths_S", "tables_SB"))
    plans = Plans(call["query_THC"].device, call["key_cache"].shape[1], *numbers[2].shape)
    step = (numbers, call["max_query_len"], ("bench", len(call["query_THC"])))
    plans.begin(*step)
    with plans.running():
        paged_attention(**call, backend="flashinfer")
    spent = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        plans.begin(*step)
        spent.append(1e6 * (time.perf_counter() - start))
    return plans, statistics.median(spent)


def flashinfer_cell(
    backend: str, kind: str, shape: str, cache: str, sizes: tuple[int, int, int], page_size: int
) -> dict[str, Any]:
    """Milliseconds of FlashInfer's kernels, with the launch that writes keys and values."""
    from mogul.kernels.triton import flashinfer_paged

    _, kv_heads, width = SHAPES[shape]
    batch, queries, context = sizes
    call = make(shape, [(queries, context)] * batch, cache, page_size)
    calls = [call] if kind == "prompt" else clones(call)
    row: dict[str, Any] = {
        "kind": kind, "backend": backend, "shape": shape, "cache": cache, "batch": batch,
        "queries": queries, "context": context, "page": page_size,
        "bytes": 2 * batch * context * kv_heads * width * call["key_cache"].element_size(),
        "flop": causal_flop(shape, *sizes),
    }  # fmt: skip
    flashinfer_paged.prompt_kernels = "fa2" if backend.endswith("fa2") else "auto"
    try:
        plans, row["plan_us"] = planned(call)
        with plans.running():
            run = [lambda c=c: paged_attention(**c, backend="flashinfer") for c in calls]
            row["ms"] = time_graph(run, 7)
    except Exception as error:
        traceback.print_exc()
        row["failed"] = repr(error)[:300]
    return row


def few_tiles(kind: str) -> list[paged.FewTile | None]:
    """What the product chooses, or the candidates of a search."""
    if kind == "default":
        return [None]
    return [
        paged.small_tile,
        paged.large_tile,
        # The page of a block is read in the same loop, which halves the depth of the pipeline:
        # 4 stages prefetch nothing, 6 one block, 8 two.
        paged.FewTile(block=32, per_sm=4, min_blocks=2, stages=6),
        paged.FewTile(block=32, per_sm=4, min_blocks=2, stages=8),
        paged.FewTile(block=32, per_sm=2, min_blocks=2, stages=8),
        paged.FewTile(block=64, per_sm=3, min_blocks=1, stages=6),
        paged.FewTile(block=64, per_sm=2, min_blocks=1, stages=8),
    ]


def many_tiles(kind: str) -> list[paged.ManyTile]:
    """One tile, or the candidates of a search."""
    if kind == "default":
        return [paged.many_tile]
    return [
        paged.ManyTile(rows=64, block=64, warps=4, stages=3),
        paged.ManyTile(rows=64, block=64, warps=4, stages=2),
        paged.ManyTile(rows=128, block=64, warps=4, stages=2),
        paged.ManyTile(rows=64, block=128, warps=4, stages=2),
        paged.ManyTile(rows=128, block=128, warps=8, stages=2),
        paged.ManyTile(rows=64, block=64, warps=4, stages=4),
        paged.ManyTile(rows=128, block=64, warps=8, stages=5),
    ]


def complete(row: dict[str, Any], peak: dict[str, float]) -> dict[str, Any]:
    """Add floor and ratio."""
    if "ms" not in row:
        return row
    if row["kind"] == "decode":
        row["floor_ms"] = row["bytes"] / peak["tb_per_s"] / 1e9
    else:
        row["floor_ms"] = row["flop"] / peak["tflop_per_s"] / 1e9
    return {**row, "ratio": row["ms"] / row["floor_ms"]}


def main() -> None:
    """Check, then measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="qwen,pangu")
    parser.add_argument("--caches", default="bf16,fp8")
    parser.add_argument("--batches", default="1,8,64,96")
    parser.add_argument("--contexts", default="1024,2048,8192")
    parser.add_argument("--pages", default="16")
    parser.add_argument("--prompts", default="8x1024,1x8192", help="see prompt_of")
    parser.add_argument("--backends", default="triton", help="triton, flashinfer, flashinfer-fa2")
    parser.add_argument("--tiles", choices=("default", "search"), default="default")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--peer", action="store_true", help="PyTorch's attention beside it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--record", type=Path, help="write ledger rows here")
    args = parser.parse_args()
    torch.manual_seed(0)
    peak = ceilings()
    print(json.dumps({"device": torch.cuda.get_device_name(), **peak}), flush=True)

    def emit(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row = complete(row, peak)
            print(json.dumps(row), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if args.record and "ms" in row:
                ledger.append([ledger_row(row)], args.record)

    backends = args.backends.split(",")
    others = [name for name in backends if name != "triton"]
    if not args.no_check:
        emit(checks(args.shapes.split(","), args.caches.split(","), backends))
    for shape in args.shapes.split(","):
        for cache in args.caches.split(","):
            for page in map(int, args.pages.split(",")):
                for batch in map(int, args.batches.split(",")):
                    for context in map(int, args.contexts.split(",")):
                        if "triton" in backends:
                            tiles = few_tiles(args.tiles)
                            emit(decode_cell(shape, cache, batch, context, page, tiles))
                        if "flashinfer" in backends:
                            cell = (shape, cache, (batch, 1, context), page)
                            emit([flashinfer_cell("flashinfer", "decode", *cell)])
        for prompt in map(prompt_of, filter(None, args.prompts.split(","))):
            for page in map(int, args.pages.split(",")):
                if "triton" in backends:
                    emit(prompt_cell(shape, prompt, page, many_tiles(args.tiles)))
                cell = (shape, "bf16", prompt, page)
                emit([flashinfer_cell(name, "prompt", *cell) for name in others])
            if args.peer and prompt[1] == prompt[2]:
                ms = sdpa_ms(shape, *prompt)
                print(json.dumps({"peer": "sdpa", "shape": shape, "prompt": prompt, "ms": ms}))
        if args.peer:
            for batch in map(int, args.batches.split(",")):
                for context in map(int, args.contexts.split(",")):
                    ms = sdpa_ms(shape, batch, 1, context)
                    cell = {"peer": "sdpa", "shape": shape, "batch": batch, "context": context}
                    print(json.dumps({**cell, "ms": ms}), flush=True)


def ledger_row(row: dict[str, Any]) -> dict[str, Any]:
    """One measurement as the ledger wants it."""
    names = ("cache", "batch", "queries", "context", "page", "backend")
    names = [n for n in names if n in row and not (n == "queries" and row["kind"] == "decode")]
    cell = ", ".join(f"{name} {row[name]}" for name in names)
    more = {"plan_us": round(row["plan_us"])} if "plan_us" in row else {}
    return ledger.row(
        torch.cuda.get_device_name(),
        bench="paged_attention",
        case=f"{row['kind']}, {row['shape']} {SHAPES[row['shape']]}, {cell}",
        metric="time a call",
        unit="ms",
        value=row["ms"],
        runs=7,
        floor=row["floor_ms"],
        ratio=row["ratio"],
        **more,
    )


if __name__ == "__main__":
    main()
