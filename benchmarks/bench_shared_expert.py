"""A shared expert: after the routed ones, on a second stream, or through their launches?

Pangu Pro's layer: 64 routed experts of width 1344 and a shared one of 5376 that every token takes.
`after` runs it as a dense feed-forward behind the routed experts, `beside` on another stream,
`inside` as four further experts of 1344 that every token picks with weight 1. Captured in CUDA
graphs, inputs rotated, in turns. Floor: bytes or arithmetic of both parts.

    python benchmarks/bench_shared_expert.py --tokens 1,8,64,456,4096,16384 --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from common import Case, ceilings, floor_ms, make_case, make_tokens, rel, time_graph

from mogul.bench import ledger
from mogul.kernels import moe_forward
from mogul.kernels.triton import layer as layer_module
from mogul.kernels.triton.plans import Shape, few_plan, plan_for

PARTS = 4
Inputs = tuple[Tensor, Tensor, Tensor]


def routed_shape(shape: Shape) -> Shape:
    """The shape of the routed experts, also for a layer that holds the shared one."""
    return replace(shape, experts=64, picks=8) if shape.experts == 64 + PARTS else shape


def variants(case: Case) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> (x, ids, weights) -> out."""
    experts, width, _ = case.dims
    extra = make_case("B")
    gate_up = torch.cat((case.gate_up, extra.gate_up[:PARTS]))
    down = torch.cat((case.down, extra.down[:PARTS]))
    gate, up = (part.reshape(-1, width) for part in gate_up[experts:].chunk(2, 1))
    first, second = torch.cat((gate, up)), torch.cat(tuple(down[experts:]), 1)
    side = torch.cuda.Stream()
    del extra

    def shared(x: Tensor) -> Tensor:
        gate, up = F.linear(x, first).chunk(2, -1)
        return F.linear(F.silu(gate) * up, second)

    def routed(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, case.gate_up, case.down, ids, weights, backend="triton")

    def beside(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        main = torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            more = shared(x)
        out = routed(x, ids, weights)
        main.wait_stream(side)
        more.record_stream(main)
        return out + more

    def inside(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens = len(x)
        always = torch.arange(experts, experts + PARTS, device=x.device).expand(tokens, -1)
        ids = torch.cat((ids, always), 1)
        weights = torch.cat((weights, weights.new_ones(tokens, PARTS)), 1)
        return moe_forward(x, gate_up, down, ids, weights, backend="triton")

    return {"after": lambda *q: routed(*q) + shared(q[0]), "beside": beside, "inside": inside}


def measure(case: Case, runs: dict[str, Callable[..., Tensor]], tokens: int, out: Path) -> None:
    """One number of tokens: print and record."""
    sets = 16 if tokens <= 8 else 4 if tokens <= 456 else 1
    inputs: list[Inputs] = [make_tokens(case, tokens) for _ in range(sets)]
    peak = ceilings()
    with torch.no_grad():
        want = runs["after"](*inputs[0])
        times: dict[str, list[float]] = {name: [] for name in runs}
        for name, run in runs.items():
            assert rel(run(*inputs[0]), want) < 6e-3, name
        for _ in range(3):
            for name, run in runs.items():
                times[name].append(time_graph([lambda q=q, r=run: r(*q) for q in inputs], 9))
    _, width, inner = case.dims
    size, flop = 6 * PARTS * width * inner, 6 * tokens * PARTS * width * inner
    is_bytes = flop / peak["tflop_per_s"] < size / peak["tb_per_s"]
    more = size / peak["tb_per_s"] / 1e9 if is_bytes else flop / peak["tflop_per_s"] / 1e9
    floor = floor_ms("B", tokens, peak) + more
    ms = {name: statistics.median(t) for name, t in times.items()}
    print(tokens, {n: f"{t:.4f} ({t / floor:.3f})" for n, t in ms.items()}, flush=True)
    row = ledger.row(
        torch.cuda.get_device_name(), bench="shared_expert", case=f"B {tokens}", metric="time",
        unit="ms", value=round(ms["after"], 5), runs=3, floor=round(floor, 5),
        ratio=round(ms["after"] / floor, 4),
        peers={name: round(t, 5) for name, t in ms.items() if name != "after"},
        spread=round(max(times["after"]) - min(times["after"]), 5),
    )  # fmt: skip
    ledger.append([row], out / "ledger.jsonl")


def main() -> None:
    """Every number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,8,64,456,4096,16384")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    layer_module.plan_for = lambda shape, tokens: plan_for(routed_shape(shape), tokens)
    layer_module.few_plan = lambda shape: few_plan(routed_shape(shape))
    case = make_case("B")
    runs = variants(case)
    for tokens in map(int, args.tokens.split(",")):
        try:
            measure(case, runs, tokens, args.out)
        except Exception as error:
            print(f"{tokens} failed: {type(error).__name__} {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
