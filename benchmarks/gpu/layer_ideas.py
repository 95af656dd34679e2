"""Does an idea make the whole layer faster? Plans that differ in one thing, in turns in one run.

Predictions stand in IDEAS and TRAIN_IDEAS, in percent of the layer's time. Each forward is a CUDA
graph, a training step plain calls; every variant's results are compared with the present plan's.
Rows of the ledger, `moe_layer_ideas`, go to --out.

Groups: programs take tiles in order, first all columns of a group of row tiles. A larger group
reads each expert's weights from the cache less often, a smaller one its rows.

    python benchmarks/gpu/layer_ideas.py --out DIR --cells C:4096,A:16384 --train C:16384
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import ceilings, floor_ms, make_case, make_tokens, rel, train_floor_ms
from tune import compile_only, layer_for, log

from mogul.bench import ledger
from mogul.kernels import moe_forward
from mogul.kernels.triton import layer as layers
from mogul.kernels.triton.plans import Plan, plan_for

ROWS = ("up", "down", "down_grad", "up_grad")
Idea = tuple[str, dict[str, dict[str, Any]], float]
"""Name, changed fields by product, predicted change in percent."""


COUNTED = {"counted": True, "sync": False}


def _groups(kind: str, guess: float, *sizes: int) -> list[Idea]:
    """Other groups of row tiles for one product, by themselves."""
    return [(f"{kind}: {size} row tiles a group", {kind: {"group": size}}, guess) for size in sizes]


def _three_stages(guess: float) -> Idea:
    return ("three stages", {"up": {"stages": 3}, "down": {"stages": 3}}, guess)


IDEAS: dict[str, list[Idea]] = {
    "A:4096": [*_groups("up", 0, 4, 12, 16), *_groups("down", 0, 2, 8, 16)],
    "A:16384": [*_groups("up", -0.5, 8, 12, 24), *_groups("down", 0, 4, 16), _three_stages(1)],
    "B:4096": [*_groups("up", 0, 4, 12, 16), *_groups("down", 0, 2, 8)],
    "B:16384": [*_groups("up", -0.5, 8, 12, 24), *_groups("down", 0, 4, 16)],
    "C:4096": [*_groups("up", -0.5, 2, 6, 8, 16), *_groups("down", 0, 2, 8), _three_stages(1)],
    "C:16384": [*_groups("up", -0.5, 2, 8, 16), *_groups("down", 0, 2, 8, 16), _three_stages(1)],
    "D:4096": [
        *_groups("up", 0, 1, 2, 8),
        *_groups("down", -1, 2, 4, 8),
        ("down: 128 columns", {"down": {"n": 128}}, -1),
        ("up: 64 columns", {"up": {"n": 64}}, 4),
    ],
    "D:16384": [*_groups("up", 0, 2, 8, 16), *_groups("down", -1, 2, 4, 8), _three_stages(1)],
}
_BACKWARD: list[Idea] = [
    ("backward of down counted", {"down_grad": COUNTED}, -0.5),
    ("dx counted", {"up_grad": COUNTED}, -0.5),
    ("both counted", {"down_grad": COUNTED, "up_grad": COUNTED}, -1),
    *_groups("up_grad", 0, 4, 16),
]
TRAIN_IDEAS: dict[str, list[Idea]] = {f"{name}:16384": _BACKWARD for name in "ABCD"}


def plan_of(base: Plan, changes: dict[str, dict[str, Any]]) -> Plan:
    """The present plan with some tiles changed."""
    tiles = {kind: replace(getattr(base, kind), **changes[kind]) for kind in changes}
    return replace(base, **tiles)


def compile_one(job: tuple[str, int, dict[str, Any], str, bool]) -> str:
    """Compile one product of a variant on meta tensors; the error, if any."""
    name, tokens, changes, kind, train = job
    compile_only()
    try:
        case = make_case(name, "meta")
        x, ids, weights = make_tokens(case, tokens)
        layer = layer_for(case)
        plan = plan_of(plan_for(layer.shape, tokens), changes)
        sort = layer.sort(ids, plan.rows)
        act = x.new_empty(ids.numel(), layer.shape.inner)
        pre = x.new_empty(ids.numel(), 2 * layer.shape.inner)
        more = (sort, ids, weights)
        if kind == "up":
            layer.up(plan, x, case.gate_up, act, pre if train else act, sort, save=train)
        elif kind == "down":
            layer.product_sum(plan, plan.down, act, case.down, *more, transposed=False)
        elif kind == "down_grad":
            layer.down_grad(plan, x, case.down, pre, weights, torch.empty_like(pre), act, sort)
        elif plan.up_grad is not None:
            layer.product_sum(plan, plan.up_grad, pre, case.gate_up, *more, transposed=True)
    except Exception as error:
        return f"{job}: {type(error).__name__} {str(error)[:200]}"
    return ""


def jobs(cells: list[str], table: dict[str, list[Idea]], train: bool) -> list[Any]:
    """Every product to compile, once."""
    found = {}
    for cell in cells:
        name, tokens = cell.split(":")
        base = plan_for(layer_for(make_case(name, "meta")).shape, int(tokens))
        for changes in ({}, *(changes for _, changes, _ in table[cell])):
            for kind in ROWS if train else ROWS[:2]:
                key = (name.replace("B", "A"), kind, str(getattr(plan_of(base, changes), kind)))
                found.setdefault((key, train), (name, int(tokens), changes, kind, train))
    return list(found.values())


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """The replay of a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def once(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def calls_of(cell: str, ideas: list[Idea], train: bool) -> list[tuple[Any, float, Any]]:
    """Per variant, the present plan first: a call, its difference from the first, its idea."""
    name, tokens = cell.split(":")
    case = make_case(name)
    layer = layer_for(case)
    base = plan_for(layer.shape, int(tokens))
    x, ids, weights = make_tokens(case, int(tokens))
    dout, leaves = torch.randn_like(x), [x, weights, case.gate_up, case.down]
    for leaf in leaves:
        leaf.requires_grad_(train)
    found: list[tuple[Any, float, Any]] = []
    want: list[Tensor] = []
    for idea in (None, *ideas):
        plan = plan_of(base, idea[1] if idea else {})

        def call(plan: Plan = plan) -> Any:
            layers.plan_for = lambda _shape, _tokens: plan
            if not train:
                return (layer.forward(x, case.gate_up, case.down, ids, weights)[0],)
            out = moe_forward(x, case.gate_up, case.down, ids, weights, backend="triton")
            return torch.autograd.grad(out, leaves, dout)

        got = [tensor.clone() for tensor in call()]
        want = want or got
        error = max(map(rel, got, want))
        found.append((call if train else captured(call), error, idea))
    return found


def run_cell(cell: str, ideas: list[Idea], train: bool, out: Path) -> None:
    """Time all variants of a cell in turns; one ledger row an idea."""
    name, tokens = cell.split(":")
    variants = calls_of(cell, ideas, train)
    before = ceilings()
    turns = [[once(call) for call, _, _ in variants] for _ in range(11 if train else 13)]
    after = ceilings()
    peak = {key: (before[key] + after[key]) / 2 for key in before}
    floor = (train_floor_ms if train else floor_ms)(name, int(tokens), peak)
    times = [statistics.median(column) for column in zip(*turns[1:], strict=True)]
    kind = "train" if train else "forward"
    print(f"{cell} {kind}: {times[0]:.4f} ms ({times[0] / floor:.3f})", flush=True)
    rows = []
    for (_, error, idea), ms in zip(variants[1:], times[1:], strict=True):
        change = 100 * (ms / times[0] - 1)
        print(f"  {ms:9.4f} {change:+5.1f} % (predicted {idea[2]:+g}) {error:.0e} {idea[0]}")
        rows.append(
            ledger.row(
                device=torch.cuda.get_device_name(), bench="moe_layer_ideas",
                case=f"{name} {tokens} {kind}: {idea[0]}", metric="time", unit="ms",
                value=round(ms, 5), runs=len(turns) - 1, floor=round(floor, 5),
                before=round(times[0], 5), relative_difference=error,
                predicted=f"{idea[2]:+g} % of the layer", predicted_before_run=True,
                verdict=f"{change:+.1f} %",
            )
        )  # fmt: skip
    ledger.append(rows, out / "ledger.jsonl")


def main() -> None:
    """Compile everything in parallel, then run cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(IDEAS), help="forward cells; '' for none")
    parser.add_argument("--train", default=",".join(TRAIN_IDEAS), help="training cells")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    work = [
        ([cell for cell in text.split(",") if cell], table, train)
        for text, table, train in ((args.cells, IDEAS, False), (args.train, TRAIN_IDEAS, True))
    ]
    every = [job for parts in work for job in jobs(*parts)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        errors = [e for e in pool.imap_unordered(compile_one, every) if e]
    log("compiled", len(every), "failed", len(errors), *errors)
    for cells, table, train in work:
        for cell in cells:
            run_cell(cell, table[cell], train, args.out)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
