"""Measures tile plans of the Triton expert layer on the device here; one JSON with every timing.

    python benchmarks/gpu/tune.py --out DIR --jobs A:64,C:64 [--train A:16384]

Each product (up, down, their backward twins, weight gradients) is timed alone over a list of
candidates.  Candidates compile first, in parallel processes, into Triton's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    SHAPES,
    Case,
    ceilings,
    floor_ms,
    make_case,
    make_tokens,
    reference,
    rel,
    time_graph,
)

from mogul.kernels.triton import launch as launch_module
from mogul.kernels.triton.layer import Layer, layer_of
from mogul.kernels.triton.plans import FewPlan, Plan, Tile, plan_for

START = time.time()


def log(*words: Any) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def layer_for(case: Case) -> Layer:
    """The layer of a case on device 0."""
    experts, width, inner = case.dims
    dtypes = (case.down.dtype, torch.int64, torch.float32)
    return layer_of(experts, case.picks, width, inner, dtypes, 0)


# ---------------------------------------------------------------- candidates


def small_tiles(rows: int, tma: bool) -> list[Tile]:
    """Memory-bound candidates."""
    out = []
    swaps = [False, True] if rows <= 64 else [False]
    for n, k, stages, warps, swap in itertools.product(
        (32, 64, 128), (64, 128, 256), (3, 5), (4, 8), swaps
    ):
        size = (2 * n + rows) * k * 2 * stages
        if size > 200_000 or n * k * 2 < 8192 or (swap and n < 64) or (warps == 8 and n < 128):
            continue
        out.append(Tile(n=n, k=k, group=1, warps=warps, stages=stages, swap=swap, stream=True))
    if tma:
        out += [
            replace(t, tma=True, per_sm=p)
            for t in out
            if t.stages == 3 and t.warps == 4 and t.k <= 128
            for p in (0,)
        ]
    return out


def large_tiles(kind: str, rows: int) -> list[Tile]:
    """Arithmetic-bound candidates."""
    out = []
    wide = {"up": 128, "down": 256, "down_grad": 128, "up_grad": 256}[kind]
    if rows == 128:
        sizes = [(wide, 8, (3, 4)), (wide // 2, 4, (3, 4)), (wide // 2, 8, (4,))]
    elif rows == 256:
        sizes = [(wide // 2, 8, (3, 4))]
    else:
        sizes = [(wide, 4, (3, 4)), (wide // 2, 4, (4,))]
    for (n, warps, stages), (flatten, per_sm), group in itertools.product(
        sizes, ((True, 1), (False, 1), (False, 0)), (8, 16)
    ):
        if group == 16 and not (flatten and warps == 8):
            continue
        for s in stages:
            per = per_sm * (2 if warps == 4 and per_sm else 1)
            out.append(
                Tile(
                    n=n,
                    k=64,
                    group=group,
                    warps=warps,
                    stages=s,
                    tma=True,
                    flatten=flatten,
                    per_sm=per,
                )
            )
    return out


def split_tiles(kind: str) -> list[Tile]:
    """Candidates of the Hopper kernels with split roles, row tile 128."""
    n, stages = {
        "up": (128, 4),
        "up_save": (128, 4),
        "down": (256, 4),
        "up_grad": (256, 4),
        "down_grad": (128, 4),
    }[kind]
    return [
        Tile(n=n, k=64, group=g, stages=stages, split=True, per_sm=1, counted=True)
        for g in (2, 4, 8, 12, 16)
    ]


def weight_split_tiles() -> list[tuple[int, Tile]]:
    """(m, tile) of the split weight gradients."""
    return [
        (m, Tile(n=n, k=64, group=g, stages=4, split=True, per_sm=1, sync=sync))
        for m, n in ((128, 256), (256, 128))
        for g, sync in ((4, False), (8, False), (8, True))
    ]


def best_tiles(kind: str, rows: int) -> list[Tile]:
    """The plain tiles that did best before, for comparison."""
    wide = {"up": 128, "up_save": 128, "down": 256, "down_grad": 128, "up_grad": 256}[kind]
    flat = kind in ("down", "up_grad")
    return [
        Tile(n=wide, k=64, group=g, warps=8, stages=s, tma=True, flatten=flat, per_sm=1)
        for g, s in ((8, 3), (16, 4)) if rows == 128
    ]  # fmt: skip


def split_jobs(name: str, tokens: int, train: bool) -> list[tuple[str, int, str, int, Any, int]]:
    """Split candidates beside the best plain ones."""
    jobs: list[tuple[str, int, str, int, Any, int]] = []
    for kind in ("up", "down") if not train else ("up_save", "down", "down_grad", "up_grad"):
        jobs += [(name, tokens, kind, 128, t, 0) for t in best_tiles(kind, 128) + split_tiles(kind)]
    if train:
        for kind in ("gate_up_weight", "down_weight"):
            jobs += [(name, tokens, kind, 128, t, m) for m, t in weight_split_tiles()]
    return jobs


def weight_tiles() -> list[tuple[int, Tile]]:
    """(m, tile) of the weight gradients."""
    out = []
    for (m, n, warps), stages, per_sm in itertools.product(
        ((128, 256, 8), (256, 128, 8), (128, 128, 4)), (3, 5, 7), (0, 1)
    ):
        per = per_sm * (2 if warps == 4 else 1)
        out.append((m, Tile(n=n, k=64, group=8, warps=warps, stages=stages, tma=True, per_sm=per)))
    return out


def few_plans() -> list[FewPlan]:
    """Sort-free candidates; up and down vary together, they are timed apart."""
    return [
        FewPlan(up_n=n, up_k=k, down_n=n, down_k=k, warps=w, stages=s)
        for n, k, w, s in itertools.product((2, 4, 8, 16), (256, 512, 1024), (4,), (1, 2, 3))
        if 512 <= n * k <= 8192
    ]


# ---------------------------------------------------------------- one product


class Parts:
    """Buffers of one (case, tokens), and each product as a call."""

    def __init__(self, case: Case, tokens: int, sets: int):
        self.case, self.layer, self.tokens = case, layer_for(case), tokens
        self.inputs = [make_tokens(case, tokens) for _ in range(sets)]
        _, width, inner = case.dims
        slots = tokens * case.picks
        new = case.down.new_empty
        self.act, self.pre = new(slots, inner), new(slots, 2 * inner)
        self.y, self.dpre = new(slots, width), new(slots, 2 * inner)
        self.sorts: dict[int, list[Any]] = {}

    def fill(self) -> None:
        """Random intermediates, so that products are timed on real numbers."""
        for tensor in (self.act, self.pre, self.y, self.dpre):
            tensor.normal_(0, 0.5)

    def sort(self, rows: int) -> list[Any]:
        """A sort of every input set."""
        if rows not in self.sorts:
            self.sorts[rows] = [self.layer.sort(ids, rows) for _, ids, _ in self.inputs]
        return self.sorts[rows]

    def calls(self, kind: str, rows: int, tile: Tile, m: int = 128) -> list[Any]:
        """One closure an input set."""
        tile = replace(tile, m=m or 128)
        plan = Plan(rows, tile, tile, down_grad=tile, up_grad=tile)
        return [
            lambda i=i, s=s: self._call(kind, plan, self.inputs[i], s)
            for i, s in enumerate(self.sort(rows))
        ]

    def _call(self, kind: str, plan: Plan, inputs: Any, sort: Any) -> Any:
        layer, case, tile = self.layer, self.case, plan.up
        x, ids, weights = inputs
        if tile.sync:
            experts = case.dims[0]
            sort.head[experts + 2 : experts + 10].zero_()  # as a fresh sort leaves them
        if kind in ("up", "up_save"):
            save = kind == "up_save"
            layer.up(plan, x, case.gate_up, self.act, self.pre, sort, save=save)
            return self.act
        if kind in ("down_sum", "up_grad_sum"):
            back = kind == "up_grad_sum"
            a, weight = (self.dpre, case.gate_up) if back else (self.act, case.down)
            return layer.product_sum(plan, tile, a, weight, sort, ids, weights, transposed=back)
        if kind == "down":
            layer.product(plan, tile, self.act, case.down, self.y, sort, transposed=False)
            return self.y
        if kind == "up_grad":
            layer.product(plan, tile, self.dpre, case.gate_up, self.y, sort, transposed=True)
            return self.y
        if kind == "down_grad":
            layer.down_grad(plan, x, case.down, self.pre, weights, self.dpre, self.act, sort)
            return self.dpre
        if kind == "gate_up_weight":
            return layer.weight_grad(tile, self.dpre, x, case.gate_up, sort, gather_left=False)
        if kind == "down_weight":
            return layer.weight_grad(tile, x, self.act, case.down, sort, gather_left=True)
        raise ValueError(kind)


# ---------------------------------------------------------------- parallel compile


def compile_only() -> None:
    """From here on launches only compile."""

    def first(self: Any, grid: Any, args: Any) -> None:
        self.kernel.warmup(*args, grid=grid, **self.constants, **self.options)

    launch_module.Launch._first = first  # type: ignore[method-assign]


def compile_job(job: tuple[str, int, str, int, Tile | FewPlan, int]) -> str:
    """Compile one candidate on meta tensors; return the error, if any."""
    compile_only()
    name, tokens, kind, rows, tile, m = job
    try:
        case = make_case(name, "meta")
        if kind == "few":
            return _compile_few(case, tile)
        parts = Parts(case, tokens, 1)
        parts.calls(kind, rows, tile, m)[0]()  # type: ignore[arg-type]
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def _compile_few(case: Case, plan: Any) -> str:
    layer = layer_for(case)
    from mogul.kernels.triton import layer as layer_module

    layer_module.few_plan = lambda shape: plan
    x, ids, weights = make_tokens(case, 1)
    layer.few(x, case.gate_up, case.down, ids, weights)
    return ""


def plan_jobs(name: str, tokens: int, train: bool) -> list[tuple[str, int, str, int, Any, int]]:
    """The products that a layer's own plan uses."""
    layer = layer_for(make_case(name, "meta"))
    if layer.shape.uses_few(tokens) and not train:
        return []
    plan = plan_for(layer.shape, tokens)
    kinds = {"up": plan.up, "down_sum": plan.down}
    if train:
        kinds = {"up_save": plan.up, "down_sum": plan.down, "down_grad": plan.down_grad}
        kinds["up_grad_sum"] = plan.up_grad
        kinds["gate_up_weight"] = plan.gate_up_weight
        kinds["down_weight"] = plan.down_weight
    return [
        (name, tokens, kind, plan.rows, tile, tile.m if "weight" in kind else 0)
        for kind, tile in kinds.items()
        if tile is not None
    ]


