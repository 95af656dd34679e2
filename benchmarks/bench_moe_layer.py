"""How far is the experts layer on one GPU from its floor, and from the best peer, at every size?

Contract of all rows: (x [T, D], ids [T, K], weights [T, K]) -> out [T, D]; the sort is inside, the
router outside. Inputs rotate (16 sets to 8 tokens, 4 to 456) so that the cache stays cold. Times
are the median over rounds in which the variants take turns; up to 4096 tokens the better of plain
calls and a CUDA graph of the rotated calls. Every variant is checked against fp32 on 48 tokens.
The floor is the larger of arithmetic and bytes at the ceilings measured around a shape's cells;
`ratio_rested` takes those before its first cell.

    python benchmarks/bench_moe_layer.py --shapes A,C --tokens 1,64,4096 --train 16384 --out DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import peer_deepgemm
import peer_sonic
import peer_vllm
import peers
from common import (
    Case,
    ceilings,
    floor_ms,
    make_case,
    make_tokens,
    reference,
    rel,
    time_events,
    time_graph,
    train_floor_ms,
)
from peer_parts import Forward
from tune import precompile

from mogul.bench import ledger

GIB = 2**30


def variants(args: argparse.Namespace) -> dict[str, Callable[[Case], Forward]]:
    """Name -> maker, mogul first; the fp8 ones only if asked for."""
    folder = args.vllm_dir
    known: dict[str, Callable[[Case], Forward]] = {
        "mogul": peers.mogul,
        "vllm_default": peer_vllm.vllm(folder, tuned=False),
        "vllm_tuned": peer_vllm.vllm(folder, tuned=True),
        "triton_kernels": peers.triton_kernels,
        "sonic": peer_sonic.Sonic,
        "torch_grouped": peers.torch_grouped,
        "hf_grouped": peers.hf_grouped,
    }
    fp8: dict[str, Callable[[Case], Forward]] = {
        "mogul_fp8": peers.mogul_fp8,
        "vllm_fp8": peer_vllm.vllm(folder, tuned=True, fp8=True),
        "deepgemm_fp8_products": peer_deepgemm.Products,
    }
    names = args.peers.split(",") if args.peers else list(known)
    return {name: (known | fp8)[name] for name in names}


def in_turns(things: list[Any], rounds: int) -> Iterator[Any]:
    """All things in every round, backwards in every second one.

    What runs after a kernel that draws much power finds a slower card: no one always follows it.
    """
    for turn in range(rounds):
        yield from things[:: -1 if turn % 2 else 1]


def forward_cell(
    case: Case, tokens: int, forwards: dict[str, Forward], rounds: int
) -> list[dict[str, Any]]:
    """Every variant at one number of tokens."""
    sets = 16 if tokens <= 8 else 4 if tokens <= 456 else 1
    inputs = [make_tokens(case, tokens) for _ in range(sets)]
    x, ids, weights = inputs[0]
    pick = torch.randperm(tokens, device="cuda")[:48]
    want = reference(case, x[pick].float(), ids[pick], weights[pick])
    rows: dict[str, dict[str, Any]] = {}
    for name, forward in list(forwards.items()):
        row: dict[str, Any] = {"peer": name, "eager": [], "graph": []}
        try:
            with torch.no_grad():
                out = forward(x, ids, weights)
                row["error"] = getattr(forward, "error", None) or rel(out[pick], want)
            rows[name] = row
        except Exception as error:
            print(f"  {name} failed at {tokens}: {type(error).__name__} {str(error)[:200]}")
    for name, row in in_turns(list(rows.items()), rounds):
        calls = [lambda q=q, f=forwards[name]: f(*q) for q in inputs]
        with torch.no_grad():
            row["eager"].append(time_events(calls, 0.06))
            if tokens <= 4096 and row.get("capturable", True):
                try:
                    row["graph"].append(time_graph(calls, 9))
                except Exception:
                    row["capturable"] = False
                    torch.cuda.synchronize()
    for row in rows.values():
        eager, graph = row.pop("eager"), row.pop("graph")
        row["eager_ms"] = statistics.median(eager)
        row["graph_ms"] = statistics.median(graph) if graph else None
        best = graph if graph and statistics.median(graph) < row["eager_ms"] else eager
        row["ms"], row["spread_ms"] = statistics.median(best), max(best) - min(best)
    return list(rows.values())


def host_us(forward: Forward, inputs: tuple[torch.Tensor, ...]) -> float:
    """Microseconds of host work a call, with the device far behind."""
    with torch.no_grad():
        for _ in range(10):
            forward(*inputs)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)
        start = time.perf_counter()
        for _ in range(50):
            forward(*inputs)
        spent = time.perf_counter() - start
        torch.cuda.synchronize()
    return spent / 50 * 1e6


def train_step(case: Case, inputs: tuple[Any, ...], forward: Forward) -> Callable[[], Any]:
    """One forward + backward on x, ids, weights, dout: gradients of x, weights and parameters."""
    x, ids, weights, dout = inputs
    parameters = getattr(forward, "weights", (case.gate_up, case.down))
    leaves = [x, weights, *parameters]
    for tensor in leaves:
        tensor.requires_grad_()
    return lambda: torch.autograd.grad(forward(x, ids, weights), leaves, dout)


def train_error(case: Case, inputs: tuple[Any, ...], step: Callable[[], Any]) -> float:
    """Error of the gradients of 48 tokens and their weights."""
    x, ids, weights, dout = inputs
    pick = torch.randperm(len(x), device="cuda")[:48]
    dx, dweights, *_ = step()
    xs = x.detach()[pick].float().requires_grad_()
    ws = weights.detach()[pick].requires_grad_()
    want = torch.autograd.grad(reference(case, xs, ids[pick], ws), [xs, ws], dout[pick].float())
    return max(rel(dx[pick], want[0]), rel(dweights[pick], want[1]))


def train_memory(inputs: tuple[Any, ...], forward: Forward, leaves: list[Any]) -> dict[str, float]:
    """What a forward keeps and the most that a step takes."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward(*inputs[:3])
    torch.cuda.synchronize()
    kept = (torch.cuda.memory_allocated() - before) / GIB
    torch.autograd.grad(out, leaves, inputs[3])
    torch.cuda.synchronize()
    return {"kept_gib": kept, "peak_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        more = ("eager_ms", "graph_ms", "kept_gib", "peak_gib", "forward_ms", "host_us")
        extra = "".join(f"  {key} {row[key]:.4g}" for key in more if row.get(key) is not None)
        cell = f"{row['shape']} {row['kind']:7} {row['tokens']:6} {row['peer']:14}"
        print(
            f"{cell} {row['ms']:9.4f} ms ({row['ms'] / row['floor_ms']:.3f})  "
            f"err {row['error']:.1e}{extra}",
            flush=True,
        )


def floor_of(row: dict[str, Any], peak: dict[str, float]) -> float:
    """The cell's floor in the number format of its layer."""
    if row["kind"] == "train":
        return train_floor_ms(row["shape"], row["tokens"], peak)
    return floor_ms(row["shape"], row["tokens"], peak, 1 if "fp8" in row["peer"] else 2)


def run_shape(name: str, args: argparse.Namespace, out: list[dict[str, Any]]) -> None:
    """All cells of one shape: printed with the ceilings before all, kept with the mean around, too.

    A card under load for seconds runs slower than a rested one, kernels and ceilings alike.
    """
    case = make_case(name)
    forwards: dict[str, Forward] = {}
    for peer, make in variants(args).items():
        try:
            forwards[peer] = make(case)
        except Exception as error:
            print(f"{peer} is not here: {type(error).__name__} {str(error)[:160]}")
    rested = before = ceilings()
    for kind, sizes, run in (
        ("forward", args.tokens, forward_rows),
        ("train", args.train, train_rows),
    ):
        rows: list[dict[str, Any]] = []
        for tokens in sizes:
            cell = run(case, tokens, forwards, args)
            for row in cell:
                row.update(shape=name, kind=kind, tokens=tokens)
                row["floor_ms"] = row["rested_floor_ms"] = floor_of(row, rested)
            show(cell)
            rows += cell
        after = ceilings()
        peak = {key: (before[key] + after[key]) / 2 for key in before}
        for row in rows:
            row.update(peak=peak, floor_ms=floor_of(row, peak))
        mine = [row for row in rows if row["peer"] == "mogul"]
        ratios = "  ".join(f"{r['tokens']}: {r['ms'] / r['floor_ms']:.3f}" for r in mine)
        print(f"{name} {kind} at the mean of {before} and {after}: {ratios}", flush=True)
        before = after
        out += rows
        ledger.append(ledger_rows(rows, args.rounds), args.out / "ledger.jsonl")


def forward_rows(
    case: Case, tokens: int, forwards: dict[str, Forward], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One forward cell, with mogul's host time."""
    cell = forward_cell(case, tokens, forwards, args.rounds)
    for row in cell:
        if row["peer"] == "mogul" and tokens <= 4096:
            row["host_us"] = host_us(forwards["mogul"], make_tokens(case, tokens))
    return cell


def train_rows(
    case: Case, tokens: int, forwards: dict[str, Forward], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One training cell on the same inputs for all peers, which take turns."""
    x, ids, weights = make_tokens(case, tokens)
    inputs = (x, ids, weights, torch.randn_like(x))
    steps: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {}
    for peer in [p for p in forwards if p in args.train_peers.split(",")]:
        forward = forwards[peer]
        try:
            step = train_step(case, inputs, forward)
            row = {"peer": peer, "times": [], "error": train_error(case, inputs, step)}
            parameters = getattr(forward, "weights", (case.gate_up, case.down))
            row |= train_memory(inputs, forward, [x, weights, *parameters])
            steps[peer] = (row, step)
        except Exception as error:
            print(f"  {peer} failed in training: {type(error).__name__} {str(error)[:300]}")
    for row, step in in_turns(list(steps.values()), args.rounds):
        row["times"].append(time_events([step], 0.25, 12))
    for peer, (row, _) in steps.items():
        times = row.pop("times")
        row["ms"], row["spread_ms"] = statistics.median(times), max(times) - min(times)
        row["forward_ms"] = time_events([lambda f=forwards[peer]: f(*inputs[:3])], 0.1, 12)
        for tensor in getattr(forwards[peer], "weights", (case.gate_up, case.down)):
            tensor.requires_grad_(False)
    return [row for row, _ in steps.values()]


def ledger_rows(rows: list[dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """Mogul's rows for the ledger, each with the peers of its cell (fp8 ones have their own)."""
    found = []
    common = {"device": torch.cuda.get_device_name(), "bench": "moe_layer"}
    for row in (row for row in rows if row["peer"].startswith("mogul")):
        cell = (row["shape"], row["kind"], row["tokens"])
        peers = {
            other["peer"]: round(other["ms"], 5)
            for other in rows
            if (other["shape"], other["kind"], other["tokens"]) == cell and other is not row
        }
        case = "{} {} {}".format(*cell) + (" fp8" if row["peer"] == "mogul_fp8" else "")
        time = {"metric": "time", "unit": "ms", "value": round(row["ms"], 5)}
        more = {
            "spread": round(row["spread_ms"], 5),
            "runs": rounds,
            "floor": round(row["floor_ms"], 5),
            "ratio": round(row["ms"] / row["floor_ms"], 4),
            "ratio_rested": round(row["ms"] / row["rested_floor_ms"], 4),
            "peers": peers,
            "relative_error": float(f"{row['error']:.1e}"),
            "ceilings": {name: round(value, 3) for name, value in row["peak"].items()},
        }
        found.append(ledger.row(**common, case=case, **time, **more))
        if "host_us" in row:
            host = {"metric": "host_time", "unit": "us", "value": round(row["host_us"], 1)}
            found.append(ledger.row(**common, case=case, **host, runs=50))
        if "kept_gib" in row:
            kept = {"metric": "kept_memory", "unit": "GiB", "value": round(row["kept_gib"], 4)}
            peak_gib = round(row["peak_gib"], 3)
            found.append(ledger.row(**common, case=case, **kept, peak_gib=peak_gib, runs=1))
    return found


def numbers(text: str) -> list[int]:
    """`1,64` -> [1, 64]."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Run the cells asked for; write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="A,C")
    parser.add_argument("--tokens", type=numbers, default=numbers("1,8,64,456,4096,16384,32768"))
    parser.add_argument("--train", type=numbers, default=[])
    parser.add_argument("--peers", default="")
    parser.add_argument("--train-peers", default="mogul,sonic,torch_grouped,hf_grouped")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-dir", default=".peers/vllm", help="fused_moe/ and its libraries")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    names = args.shapes.split(",")
    if "mogul" in variants(args):
        forward, train = (
            [(n, t) for n in names for t in sizes] for sizes in (args.tokens, args.train)
        )
        precompile(forward, train)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        run_shape(name, args, rows)
        torch.cuda.empty_cache()
        text = json.dumps({"device": torch.cuda.get_device_name(), "rows": rows})
        (args.out / "results.json").write_text(text)


if __name__ == "__main__":
    main()
