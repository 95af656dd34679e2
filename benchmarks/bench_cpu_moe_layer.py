"""Is the experts implementation "mogul" as fast as those of Transformers on a processor?

Runs one experts module (Qwen3-MoE's class) under every implementation in turn, so that all see the
same weather, and prints medians, the ratio to the best stock one, and the floor: the bytes of the
experts touched over the measured read bandwidth, or the FLOP over the measured matmul speed. For
the shape of an upcycled SmolLM2-135M it also runs the dense FFN it came from.

    OMP_NUM_THREADS=2 python benchmarks/bench_cpu_moe_layer.py [--shape qwen3-30b-a3b] [--train]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import mogul.models.experts
from mogul.bench import ledger
from mogul.core.table import Table

STOCK = ("eager", "grouped_mm")
Clock = Callable[[], float]
Times = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """One experts layer and the numbers of tokens to try."""

    hidden_size: int
    expert_width: int
    num_experts: int
    num_groups: int
    top_k: int
    tokens: tuple[int, ...]
    has_dense_twin: bool = False


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 1, 8, (1, 16, 256)),
    "upcycled-smollm2": Shape(576, 192, 32, 8, 8, (1, 16, 512), has_dense_twin=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--seconds", type=float, default=5.0, help="a row of the table")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU time, for a busy machine"
    )
    parser.add_argument("--format", choices=["table", "json", "csv"], default="table")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    mogul.models.experts.register()
    clock = time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
        clock = time.thread_time
    kind = "one thread's CPU time" if options.cpu_time else "wall time"
    kind += f", {torch.get_num_threads()} threads" + (", with backward" if options.train else "")
    results = [
        result
        for name in options.shape or SHAPES
        for dtype in options.dtype or ["float32"]
        for result in bench_shape(name, getattr(torch, dtype), options, clock)
    ]
    columns = ["shape", "dtype", "tokens", "mogul ms", "eager ms", "grouped_mm ms", "dense ms",
               "floor ms", "mogul / best stock", "mogul / floor"]  # fmt: skip
    rows = [table_row(*result) for result in results]
    notes = [f"torch {torch.__version__}, medians of {kind}"]
    Table("Experts layer on the processor", columns, rows, notes).show(options.format)
    if options.record:
        ledger.append(ledger_row(*result, kind) for result in results)


def table_row(case: str, dtype: str, num_tokens: int, times_ms: Times, floor_ms: float) -> list:
    best_stock_ms = min(times_ms[implementation] for implementation in STOCK)
    dense_ms = f"{times_ms['dense']:.3f}" if "dense" in times_ms else ""
    return [
        case, dtype, num_tokens, *(f"{times_ms[key]:.3f}" for key in ("mogul", *STOCK)), dense_ms,
        f"{floor_ms:.3f}", f"{times_ms['mogul'] / best_stock_ms:.2f}",
        f"{times_ms['mogul'] / floor_ms:.2f}",
    ]  # fmt: skip


def ledger_row(
    case: str, dtype: str, num_tokens: int, times_ms: Times, floor_ms: float, kind: str
) -> dict[str, object]:
    peers = {name: round(value, 4) for name, value in times_ms.items() if name != "mogul"}
    return ledger.row(
        bench="cpu_moe_layer", case=f"{case} {dtype}, {num_tokens} tokens, {kind}",
        metric="median time", unit="ms", value=round(times_ms["mogul"], 4), runs="interleaved",
        floor=round(floor_ms, 4), peers=peers,
        ratio=round(times_ms["mogul"] / min(peers[name] for name in STOCK), 3),
    )  # fmt: skip


def bench_shape(
    name: str, dtype: torch.dtype, options: argparse.Namespace, clock: Clock
) -> list[tuple[str, str, int, Times, float]]:
    """For each number of tokens: its medians and floor in milliseconds."""
    shape = SHAPES[name]
    experts = build_experts(shape, dtype)
    bytes_per_s, flop_per_s = measure_limits(dtype, clock)
    results = []
    for num_tokens in options.tokens or shape.tokens:
        cases = make_cases(shape, num_tokens, dtype)
        functions = {
            implementation: experts_call(
                experts, implementation, rotated(cases, 5 * number), options.train
            )
            for number, implementation in enumerate(("mogul", *STOCK))
        }
        if shape.has_dense_twin:
            functions["dense"] = dense_call(shape, cases, options.train)
        times_s = interleaved_medians_s(functions, options.seconds, clock)
        floor_s = layer_floor_s(shape, cases, dtype, bytes_per_s, flop_per_s)
        floor_s *= 3 if options.train else 1
        times_ms = {key: 1e3 * seconds for key, seconds in times_s.items()}
        results.append((name, str(dtype)[6:], num_tokens, times_ms, 1e3 * floor_s))
    return results


def build_experts(shape: Shape, dtype: torch.dtype) -> list[Qwen3MoeExperts]:
    """Several layers where they are small, so that no layer stays in the cache."""
    config = Qwen3MoeConfig(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.expert_width,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    layers = []
    for _ in range(8 if shape.has_dense_twin else 1):
        layer = Qwen3MoeExperts(config).to(dtype)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        layers.append(layer)
    return layers


def make_cases(shape: Shape, num_tokens: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Random tokens with random picks, an equal number in every group."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for _ in range(16):
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(dtype)
        scores = torch.rand(num_tokens, shape.num_groups, shape.num_experts // shape.num_groups,
                            generator=generator)  # fmt: skip
        places = scores.topk(shape.top_k // shape.num_groups, dim=-1).indices
        first = torch.arange(0, shape.num_experts, scores.shape[-1])[:, None]
        weights = torch.rand(num_tokens, shape.top_k, generator=generator)
        cases.append((x, (places + first).flatten(1), weights.to(dtype)))
    return cases


def rotated(cases: list, places: int) -> list:
    """Start elsewhere, so that no implementation finds what the one before it left in the cache."""
    return cases[places:] + cases[:places]


def experts_call(
    layers: list[Qwen3MoeExperts], implementation: str, cases: list, train: bool
) -> Callable[[], None]:
    turn = itertools.cycle(itertools.product(cases, layers))

    def call() -> None:
        (x, ids, weights), layer = next(turn)
        layer.config._experts_implementation = implementation
        if not train:
            with torch.no_grad():
                layer(x, ids, weights)
            return
        layer(x.requires_grad_(), ids, weights.requires_grad_()).sum().backward()
        for tensor in (x, weights, *layer.parameters()):
            tensor.grad = None

    return call


def dense_call(shape: Shape, cases: list, train: bool) -> Callable[[], None]:
    """The FFN as Llama writes it, of the width that all picks have together."""
    width, dtype = shape.expert_width * shape.top_k, cases[0][0].dtype
    sizes = [(width, shape.hidden_size), (width, shape.hidden_size), (shape.hidden_size, width)]
    layers = [
        [torch.randn(size).mul_(0.02).to(dtype).requires_grad_() for size in sizes]
        for _ in range(30)
    ]
    turn = itertools.cycle(itertools.product(cases, layers))

    def call() -> None:
        (x, _, _), (gate, up, down) = next(turn)
        with torch.set_grad_enabled(train):
            y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        if train:
            y.sum().backward()
            for tensor in (x, gate, up, down):
                tensor.grad = None

    return call


def interleaved_medians_s(
    functions: dict[str, Callable], seconds: float, clock: Clock
) -> dict[str, float]:
    times_s: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    order = list(functions)
    while time.perf_counter() < end or len(times_s["mogul"]) < 5:
        for name in order:
            times_s[name].append(timed_s(functions[name], clock))
        order = [*order[1:], order[0]]
    return {name: median(values) for name, values in times_s.items()}


def measure_limits(dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Read bandwidth (matrix-vector products over 512 MiB) and square-matmul FLOP/s, best of 10."""
    big = torch.ones(2**29 // dtype.itemsize // 4096, 4096, dtype=dtype)
    vector, square = torch.ones(4096, dtype=dtype), torch.ones(1536, 1536, dtype=dtype)
    read_s = min(timed_s(lambda: torch.mv(big, vector), clock) for _ in range(10))
    matmul_s = min(timed_s(lambda: torch.mm(square, square), clock) for _ in range(10))
    return big.nbytes / read_s, 2 * 1536**3 / matmul_s


def timed_s(function: Callable, clock: Clock) -> float:
    start = clock()
    function()
    return clock() - start


def layer_floor_s(
    shape: Shape, cases: list, dtype: torch.dtype, bytes_per_s: float, flop_per_s: float
) -> float:
    expert_values = 3 * shape.hidden_size * shape.expert_width
    distinct = sum(len(ids.unique()) for _, ids, _ in cases) / len(cases)
    read_s = distinct * expert_values * dtype.itemsize / bytes_per_s
    slots = cases[0][1].numel()
    return max(read_s, 2 * slots * expert_values / flop_per_s)


if __name__ == "__main__":
    main()
