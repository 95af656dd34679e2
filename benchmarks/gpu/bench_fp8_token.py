"""What one decoder layer's fp8 operators cost at few rows, beside the reading of their bytes.

Each operator runs over the weights of several layers in one CUDA graph, so that nothing is in the
cache: query-key-value with its norm and bias, the output with its residual, and the experts with
norm, routing, shared expert and both sums. One row goes by plain sums or is rounded like more rows.
`--head` times the output head in bf16 and in whole numbers of 8 bits instead.

    python benchmarks/gpu/bench_fp8_token.py --rows 1 8 64 228 --record
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mogul.bench import ledger
from mogul.core.log import say
from mogul.kernels.triton import fp8_token
from mogul.kernels.triton.byte_linear import linear_bytes, pack_bytes

WIDTH, INNER, SHARED, EXPERTS, PICKS, HEADS, VOCAB = 5120, 1344, 5376, 64, 8, 7168, 153376
"""Of Pangu Pro MoE; HEADS are the columns of query, key and value."""
RULE = [EXPERTS, PICKS, PICKS, 0, 0, 0, 0]
Operator = Callable[[dict[str, Any], Tensor], Tensor]


def packed(*shape: int) -> tuple[Tensor, Tensor]:
    """Random e4m3 numbers up to 2 in magnitude, and scales."""
    value = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    value.view(torch.uint8).random_(0, 256).bitwise_and_(0xBF)
    return value, torch.rand(shape[:-1], device="cuda") * 1e-2 + 1e-2


def make_layer() -> dict[str, Any]:
    """The weights of one layer."""
    router = torch.randn(EXPERTS, WIDTH, device="cuda") * 0.02
    return {
        "heads": packed(HEADS, WIDTH),
        "output": packed(WIDTH, WIDTH),
        "experts": (*packed(EXPERTS, 2 * INNER, WIDTH), *packed(EXPERTS, WIDTH, INNER)),
        "shared": (*packed(2 * SHARED, WIDTH), *packed(WIDTH, SHARED)),
        "router": router.bfloat16(),
        "norm": torch.ones(WIDTH, device="cuda").bfloat16(),
        "bias": torch.zeros(HEADS, device="cuda").bfloat16(),
        "factors": torch.full((EXPERTS,), 20.0, device="cuda"),
    }


def heads(layer: dict[str, Any], x: Tensor) -> Tensor:
    parts = (x, layer["norm"], None, 1e-5, *layer["heads"], layer["bias"], None)
    return torch.ops.mogul.rows_linear_fp8(*parts)


def output(layer: dict[str, Any], x: Tensor) -> Tensor:
    return torch.ops.mogul.rows_linear_fp8(x, None, None, 0.0, *layer["output"], None, x)


def experts(layer: dict[str, Any], x: Tensor) -> Tensor:
    route = (layer["router"], None, layer["factors"], RULE, 1.0)
    parts = (*layer["experts"], *layer["shared"])
    return torch.ops.mogul.moe_normed_shared(x, layer["norm"], None, 1e-5, *route, *parts)


OPERATORS: dict[str, Operator] = {"heads": heads, "output": output, "experts": experts}


def bf16_head(layer: dict[str, Any], x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, layer["head"])


def byte_head(layer: dict[str, Any], x: Tensor) -> Tensor:
    return linear_bytes(x, *layer["bytes"])


def time_heads(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The output head at all numbers of rows."""
    head = torch.randn(VOCAB, WIDTH, device="cuda", dtype=torch.bfloat16) / 70
    layers, found = [{"head": head, "bytes": pack_bytes(head)}], []
    for rows in options.rows:
        for kind, operator, width in (("bf16", bf16_head, 2), ("8 bits", byte_head, 1)):
            floor = VOCAB * WIDTH * width / options.tb_per_s / 1e6
            found.append(row_of("head", rows, kind, time_us(operator, rows, layers), floor))
    return found


def row_of(name: str, rows: int, kind: str, spent: float, floor: float) -> dict[str, Any]:
    """Say it and make it a line of the ledger."""
    say(f"{rows:4d} rows {name:8s} {kind:10s} {spent:7.1f} us, floor {floor:6.1f}")
    return ledger.row(
        device=torch.cuda.get_device_name(), bench="fp8_token", metric="time",
        case=f"pangu-pro {name}, {rows} rows, {kind}", unit="us", value=round(spent, 2),
        floor=round(floor, 2), ratio=round(spent / floor, 3), runs=11,
    )  # fmt: skip


def floor_bytes(name: str, rows: int) -> float:
    """Weights that are read once; picks fall evenly."""
    if name != "experts":
        return WIDTH * (HEADS if name == "heads" else WIDTH)
    distinct = EXPERTS * (1 - (1 - PICKS / EXPERTS) ** rows)
    return 3 * WIDTH * (SHARED + INNER * distinct) + 2 * WIDTH * EXPERTS


def time_us(operator: Operator, rows: int, layers: list[dict[str, Any]]) -> float:
    """Median microseconds of one call in a graph of three rounds over all layers."""
    x = torch.randn(rows, WIDTH, device="cuda").bfloat16()

    def run() -> None:
        for _ in range(3):
            for layer in layers:
                operator(layer, x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(15):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 1e3 * median(times[4:]) / (3 * len(layers))


def time_layers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every operator of a layer at all numbers of rows."""
    layers, found = [make_layer() for _ in range(options.layers)], []
    for rows in options.rows:
        for is_plain in (True, False) if rows == 1 else (False,):
            fp8_token.one_token = is_plain
            kind = "plain sums" if is_plain else "rounded"
            for name, operator in OPERATORS.items():
                floor = floor_bytes(name, rows) / options.tb_per_s / 1e6
                found.append(row_of(name, rows, kind, time_us(operator, rows, layers), floor))
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 228])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tb-per-s", type=float, default=4.09, help="the card's copy speed")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--head", action="store_true", help="the output head instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = time_heads(options) if options.head else time_layers(options)
    if options.record:
        ledger.append(found, options.out / "ledger.jsonl")


if __name__ == "__main__":
    main()