def precompile(forward: list[tuple[str, int]], train: list[tuple[str, int]]) -> None:
    """Compile what the layer needs for these cells, in parallel, into Triton's cache."""
    jobs = [job for cell in forward for job in plan_jobs(*cell, False)]
    jobs += [job for cell in train for job in plan_jobs(*cell, True)]
    unique = list({repr(job[0]) + repr(job[2:]): job for job in jobs}.values())
    with multiprocessing.get_context("spawn").Pool(15) as pool:
        errors = [error for error in pool.map(compile_job, unique, chunksize=1) if error]
    log("compiled", len(unique), "failed", len(errors), *errors[:1])


# ---------------------------------------------------------------- run


def forward_jobs(name: str, tokens: int) -> list[tuple[str, int, str, int, Any, int]]:
    """Candidates of one forward cell."""
    _, _, experts, picks, _ = SHAPES[name]
    if tokens == 1:
        return [(name, 1, "few", 0, plan, 0) for plan in few_plans()]
    mean = tokens * picks / experts
    jobs = []
    for kind in ("up", "down"):
        if mean <= 12:
            pool = [
                (rows, t)
                for rows in ((16,) if mean < 2 else (16, 32))
                for t in small_tiles(rows, True)
            ]
        elif mean <= 100:
            pool = [(rows, t) for rows in (32, 64) for t in small_tiles(rows, True) if t.k <= 128]
            pool += [(rows, t) for rows in (64, 128) for t in large_tiles(kind, rows)]
        else:
            pool = [(rows, t) for rows in (64, 128, 256) for t in large_tiles(kind, rows)]
        jobs += [(name, tokens, kind, rows, tile, 0) for rows, tile in pool]
    return jobs


