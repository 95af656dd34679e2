"""Two (or more) devices on real shapes: exactness, the layer by router and dispatch, training.

python benchmarks/bench_devices.py --out FOLDER                  smoke, both layers, training
python benchmarks/bench_devices.py --out FOLDER --parts decode   the whole Pangu Pro MoE decodes
python benchmarks/bench_devices.py --out FOLDER --ranks 4 --parts layers --ways static,all_to_all
python benchmarks/bench_devices.py --out FOLDER --tiny --cpu     the same code on CPU processes
python benchmarks/bench_devices.py --out FOLDER --cpu --ranks 4 --parts computing
                                                                 what each rank's experts compute

Writes rows.jsonl as rows come, then devices.html and ledger.jsonl. A part that fails or hangs costs
itself only (`mogul.bench.devices_units`). Kernels are compiled by several processes at once while
the first parts run.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

START = time.monotonic()
SHAPES = {"pangu-pro": (64, 8, 5120, 1344, 8), "qwen3-30b-a3b": (128, 8, 2048, 768, 8)}
TOKENS = (16, 64, 456, 4096, 16384)
TINY_SHAPES = {"tiny": (16, 4, 64, 32, 4)}
TINY_TOKENS = (16, 4096)
TRAIN = {"layers": 4, "vocabulary": 32768, "sequences": 2, "length": 4096}
WARM = "kernels_are_compiled"
STEPS = ("alone", "static1", "static2", "static4", "all_to_all1")
LAYOUTS = ("tp-window", "h2p-window", "tp", "tp-window-compiled", "h2p-window-compiled")
PARTS = ("smoke", "layers", "training", "decode", "computing")


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def warm_cases(
    shapes: dict[str, tuple[int, ...]], ranks: int, token_counts: tuple[int, ...], train: bool
) -> list[tuple[int, ...]]:
    """(experts, picks, width, inner, rows, train) of the calls to come, largest first."""
    found = []
    for experts, picks, width, inner, _ in shapes.values():
        local = experts // ranks
        for tokens in token_counts:
            for rows in (tokens, *((tokens // 2, tokens // 4) if tokens >= 4096 else ())):
                found.append((local, picks // ranks, width, inner, rows, 0))
                found.append((local, picks, width, inner, rows, 0))
        found.append((local, picks // ranks, width, inner, 456, 1))
        found.append((local, picks, width, inner, 456, 1))
        found.append((experts, picks, width, inner, 456 // ranks, 1))
    if train:
        experts, picks, width, inner, _ = SHAPES["pangu-pro"]
        rows = TRAIN["sequences"] * TRAIN["length"]
        found.append((experts, picks, width, inner, rows, 1))
        for chunks in (1, 2, 4):
            share = (experts // ranks, picks // ranks, width, inner, ranks * rows // chunks, 1)
            found.append(share)
    return sorted(set(found), key=lambda case: (-case[5], -case[4]))


def compile_cases(cases: list[tuple[int, ...]], device: int) -> None:
    """Run each case once, so that its kernels lie in the cache on disk."""
    import torch

    from mogul.kernels import moe_forward

    torch.cuda.set_device(device)
    for experts, picks, width, inner, rows, train in cases:
        try:
            options = {"device": "cuda", "dtype": torch.bfloat16}
            gate_up = torch.zeros(experts, 2 * inner, width, **options)
            down = torch.zeros(experts, width, inner, **options)
            x = torch.zeros(rows, width, **options)
            ids = torch.randint(0, experts, (rows, picks), device="cuda")
            weights = torch.ones(rows, picks, device="cuda")
            for one in (x, gate_up, down, weights):
                one.requires_grad_(bool(train))
            y = moe_forward(x, gate_up, down, ids, weights)
            if train:
                y.sum().backward()
            torch.cuda.synchronize()
        except Exception as error:
            say(f"warm {(experts, picks, rows, train)}: {type(error).__name__}: {error}")
        gate_up = down = x = weights = y = None


def _short(row: dict[str, Any]) -> str:
    if "layer_s" not in row:
        return json.dumps(row)
    graph = f"{row['graph_s'] * 1e6:.0f}" if "graph_s" in row else "-"
    experts = "/".join(f"{one * 1e6:.0f}" for one in row["experts_s"])
    called = f"{row['called_s'] * 1e6:.0f}" if "called_s" in row else "-"
    return (
        f"{row['shape']} T{row['tokens']} {row['routing']} {row['way']}: called "
        f"{called} graph {graph} experts {experts} floor "
        f"{row['floor_s'] * 1e6:.0f} us, exposed {row['exposed']:.0%}, rho {row['rho']:.3f} delta "
        f"{row['delta']:.3f}, host waits {row.get('host_waits')} {row.get('is_sync_free', '')} "
        f"{row.get('graph_failed', '')}"
    )


def start_warming(options: argparse.Namespace) -> list[Any]:
    """Processes that compile what the layers will run."""
    if options.cpu or not {"layers", "training"} & set(options.parts):
        return []
    shapes = {name: SHAPES[name] for name in options.shapes}
    cases = warm_cases(shapes, options.ranks, options.tokens, "training" in options.parts)
    count = options.processes
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_cases, args=(cases[i::count], i % options.ranks))
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    return workers


def end_warming(workers: list[Any], folder: Path) -> None:
    """Tell the ranks when the last is done, or after 75 s."""
    end = time.monotonic() + 75
    for worker in workers:
        worker.join(max(0.1, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    (folder / WARM).touch()
    say(f"compiled with {len(workers)} processes")


def await_warm(bench: Any) -> None:
    """Timing must not share devices with compilers."""
    while not (bench.folder / WARM).exists():
        time.sleep(0.1)


def moves(bench: Any, tiny: bool) -> None:
    """The moves alone, by collectives and through a window."""
    from mogul.bench.devices_moves import measure_moves
    from mogul.bench.kernels import device_name

    bench.put("device", {"device": device_name(bench.world.device)})
    bench.attempt("moves", lambda: measure_moves(bench, tiny=tiny))


def ways_of(bench: Any, words: tuple[str, ...]) -> tuple[Any, ...]:
    """The ways to measure; none through a window where that hung."""
    from mogul.bench.devices import WAYS

    found = [way for way in WAYS if not words or any(word in way.name for word in words)]
    return tuple(way for way in found if "moves" not in bench.lost or way.wire is None)


def smoke(bench: Any, tiny: bool) -> None:
    """A small layer: every way right, captured, and without waits for the host."""
    from mogul.bench.devices import Request, check_exact, measure_cells, prepare
    from mogul.bench.kernels import LayerShape

    shape = LayerShape(16, 4, 64, 32, 4) if tiny else LayerShape(64, 8, 2048, 768, 8)
    request = Request(
        shape=shape,
        tokens=(64,),
        routings=("skewed",),
        ways=ways_of(bench, ())[:8],
        dtype="fp32" if tiny else "bf16",
        budget_s=0.02,
        traced_tokens=(64,),
    )
    setup = prepare(bench.world, request)
    for way in request.ways:
        if way.dispatch != "transformers":
            name = {"shape": "smoke", "way": way.name}
            bench.attempt(
                "exact",
                lambda way=way, n=name: bench.put(
                    "exact", {**n, "error": check_exact(setup, way, 64)}
                ),
            )
    cells(bench, measure_cells(setup), "smoke")


def cells(bench: Any, rows: Any, model: str) -> None:
    """Every cell of a prepared run, written as it comes."""

    def every() -> None:
        for row in rows:
            bench.put("layer", {**row, "model": model}, _short(row))

    bench.attempt("layer", every)


def layer(bench: Any, name: str, tokens: int, options: argparse.Namespace) -> None:
    """All ways of one shape at one number of tokens."""
    from mogul.bench.devices import Request, check_exact, explain, measure_cells, prepare
    from mogul.bench.kernels import LayerShape

    tiny = options.tiny
    ways = tuple(w for w in ways_of(bench, options.ways) if w.chunks <= options.chunks)
    request = Request(
        shape=LayerShape(*(TINY_SHAPES if tiny else SHAPES)[name]),
        tokens=(tokens,),
        dtype="fp32" if tiny else "bf16",
        budget_s=0.02 if tiny else options.budget,
        draws=options.draws,
        ways=ways,
        traced_tokens=(16, 4096),
    )
    setup = bench.kept.get(name)
    if setup is None:
        bench.kept.clear()
        gc.collect()
        setup = bench.kept[name] = prepare(bench.world, request)
        bench.put("limits", {"shape": name, **explain(setup)})
    setup.request = request
    if tokens == 456:
        for way in ways[:2]:
            if way.dispatch != "transformers":
                error = check_exact(setup, way, tokens)
                bench.put("exact", {"shape": name, "way": way.name, "error": error})
    cells(bench, measure_cells(setup), name)
    for phase in setup.phases:
        bench.put("phase", phase, "")
    setup.phases.clear()


def training(bench: Any, alone: bool, dispatch: str, chunks: int, tiny: bool) -> None:
    """A step of a slice of Pangu Pro, on one device or on all."""
    from mogul.bench.devices_train import TrainRequest, measure_training, slice_config
    from mogul.spec import presets

    bench.kept.clear()
    gc.collect()
    config = presets.config("pangu-pro-moe-72b")
    small = {"sequences": 1, "length": 64, "dtype": "fp32", "budget_s": 0.1}
    if tiny:
        config |= TINY_MODEL
    slice_ = slice_config(config, TRAIN["layers"], 256 if tiny else TRAIN["vocabulary"])
    sizes: dict[str, Any] = (
        small if tiny else {"sequences": TRAIN["sequences"], "length": TRAIN["length"]}
    )
    if not tiny:
        sizes["budget_s"] = 1.0
    request = TrainRequest(config=slice_, dispatch=dispatch, chunks=chunks, **sizes)
    row = measure_training(bench.world, request, alone=alone)
    bench.put("training", {**row, "dispatch": "none" if alone else dispatch, "chunks": chunks})


TINY_MODEL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
    "num_hidden_layers": 2, "vocab_size": 256,
}  # fmt: skip


def decoding(bench: Any, case: str, options: argparse.Namespace) -> None:
    """The whole Pangu Pro MoE (or its first layers), random weights, one graph a step."""
    import torch

    from mogul.bench.devices import measured_limits
    from mogul.bench.devices_clock import Clock
    from mogul.bench.devices_decode import DecodeRequest, build, measure_decode
    from mogul.bench.devices_train import slice_config
    from mogul.spec import presets
    from mogul.spec.parallel import Parallel, h2p

    world, tiny = bench.world, options.tiny
    layout, *words = case.split("-")
    wire = "window" if "window" in words else None
    if wire == "window" and "moves" in bench.lost:
        return
    bench.kept.pop("model", None)
    gc.collect()
    if not tiny:
        torch.cuda.empty_cache()
    config = presets.config("pangu-pro-moe-72b") | (TINY_MODEL if tiny else {})
    values = slice_config(
        config, options.layers or config["num_hidden_layers"], config["vocab_size"]
    )
    if "limits" not in bench.kept:
        bench.kept["limits"] = measured_limits(Clock(world.device), torch.bfloat16)
        bench.put("limits", {"memory_gb_per_s": bench.kept["limits"].bytes_per_s / 1e9})
    whole = Parallel(tp=world.size, shared_tp=world.size)
    request = DecodeRequest(
        config=values,
        parallel=whole if layout == "tp" else h2p(world.size),
        wire=wire,
        compiled="compiled" in words,
        dtype="fp32" if tiny else "bf16",
        context=32 if tiny else 1024,
        budget_s=0.4,
    )
    with torch.no_grad():
        model = bench.kept["model"] = build(world, request)
    bench.put("built", {"case": case})
    for batch in options.batches:
        row = measure_decode(world, model, request, batch, bench.kept["limits"].bytes_per_s)
        bench.put("decode", row)
    if not options.cpu:
        bench.attempt("kernels", lambda: kernels(bench, model, request))


def kernels(bench: Any, model: Any, request: Any) -> None:
    """What one sequence's step spends its time in."""
    import torch

    from mogul.bench.devices_clock import Clock, kernels_of
    from mogul.bench.devices_decode import Step

    with torch.no_grad():
        step = Step(model, bench.world, request, 1)
        step()
        with Clock(bench.world.device).captured(step) as replay:
            replay()
            case = {
                "layout": request.parallel.describe(),
                "wire": request.wire or "collective",
                "compiled": request.compiled,
                "batch": 1,
            }
            found = kernels_of(replay, most=1000)
            busy_s = sum(spent_s for name, _, spent_s in found if "barrier" not in name)
            every: list[Any] = [None] * bench.world.size
            torch.distributed.all_gather_object(every, busy_s)
            bench.put("kernels", {**case, "busy_s": every, "found": found[:30]})


