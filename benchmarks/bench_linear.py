"""Products of few rows on a GPU: time a call by tile, beside PyTorch's own and the weight's bytes.

Weights rotate through enough copies to stay out of the cache; calls stand in one captured graph.

    python benchmarks/bench_linear.py --record
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mogul.bench import ledger
from mogul.bench.calibrate_timing import copy_bandwidth
from mogul.core.log import say
from mogul.kernels.quant_format import quantise_rows
from mogul.kernels.triton import linear, normed
from mogul.kernels.triton.topk import softmax_topk

ROTATED_BYTES = 2e8
TILES = ((16, 256, 4, 4), (32, 128, 4, 5), (64, 128, 4, 4), (64, 128, 4, 5), (64, 256, 4, 4))


@dataclass(frozen=True)
class Case:
    """One weight."""

    name: str
    columns: int
    inner: int
    is_fp8: bool


CASES = (
    Case("router of Qwen3-30B-A3B", 128, 2048, False),
    Case("query, key, value of Qwen3-30B-A3B", 5120, 2048, False),
    Case("output of Qwen3-30B-A3B", 2048, 4096, False),
    Case("router of Pangu Pro MoE", 64, 5120, False),
    Case("query, key, value of Pangu Pro MoE", 7168, 5120, True),
    Case("output of Pangu Pro MoE", 5120, 5120, True),
    Case("down of Qwen2.5-72B", 8192, 29568, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--record", type=Path, nargs="?", const=ledger.LEDGER, default=None)
    options = parser.parse_args()
    bandwidth = copy_bandwidth(torch.device("cuda"))
    for case in CASES:
        for row in measure(case, options.rows, bandwidth):
            say(f"{row['case']}: {row['value']} us, floor {row['floor']}, PyTorch {row['peers']}")
            if options.record is not None:
                ledger.append([row], options.record)
    for row in measure_joined(options.rows, bandwidth):
        say(f"{row['case']}: {row['value']} us, floor {row['floor']}, apart {row['apart']}")
        if options.record is not None:
            ledger.append([row], options.record)


def measure_joined(rows: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Ledger rows of Qwen3-30B-A3B's products with norm, residual or picks, beside their parts."""
    found = []
    for name, columns, inner in (("norm + query, key, value", 5120, 2048),
                                 ("output + residual", 2048, 4096),
                                 ("norm + router + picks", 128, 2048)):  # fmt: skip
        size = 2 * columns * inner
        copies = max(2, min(24, int(ROTATED_BYTES // size)))
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        weights = [torch.randn(columns, inner, **kind) for _ in range(copies)]
        norm = torch.ones(inner, **kind)
        for count in rows:
            x, plus = torch.randn(count, inner, **kind), torch.randn(count, columns, **kind)
            joined, apart = joined_and_apart(name, x, norm, plus, weights)
            floor = 1e6 * size / bandwidth
            value = clock(joined, copies)
            found.append(
                ledger.row(
                    device=torch.cuda.get_device_name(), bench="linear_joined",
                    case=f"{name} of Qwen3-30B-A3B, bf16, {count} rows", metric="time a call",
                    unit="us", value=value, floor=round(floor, 2), ratio=round(value / floor, 3),
                    runs=5, apart=clock(apart, copies),
                )
            )  # fmt: skip
    return found


def joined_and_apart(
    name: str, x: torch.Tensor, norm: torch.Tensor, plus: torch.Tensor, weights: list[Any]
) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """The call with the weight of a number, and the same by one launch a part."""
    dtype = x.dtype
    if name.startswith("output"):
        return (
            lambda i: normed.added_linear(x, weights[i], plus),
            lambda i: plus + linear.product(x, weights[i], dtype),
        )
    if name.endswith("picks"):

        def apart(i: int) -> Any:
            rows = normed.norm_rows(x, norm, 1e-6)
            return softmax_topk(linear.product(rows, weights[i], dtype), 8, True, dtype)

        return lambda i: normed.normed_route(x, norm, None, 1e-6, weights[i], 8, True, dtype), apart
    return (
        lambda i: normed.normed_linear(x, norm, None, 1e-6, weights[i]),
        lambda i: linear.product(normed.norm_rows(x, norm, 1e-6), weights[i], dtype),
    )


def measure(case: Case, rows: list[int], bandwidth: float) -> list[dict[str, Any]]:
    """Ledger rows of one weight."""
    size = case.columns * case.inner * (1 if case.is_fp8 else 2)
    copies = max(2, min(24, int(ROTATED_BYTES // size)))
    shape = (case.columns, case.inner)
    made = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    weights: list[Any] = [quantise_rows(one) for one in made] if case.is_fp8 else made
    found = []
    for count in rows:
        x = torch.randn(count, case.inner, device="cuda", dtype=torch.bfloat16)
        peer, own = products(case, x, weights)
        linear.few_tile = None
        times = {"chosen": clock(own, copies)}
        for tile in TILES:
            linear.few_tile = tile
            times[str(tile)] = clock(own, copies)
        linear.few_tile = None
        floor = 1e6 * size / bandwidth
        found.append(
            ledger.row(
                device=torch.cuda.get_device_name(), bench="linear_few",
                case=f"{case.name}, {'fp8' if case.is_fp8 else 'bf16'}, {count} rows",
                metric="time a call", unit="us", value=times["chosen"], floor=round(floor, 2),
                ratio=round(times["chosen"] / floor, 3), runs=5,
                peers={"PyTorch": clock(peer, copies)}, tiles=times,
            )
        )  # fmt: skip
    return found


def products(
    case: Case, x: torch.Tensor, weights: list[Any]
) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    """PyTorch's product and mogul's, with the weight of a number."""
    if not case.is_fp8:
        own = linear.linear_narrow if case.columns <= linear.NARROW else linear.linear_few
        return lambda i: torch.mm(x, weights[i].T), lambda i: own(x, weights[i], x.dtype)
    value, scale = quantise_rows(x)

    def peer(i: int) -> torch.Tensor:
        weight, scales = weights[i]
        return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            value, weight.T, scale_a=scale[:, None], scale_b=scales[None],
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    return peer, lambda i: linear.linear_few(value, weights[i][0], x.dtype, (scale, weights[i][1]))


def clock(call: Callable[[int], Any], copies: int) -> float:
    """Microseconds a call, the least of five replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(copies):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(2 * copies):
            call(index % copies)
    graph.replay()
    times = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return round(1e3 * min(times) / (2 * copies), 2)


if __name__ == "__main__":
    main()
