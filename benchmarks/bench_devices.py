"""Two (or more) devices on real shapes: exactness, the layer by router and dispatch, training.

python benchmarks/bench_devices.py --out FOLDER                  Pangu Pro and Qwen3-30B-A3B layers
python benchmarks/bench_devices.py --out FOLDER --parts decode   the whole Pangu Pro MoE decodes
python benchmarks/bench_devices.py --out FOLDER --tiny --cpu     the same code on CPU processes
python benchmarks/bench_devices.py --out FOLDER --cpu --ranks 4 --parts computing
                                                                 what each rank's experts compute

Writes rows.jsonl as rows come, then devices.html and ledger.jsonl. Parts that fail are reported and
passed over. Kernels are compiled first, by several processes at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.monotonic()
SHAPES = {"pangu-pro": (64, 8, 5120, 1344, 8), "qwen3-30b-a3b": (128, 8, 2048, 768, 8)}
TOKENS = (16, 64, 456, 4096, 16384)
TINY_SHAPES = {"tiny": (16, 4, 64, 32, 4)}
TINY_TOKENS = (16, 4096)
TRAIN = {"layers": 4, "vocabulary": 32768, "sequences": 2, "length": 4096}


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def warm_cases(shapes: dict[str, tuple[int, ...]], ranks: int) -> list[tuple[int, ...]]:
    """(experts, picks, width, inner, rows, train) of the calls to come, largest first."""
    found = []
    for experts, picks, width, inner, _ in shapes.values():
        for tokens in TOKENS:
            local = experts // ranks
            found += [(local, picks // ranks, width, inner, tokens, 0)]
            found += [(local, picks, width, inner, tokens, 0)]
        found.append((local, picks // ranks, width, inner, 456, 1))
        found.append((local, picks, width, inner, 456, 1))
        found.append((experts, picks, width, inner, 228, 1))
    experts, picks, width, inner, _ = next(iter(shapes.values()))
    rows = TRAIN["sequences"] * TRAIN["length"]
    found.append((experts, picks, width, inner, rows, 1))
    for chunks in (1, 2, 4):
        found.append((experts // ranks, picks // ranks, width, inner, ranks * rows // chunks, 1))
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


def warm(shapes: dict[str, tuple[int, ...]], ranks: int, processes: int) -> None:
    """Compile with several processes, at most 75 s."""
    cases = warm_cases(shapes, ranks)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_cases, args=(cases[i::processes], i % ranks))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 75
    for worker in workers:
        worker.join(max(0.1, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    say(f"compiled {len(cases)} cases with {processes} processes")


class Log:
    """Rows to a file and to the terminal, from rank 0."""

    def __init__(self, folder: str, rank: int) -> None:
        self.rank, self.file = rank, Path(folder) / "rows.jsonl"

    def put(self, part: str, row: dict[str, Any]) -> None:
        """Write and show one row."""
        if self.rank == 0:
            with self.file.open("a") as file:
                file.write(json.dumps({"part": part, **row}) + "\n")
            print(f"[{time.monotonic() - START:6.1f} s] {part}: {_short(row)}", flush=True)

    def attempt(self, part: str, function: Callable[[], None]) -> None:
        """Run a part; what fails is noted."""
        try:
            function()
        except Exception as error:
            self.put(part, {"failed": f"{type(error).__name__}: {str(error)[:400]}"})
            if self.rank == 0:
                traceback.print_exc()


def _short(row: dict[str, Any]) -> str:
    if "layer_s" not in row:
        return json.dumps(row)
    graph = f"{row['graph_s'] * 1e6:.0f}" if "graph_s" in row else "-"
    experts = "/".join(f"{one * 1e6:.0f}" for one in row["experts_s"])
    return (
        f"{row['shape']} T{row['tokens']} {row['routing']} {row['way']}: called "
        f"{row['called_s'] * 1e6:.0f} graph {graph} experts {experts} floor "
        f"{row['floor_s'] * 1e6:.0f} us, exposed {row['exposed']:.0%}, rho {row['rho']:.3f} delta "
        f"{row['delta']:.3f}, host waits {row.get('host_waits')} {row.get('is_sync_free', '')} "
        f"{row.get('graph_failed', '')}"
    )


def layers(world: Any, name: str, sizes: tuple[int, ...], log: Log, tiny: bool) -> dict[str, Any]:
    """One shape: limits, exactness, all cells."""
    from mogul.bench.devices import WAYS, Request, check_exact, explain, measure_cells, prepare
    from mogul.bench.kernels import LayerShape

    request = Request(
        shape=LayerShape(*sizes),
        tokens=TINY_TOKENS if tiny else TOKENS,
        dtype="fp32" if tiny else "bf16",
        budget_s=0.02 if tiny else 0.04,
        traced_tokens=(16, 4096),
    )
    setup = prepare(world, request)
    facts = explain(setup)
    log.put("limits", {"shape": name, **facts})
    for way in WAYS[:6]:
        log.attempt(
            "exact",
            lambda way=way: log.put(
                "exact",
                {"shape": name, "way": way.name, "error": check_exact(setup, way, 456)},
            ),
        )
    rows = []

    def cells() -> None:
        for row in measure_cells(setup):
            rows.append({**row, "model": name})
            log.put("layer", rows[-1])

    log.attempt("layer", cells)
    return {"facts": facts, "rows": rows, "phases": setup.phases}


def training(world: Any, log: Log, tiny: bool) -> list[dict[str, Any]]:
    """The slice on one device and on all, static in several chunkings."""
    from mogul.bench.devices_train import TrainRequest, measure_training, slice_config
    from mogul.spec import presets

    found = []
    config = presets.config("pangu-pro-moe-72b")
    small = {"sequences": 1, "length": 64, "dtype": "fp32", "budget_s": 0.1}
    if tiny:
        config |= {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
        }  # fmt: skip
    slice_ = slice_config(config, TRAIN["layers"], 256 if tiny else TRAIN["vocabulary"])
    sizes = small if tiny else {"sequences": TRAIN["sequences"], "length": TRAIN["length"]}

    def one(alone: bool, dispatch: str, chunks: int) -> None:
        request = TrainRequest(config=slice_, dispatch=dispatch, chunks=chunks, **sizes)
        row = measure_training(world, request, alone=alone)
        found.append({**row, "dispatch": "none" if alone else dispatch, "chunks": chunks})
        log.put("training", found[-1])

    cases = [(True, "static", 1), *((False, "static", chunks) for chunks in (1, 2, 4))]
    for case in [*cases, (False, "all_to_all", 1)]:
        log.attempt("training", lambda case=case: one(*case))
    return found


def decoding(world: Any, log: Log, tiny: bool) -> list[dict[str, Any]]:
    """The whole Pangu Pro MoE, random weights, one graph a step; attention cut, then copied."""
    import torch

    from mogul.bench.devices import measured_limits
    from mogul.bench.devices_clock import Clock
    from mogul.bench.devices_decode import DecodeRequest, build, measure_decode
    from mogul.bench.devices_train import slice_config
    from mogul.spec import presets
    from mogul.spec.parallel import Parallel, h2p

    config = presets.config("pangu-pro-moe-72b")
    if tiny:
        config |= {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64,
            "num_hidden_layers": 2, "vocab_size": 256,
        }  # fmt: skip
    kind = "fp32" if tiny else "bf16"
    values = slice_config(config, config["num_hidden_layers"], config["vocab_size"])
    limits = measured_limits(Clock(world.device), torch.bfloat16)
    log.put("limits", {"memory_gb_per_s": limits.bytes_per_s / 1e9})
    found = []
    for parallel in (Parallel(tp=world.size, shared_tp=world.size), h2p(world.size)):
        request = DecodeRequest(
            config=values, parallel=parallel, dtype=kind, context=32 if tiny else 1024, budget_s=0.6
        )
        with torch.no_grad():
            model = build(world, request)
        say("built")
        for batch in (1, 64, 228):
            row = measure_decode(world, model, request, batch, limits.bytes_per_s)
            found.append(row)
            log.put("decode", row)
        del model
        gc.collect()
        if not tiny:
            torch.cuda.empty_cache()
    return found


def computing(world: Any, log: Log) -> list[dict[str, Any]]:
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
    rows = list(measure_cells(prepare(world, request)))
    for row in rows:
        log.put("computing", row)
    return rows


def on_rank(world: Any, folder: str, tiny: bool, parts: str) -> dict[str, Any]:
    """All parts in order of worth."""
    from mogul.bench.kernels import device_name

    log = Log(folder, world.rank)
    shapes = TINY_SHAPES if tiny else SHAPES
    found: dict[str, Any] = {"device": device_name(world.device), "layers": [], "training": []}
    found["decode"] = []
    if "computing" in parts:
        found["computing"] = computing(world, log)
    if "decode" in parts:
        log.attempt("decode", lambda: found["decode"].extend(decoding(world, log, tiny)))
    for name, sizes in shapes.items():
        if "layers" in parts:
            log.attempt(
                "layer",
                lambda n=name, s=sizes: found["layers"].append(layers(world, n, s, log, tiny)),
            )
        if "training" in parts and not found["training"]:
            log.attempt("training", lambda: found["training"].extend(training(world, log, tiny)))
    return found


def write(found: dict[str, Any], folder: Path) -> None:
    from mogul.bench import ledger
    from mogul.bench.devices_report import (
        busiest_chart,
        busiest_rows,
        decode_rows,
        ledger_rows,
        table,
        training_rows,
        write_page,
    )
    from mogul.draw.png import save_png

    tables, phases, rows = [], [], []
    for one in found["layers"]:
        tables.append(table(one["rows"], one["facts"]))
        phases += one["phases"]
        rows += ledger_rows(one["rows"], one["facts"], found["device"])
    rows += training_rows(found["training"], found["device"])
    rows += decode_rows(found["decode"], found["device"])
    if waits := found.get("computing"):
        rows += busiest_rows(waits, found["device"])
        save_png(busiest_chart(waits), folder / "devices.png")
    ledger.append(rows, folder / "ledger.jsonl")
    write_page(folder, tables, phases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="processes of the processor")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--processes", type=int, default=16, help="that compile kernels")
    parser.add_argument("--parts", default="layers,training")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.cpu and "layers" in options.parts:
        warm(SHAPES, options.ranks, options.processes)
    from mogul.parallel import launch

    found = launch(
        on_rank, options.ranks, str(options.out), options.tiny, options.parts,
        on_cpu=options.cpu, threads=1 if options.cpu else None,
    )[0]  # fmt: skip
    say("measured")
    write(found, options.out)
    say("written")


if __name__ == "__main__":
    main()
