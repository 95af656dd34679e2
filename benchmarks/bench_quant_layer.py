"""How much faster is the experts layer with quantised weights on one GPU, and how exact?

Every cell times the bf16 layer and the quantised ones in turn, in a CUDA graph of rotated inputs
(cold cache), and compares with fp32: on the original weights, and on the dequantised ones. The
floor is bytes or arithmetic of the format at the limits of this run. `--tune` first times tiles of
the two products alone and uses the best (written to tuned.json).

    python benchmarks/bench_quant_layer.py --shapes A,C --formats fp8,int4-64 --tokens 64 --out D
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from common import SHAPES, Case, ceilings, make_case, make_tokens, reference, rel, time_graph

from mogul.bench import ledger
from mogul.kernels import (
    QuantisedExperts,
    dequantise_experts,
    expert_format,
    moe_forward,
    moe_forward_quantised,
    quantise_experts,
)
from mogul.kernels.triton import launch as launch_module
from mogul.kernels.triton import quant_layer, quant_plans
from mogul.kernels.triton.layer import layer_of
from mogul.kernels.triton.plans import Plan, Tile

START = time.time()
ROWS = ((16, 12), (32, 28), (64, 96), (128, 1 << 30))
"""Row tile by mean rows an expert."""


def log(*words: Any) -> None:
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


# ---------------------------------------------------------------- tiles


def candidates(rows: int, group: int, up: bool) -> list[Tile]:
    """Tiles worth timing for one product."""
    found = []
    if group:
        for n, k, stages, warps in itertools.product((64, 128), (64, 128), (3, 5), (4, 8)):
            if (warps == 8) == (n == 128) or rows >= 64:
                found.append(Tile(n=n, k=k, group=1 if rows < 128 else 8, warps=warps,
                                  stages=stages, swap=True, stream=rows < 128))  # fmt: skip
        return found
    if rows == 128:
        for n, warps, stages, per_sm, group_m in itertools.product(
            (128, 256), (4, 8), (3, 4), (0, 1), (8,)
        ):
            size = (n * (2 if up else 1) + rows) * 128 * stages
            if size < 227_000 and (warps == 8 or n == 128) and not (up and n == 256):
                found.append(Tile(n=n, k=128, group=group_m, warps=warps, stages=stages,
                                  tma=True, per_sm=per_sm))  # fmt: skip
        return found
    for n, k, stages, swap in itertools.product((32, 64, 128), (128, 256), (3, 5), (False, True)):
        size = (n * (2 if up else 1) + rows) * k * stages
        if size < 200_000 and (n >= 64 or not swap) and n * k >= 8192:
            found.append(Tile(n=n, k=k, group=1, warps=4 if n < 128 else 8, stages=stages,
                              swap=swap, stream=True))  # fmt: skip
    return found


def meta_experts(case: Case, name: str) -> QuantisedExperts:
    """A record without memory, for compiling."""
    chosen = expert_format(name)
    experts, width, inner = case.dims

    def weight(rows: int, columns: int) -> Any:
        from mogul.kernels.quant import QuantisedWeight

        if not chosen.group:
            value = torch.empty(experts, rows, columns, dtype=torch.float8_e4m3fn, device="meta")
            return QuantisedWeight(value, torch.empty(experts, rows, device="meta"))
        value = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device="meta")
        groups = -(-columns // chosen.group)
        shape = (experts, groups, rows, 2)
        return QuantisedWeight(value, torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    return QuantisedExperts(chosen, weight(2 * inner, width), weight(width, inner))


class Parts:
    """Both products of one cell as calls."""

    def __init__(self, case: Case, experts: QuantisedExperts, tokens: int, sets: int):
        self.inputs = [make_tokens(case, tokens) for _ in range(sets)]
        num, width, inner = case.dims
        dtypes = (case.down.dtype, torch.int64, torch.float32)
        layer = layer_of(num, case.picks, width, inner, dtypes, 0)
        split = experts.format.weight_only
        act = (0, 1.702, 7.0)
        self.quant = quant_layer.QuantLayer(layer, experts.format.group, act, split=split)
        w_up, w_down = experts.gate_up, experts.down
        tensors = (w_up.value, w_up.scale, w_down.value, w_down.scale, None, None)
        self.weights = quant_layer.Weights(*tensors, experts.format.group, *act, split)
        slots = tokens * case.picks
        self.act, self.y = case.down.new_empty(slots, inner), case.down.new_empty(slots, width)
        self.sorts: dict[int, Any] = {}
        self.rounded: list[Any] = []

    def calls(self, up: bool, rows: int, tile: Tile) -> list[Any]:
        """One closure an input set."""
        if rows not in self.sorts:
            self.sorts[rows] = [self.quant.layer.sort(ids, rows) for _, ids, _ in self.inputs]
        if not self.rounded:
            self.rounded = [self.quant._rounded(x) for x, _, _ in self.inputs]
            if not self.act.is_meta:
                self.act.normal_(0, 0.5)
            self.rounded_act = self.quant._rounded(self.act)
        plan = Plan(rows, tile, tile)
        return [lambda i=i: self._call(up, plan, i) for i in range(len(self.inputs))]

    def _call(self, up: bool, plan: Plan, i: int) -> None:
        sort = self.sorts[plan.rows][i]
        if up:
            self.quant._up(plan, *self.rounded[i], self.weights, self.act, sort)
        else:
            self.quant._down(plan, *self.rounded_act, self.weights, self.y, sort)


Job = tuple[str, str, int, bool, int, Tile]


def compile_job(job: Job) -> str:
    """Compile one candidate on meta tensors into Triton's cache; return the error, if any."""

    def first(self: Any, grid: Any, args: Any) -> None:
        self.kernel.warmup(*args, grid=grid, **self.constants, **self.options)

    launch_module.Launch._first = first  # type: ignore[method-assign]
    name, format_name, tokens, up, rows, tile = job
    try:
        case = make_case(name, "meta")
        Parts(case, meta_experts(case, format_name), tokens, 1).calls(up, rows, tile)[0]()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def jobs_of(name: str, format_name: str, tokens: int) -> list[Job]:
    experts, picks = SHAPES[name][2:4]
    group = expert_format(format_name).group
    index = next(i for i, (_, most) in enumerate(ROWS) if tokens * picks / experts <= most)
    rows_tried = [ROWS[index][0]] + ([ROWS[index - 1][0]] if index == 2 else [])
    if group:
        rows_tried = [min(rows, 64) for rows in rows_tried]
    return [
        (name, format_name, tokens, up, rows, tile)
        for rows in dict.fromkeys(rows_tried)
        for up in (True, False)
        for tile in candidates(rows, group, up)
    ]