def computing(bench: Any) -> None:
    """What each rank computes in the experts of an upcycled SmolLM2 layer, by router."""
    from mogul.bench.devices import Request, measure_cells, prepare
    from mogul.bench.devices_cases import Way
    from mogul.bench.kernels import LayerShape

    request = Request(
        shape=LayerShape(32, 8, 576, 192, 8),
        tokens=(16, 64, 456),
        dtype="fp32",
        budget_s=0.2,
        ways=(Way("grouped", "static"), Way("top-k", "gather")),
    )
    for row in measure_cells(prepare(bench.world, request)):
        bench.put("computing", row)


def units_of(options: argparse.Namespace) -> list[Any]:
    """What to measure, in the order of `--parts`."""
    from mogul.bench.devices_units import Unit

    def training_units() -> list[Unit]:
        found = []
        for step in options.steps:
            alone, dispatch = step == "alone", step.rstrip("0123456789")
            case = (alone, "static" if alone else dispatch, int(step.removeprefix(dispatch) or 1))
            found.append(Unit(f"training {step}", 45, training, (*case, options.tiny)))
        return found

    makers = {
        "smoke": lambda: [
            Unit("moves", 25, moves, (options.tiny,)),
            Unit("smoke", 40, smoke, (options.tiny,)),
        ],
        "computing": lambda: [Unit("computing", 300, computing)],
        "layers": lambda: [
            Unit(f"{name} T{tokens}", 40, layer, (name, tokens, options))
            for name in options.shapes
            for tokens in options.tokens
        ],
        "training": training_units,
        "decode": lambda: [
            Unit(f"decode {case}", 80, decoding, (case, options)) for case in options.layouts
        ],
    }
    found = [unit for part in options.parts for unit in makers[part]()]
    timed = (n for n, unit in enumerate(found) if unit.function in (layer, training))
    if (first := next(timed, None)) is not None:
        found.insert(first, Unit("compiled", 90, await_warm))
    return found