def train_jobs(name: str, tokens: int) -> list[tuple[str, int, str, int, Any, int]]:
    """Candidates of the backward products."""
    jobs: list[tuple[str, int, str, int, Any, int]] = []
    for kind in ("down_grad", "up_grad"):
        jobs += [
            (name, tokens, kind, rows, t, 0) for rows in (128, 256) for t in large_tiles(kind, rows)
        ]
    for kind in ("gate_up_weight", "down_weight"):
        jobs += [(name, tokens, kind, 128, t, m) for m, t in weight_tiles()]
    return jobs


def time_jobs(jobs: list[Any], results: list[dict[str, Any]], budget_s: float) -> None:
    """Time all candidates of one (shape, tokens)."""
    name, tokens = jobs[0][:2]
    case = make_case(name)
    sets = 16 if tokens <= 8 else 4 if tokens <= 456 else 1
    parts = Parts(case, tokens, sets)
    parts.fill()
    base: dict[str, Any] = {}
    end = time.time() + budget_s
    for _, _, kind, rows, tile, m in jobs:
        if time.time() > end:
            log("out of budget", name, tokens)
            break
        row = {
            "shape": name,
            "tokens": tokens,
            "kind": kind,
            "rows": rows,
            "m": m,
            "tile": asdict(tile),
        }
        try:
            if kind == "few":
                row.update(_time_few(case, tile, sets))
            else:
                calls = parts.calls(kind, rows, tile, m)
                out = calls[0]()
                torch.cuda.synchronize()
                row["err"] = rel(out, base.setdefault(kind, out.clone()))
                row["ms"] = time_graph(calls, repeats=7 if tokens > 456 else 9)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:160]}"
        results.append(row)
    kinds = sorted({job[2] for job in jobs})
    for kind in kinds if kinds != ["few"] else ["up_ms", "down_ms"]:
        key = kind if kinds == ["few"] else "ms"
        mine = [r for r in results if r["shape"] == name and r["tokens"] == tokens and key in r]
        mine = [r for r in mine if kinds == ["few"] or r["kind"] == kind]
        log("BEST", name, tokens, kind, f"of {len(mine)}")
        for r in sorted(mine, key=lambda r: r[key])[:4]:
            short = {k: v for k, v in r["tile"].items() if v is not False}
            log(
                "   ",
                round(r[key], 4),
                "rows",
                r["rows"],
                "m",
                r["m"],
                f"err {r.get('err', 0):.1e}",
                short,
            )
    del parts, base
    torch.cuda.empty_cache()