def tune(jobs: list[Job], case: Case, experts: QuantisedExperts, budget_s: float) -> Plan | None:
    """Time every candidate; the fastest pair with one row tile."""
    parts = Parts(case, experts, jobs[0][2], 2)
    best: dict[tuple[int, bool], tuple[float, Tile]] = {}
    end = time.time() + budget_s
    for _, _, _, up, rows, tile in jobs:
        if time.time() > end:
            log("budget spent: later candidates left out")
            break
        try:
            spent = time_graph(parts.calls(up, rows, tile), 5)
        except torch.AcceleratorError:
            raise  # the device is lost: nothing after it could be believed
        except Exception as error:
            log(f"  {type(error).__name__} {str(error)[:80]} {tile}")
            continue
        if spent < best.get((rows, up), (1e9, tile))[0]:
            best[rows, up] = (spent, tile)
    whole = [
        (best[rows, True][0] + best[rows, False][0], rows)
        for rows in {rows for rows, _ in best}
        if (rows, True) in best and (rows, False) in best
    ]
    for (rows, up), (spent, tile) in best.items():
        log(f"  rows {rows} {'up' if up else 'down'} {spent:.4f} ms {tile}")
    if not whole:
        return None
    rows = min(whole)[1]
    return Plan(rows, best[rows, True][1], best[rows, False][1])


def tuned_row(name: str, format_name: str, tokens: int, plan: Plan) -> dict[str, Any]:
    width, inner, experts, picks, _ = SHAPES[name]
    default = asdict(Tile(n=0, k=0))
    tiles = {
        side: {key: value for key, value in asdict(tile).items() if value != default[key]}
        for side, tile in (("up", plan.up), ("down", plan.down))
    }
    sizes = {"experts": experts, "picks": picks, "width": width, "inner": inner}
    group = expert_format(format_name).group
    return {"group": group, **sizes, "tokens": tokens, "rows": plan.rows, **tiles}


# ---------------------------------------------------------------- cells


def floor_ms(name: str, tokens: int, format_name: str, peak: dict[str, float]) -> float:
    """Bytes of the format's weights (expected distinct experts), or arithmetic (fp8: twice)."""
    width, inner, experts, picks, _ = SHAPES[name]
    weight_bytes = expert_format(format_name).bits / 8 if format_name != "bf16" else 2
    distinct = experts * (1 - (1 - picks / experts) ** tokens)
    size = distinct * 3 * width * inner * weight_bytes + tokens * (width * 4 + 12 * picks)
    flop = 6 * tokens * picks * width * inner / (2 if format_name == "fp8" else 1)
    return max(flop / peak["tflop_per_s"] / 1e9, size / peak["tb_per_s"] / 1e9)