def write(folder: Path, earlier: int) -> None:
    """The page and the ledger, from the rows of this run: without the `earlier` ones."""
    from mogul.bench import ledger
    from mogul.bench.devices_report import (
        busiest_chart,
        busiest_rows,
        decode_rows,
        gain_chart,
        ledger_rows,
        table,
        training_rows,
        write_page,
    )
    from mogul.bench.devices_units import read_rows
    from mogul.draw.png import save_png

    parts: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(folder)[earlier:]:
        if "failed" not in row:
            parts.setdefault(row.pop("part"), []).append(row)
    device = parts.get("device", [{"device": "unknown"}])[0]["device"]
    facts = {row["shape"]: row for row in parts.get("limits", []) if "shape" in row}
    tables, rows = [], []
    for model, limits in facts.items():
        own = [row for row in parts.get("layer", []) if row["model"] == model]
        if own:
            tables.append(table(own, limits))
            rows += ledger_rows(own, limits, device)
    if measured := [row for row in parts.get("layer", []) if row["model"] in facts]:
        save_png(gain_chart(measured, device), folder / "gain.png")
    rows += training_rows(parts.get("training", []), device)
    rows += decode_rows(parts.get("decode", []), device, parts.get("kernels", []))
    if waits := parts.get("computing"):
        rows += busiest_rows(waits, device)
        save_png(busiest_chart(waits), folder / "devices.png")
    ledger.append(rows, folder / "ledger.jsonl")
    write_page(folder, tables, parts.get("phase", []))


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="processes of the processor")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--processes", type=int, default=16, help="that compile kernels")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything")
    parser.add_argument("--parts", type=_words, default=PARTS[:3], help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shapes", type=_words, default=())
    parser.add_argument("--tokens", type=_words, default=())
    parser.add_argument("--ways", type=_words, default=(), help="words of names of ways to keep")
    parser.add_argument("--chunks", type=int, default=4, help="leave out ways of more chunks")
    parser.add_argument("--budget", type=float, default=0.04, help="seconds for one number")
    parser.add_argument("--draws", type=int, default=3, help="of every routing, averaged")
    parser.add_argument("--steps", type=_words, default=STEPS, help="training: alone, or by")
    parser.add_argument("--layouts", type=_words, default=LAYOUTS, help="decode")
    parser.add_argument("--layers", type=int, default=0, help="decode: the first so many only")
    parser.add_argument("--batches", type=_words, default=("1", "64", "228"))
    options = parser.parse_args()
    options.shapes = options.shapes or tuple(TINY_SHAPES if options.tiny else SHAPES)
    options.tokens = tuple(map(int, options.tokens)) or (TINY_TOKENS if options.tiny else TOKENS)
    options.batches = tuple(map(int, options.batches))
    return options


def main() -> None:
    """Measure, write."""
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / WARM).unlink(missing_ok=True)  # of another run in this folder
    from mogul.bench.devices_units import read_rows, run_units

    earlier = len(read_rows(options.out))  # of another run in this folder
    workers = start_warming(options)
    waiter = threading.Thread(target=end_warming, args=(workers, options.out))
    waiter.start()
    units = units_of(options)
    run_units(units, options.ranks, options.out, options.seconds, on_cpu=options.cpu)
    say("measured")
    write(options.out, earlier)
    waiter.join()
    say("written")


if __name__ == "__main__":
    main()