def _time_few(case: Case, plan: FewPlan, sets: int) -> dict[str, Any]:
    """Up and down of the sort-free path apart, and both."""
    from mogul.kernels.triton import layer as layer_module

    layer = layer_for(case)
    layer_module.few_plan = lambda shape: plan
    inputs = [make_tokens(case, 1) for _ in range(sets)]
    calls = [lambda q=q: layer.few(q[0], case.gate_up, case.down, q[1], q[2]) for q in inputs]
    out = calls[0]()
    x, ids, weights = inputs[0]
    err = rel(out, reference(case, x.float(), ids, weights))
    both = time_graph(calls, repeats=7)
    act = torch.randn(case.picks, case.dims[2], device="cuda")
    up = layer._launches[(("few_up", plan), id(None))]
    down = layer._launches[(("few_down", plan), id(None))]
    inner, width = case.dims[2], case.dims[1]
    ups = [
        lambda q=q: up((-(-inner // plan.up_n), case.picks), 0, q[0], case.gate_up, q[1], act)
        for q in inputs
    ]
    downs = [
        lambda q=q: down((-(-width // plan.down_n), 1), 0, act, case.down, q[1], q[2], out)
        for q in inputs
    ]
    return {"err": err, "ms": both, "up_ms": time_graph(ups, 7), "down_ms": time_graph(downs, 7)}


def cells(text: str) -> list[tuple[str, int]]:
    """`A:64,C:64` -> pairs."""
    return [(c.split(":")[0], int(c.split(":")[1])) for c in text.split(",") if c]


def main() -> None:
    """Compile, time, write tune.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=".")
    parser.add_argument("--jobs", default="")
    parser.add_argument("--train", default="")
    parser.add_argument("--split", default="", help="cells, forward products")
    parser.add_argument("--split-train", default="")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--cell-budget", type=float, default=25)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    groups = [forward_jobs(*cell) for cell in cells(args.jobs)] + [
        train_jobs(*cell) for cell in cells(args.train)
    ]
    groups += [split_jobs(*cell, False) for cell in cells(args.split)]
    groups += [split_jobs(*cell, True) for cell in cells(args.split_train)]
    log("candidates", [len(g) for g in groups])
    if args.dry:
        return
    everything = [job for group in groups for job in group]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        errors = pool.map(compile_job, everything, chunksize=4)
    log("compiled; failed:", sum(map(bool, errors)), next((e for e in errors if e), ""))
    peak = ceilings()
    log("ceilings", peak)
    results: list[dict[str, Any]] = []
    bad = {id(job) for job, error in zip(everything, errors, strict=True) if error}
    for group in groups:
        name, tokens = group[0][:2]
        log("CELL", name, tokens, "floor", round(floor_ms(name, tokens, peak), 4))
        time_jobs([job for job in group if id(job) not in bad], results, args.cell_budget)
        Path(args.out, "tune.json").write_text(json.dumps({"peak": peak, "rows": results}))


if __name__ == "__main__":
    main()