def cell(
    case: Case, packed: dict[str, QuantisedExperts], tokens: int, peak: dict[str, float]
) -> dict[str, Any]:
    """All formats at one number of tokens."""
    sets = 16 if tokens <= 8 else 4 if tokens <= 456 else 1
    inputs = [make_tokens(case, tokens) for _ in range(sets)]
    runs: dict[str, Any] = {
        "bf16": lambda x, ids, w: moe_forward(x, case.gate_up, case.down, ids, w)
    }
    for name, experts in packed.items():
        runs[name] = lambda x, ids, w, e=experts: moe_forward_quantised(x, e, ids, w)
    errors = {name: error_of(case, run, inputs[0], packed.get(name)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            times[name].append(time_graph([lambda q=q, r=run: r(*q) for q in inputs], 9))
    rows = {}
    for name, spent in times.items():
        floor = floor_ms(case.name, tokens, name, peak)
        ms = statistics.median(spent)
        rows[name] = {"ms": ms, "spread": max(spent) - min(spent), "floor": floor,
                      "ratio": ms / floor, **errors[name]}  # fmt: skip
    for name, row in rows.items():
        row["to_bf16"] = row["ms"] / rows["bf16"]["ms"]
        log(f"{case.name} {tokens:6} {name:9}", {k: float(f"{v:.4g}") for k, v in row.items()})
    return rows


def error_of(
    case: Case, run: Any, inputs: tuple[Tensor, ...], experts: QuantisedExperts | None
) -> dict[str, float]:
    """Against fp32 on the original and on the dequantised weights, and against the reference."""
    x, ids, weights = inputs
    with torch.no_grad():
        got = run(x, ids, weights)[:48]
        again = run(x, ids, weights)[:48]
        assert torch.equal(got.isnan(), again.isnan())
        assert torch.equal(got.nan_to_num(), again.nan_to_num()), "two runs differ"
        small = (x[:48].float(), ids[:48], weights[:48])
        errors = {"error": rel(got, reference(case, *small))}
        if experts is not None:
            gate_up, down = dequantise_experts(experts, torch.bfloat16)
            same = Case(case.name, gate_up, down, case.groups, case.generator)
            errors["error_dequantised"] = rel(got, reference(same, *small))
            want = moe_forward_quantised(x[:48], experts, *small[1:], backend="reference")
            errors["error_reference"] = rel(got, want)
    return errors


def ledger_rows(name: str, tokens: int, rows: dict[str, Any], peak: Any) -> list[dict[str, Any]]:
    return [
        ledger.row(
            torch.cuda.get_device_name(), bench="quant_layer",
            case=f"{name} {kind} forward {tokens}", metric="time", unit="ms",
            value=round(row["ms"], 5), spread=round(row["spread"], 5), runs=3,
            floor=round(row["floor"], 5), ratio=round(row["ratio"], 4),
            peers={"mogul bf16": round(rows["bf16"]["ms"], 5)}, to_bf16=round(row["to_bf16"], 4),
            relative_error=float(f"{row['error']:.2e}"), ceilings=peak,
            **{k: float(f"{row[k]:.2e}") for k in ("error_dequantised",) if k in row},
        )
        for kind, row in rows.items() if kind != "bf16"
    ]  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="A,C")
    parser.add_argument("--formats", default="fp8,int4-64")
    parser.add_argument("--tokens", type=numbers, default=numbers("1,8,64,456,4096"))
    parser.add_argument("--tune", default="", help="cells to tune: A:fp8:64,C:fp8:456")
    parser.add_argument("--tune-s", type=float, default=8, help="seconds for one cell")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    peak = ceilings()
    log("ceilings", peak, torch.cuda.get_device_name(), torch.__version__)
    cells = [part.split(":") for part in args.tune.split(",") if part]
    jobs = {(n, f, int(t)): jobs_of(n, f, int(t)) for n, f, t in cells}
    unique = {(j[0], j[1], *j[3:]): j for group in jobs.values() for j in group}
    if unique:
        with multiprocessing.get_context("spawn").Pool(15) as pool:
            failed = [e for e in pool.imap_unordered(compile_job, unique.values(), 2) if e]
        log("compiled", len(unique), "failed", len(failed), *failed[:2])
    found: list[dict[str, Any]] = []
    for name in args.shapes.split(","):
        case = make_case(name)
        packed = {f: quantise_experts(case.gate_up, case.down, f) for f in args.formats.split(",")}
        log("quantised", name)
        for (shape, format_name, tokens), group in jobs.items():
            if shape == name and (plan := tune(group, case, packed[format_name], args.tune_s)):
                found.append(tuned_row(name, format_name, tokens, plan))
                (args.out / "tuned.json").write_text("\n".join(map(json.dumps, found)))
                key = tuple(found[-1][k] for k in ("group", "experts", "picks", "width", "inner"))
                plans = quant_plans.table().setdefault(key, [])
                plans[:] = sorted([*plans, (tokens, plan)], key=lambda pair: pair[0])
                quant_plans.quant_plan_for.cache_clear()
        for tokens in args.tokens:
            try:
                rows = cell(case, packed, tokens, peak)
                ledger.append(ledger_rows(name, tokens, rows, peak), args.out / "ledger.jsonl")
            except Exception as error:
                log(f"{name} {tokens} failed: {type(error).__name__} {str(error)[:300]}")
        del case, packed
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
