"""Shapes, inputs, timing and reference for the device scripts of this folder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "A": (5120, 1344, 64, 8, 8),
    "B": (5120, 1344, 64, 8, 1),
    "C": (2048, 768, 128, 8, 1),
    "D": (1536, 256, 128, 8, 1),
}
"""Width, inner, experts, picks, groups: Pangu Pro MoE, it ungrouped, Qwen3-30B-A3B, fine ones."""


@dataclass
class Case:
    """Weights of one shape."""

    name: str
    gate_up: Tensor
    down: Tensor
    groups: int
    generator: torch.Generator

    @property
    def dims(self) -> tuple[int, int, int]:
        """Experts, width, inner width."""
        return self.down.shape[0], self.down.shape[1], self.down.shape[2]

    @property
    def picks(self) -> int:
        """Picks a token."""
        return SHAPES[self.name][3]


def make_case(name: str, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Case:
    """Normal weights of deviation 0.02, or meta tensors."""
    width, inner, experts, _, groups = SHAPES[name]
    gate_up = torch.empty(experts, 2 * inner, width, device=device, dtype=dtype)
    down = torch.empty(experts, width, inner, device=device, dtype=dtype)
    generator = torch.Generator("cpu" if device == "meta" else device).manual_seed(1)
    if device != "meta":
        gate_up.normal_(0, 0.02, generator=generator)
        down.normal_(0, 0.02, generator=generator)
    return Case(name, gate_up, down, groups, generator)


def make_tokens(case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids, weights of one random batch: picks of a random router, weights summing to one."""
    experts, width, _ = case.dims
    if case.down.is_meta:
        ids = torch.empty(tokens, case.picks, dtype=torch.int64, device="meta")
        x = torch.empty(tokens, width, dtype=case.down.dtype, device="meta")
        return x, ids, torch.empty(tokens, case.picks, device="meta")
    device = case.down.device
    x = torch.randn(tokens, width, device=device, dtype=case.down.dtype, generator=case.generator)
    p = torch.randn(tokens, experts, device=device, generator=case.generator).softmax(-1)
    if case.groups > 1:
        value, place = p.view(tokens, case.groups, -1).max(-1)
        ids = place + torch.arange(case.groups, device=device) * (experts // case.groups)
    else:
        value, ids = p.topk(case.picks, -1)
    return x, ids, value / value.sum(-1, keepdim=True)


def rel(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; NaN counts as infinite."""
    error = ((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def reference(case: Case, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """fp32 output of the given tokens; differentiable in x and weights."""
    experts, _, inner = case.dims
    out = torch.zeros_like(x)
    for e in range(experts):
        t, k = (ids == e).nonzero(as_tuple=True)
        if len(t):
            h = x[t] @ case.gate_up[e].float().T
            y = (F.silu(h[:, :inner]) * h[:, inner:]) @ case.down[e].float().T
            out = out.index_add(0, t, y * weights[t, k, None])
    return out


def time_events(calls: list[Callable[[], object]], seconds: float = 0.1, most: int = 40) -> float:
    """Median milliseconds of one call, with device events."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    count = int(max(5, min(most, seconds / max(time.perf_counter() - start, 1e-5))))
    pairs = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for i, (a, b) in enumerate(pairs):
        a.record()
        calls[i % len(calls)]()
        b.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def time_graph(calls: list[Callable[[], object]], repeats: int = 15, rounds: int = 1) -> float:
    """Median milliseconds of one call inside a CUDA graph of all calls (`rounds` times over)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) / (len(calls) * rounds))
    del graph
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """bf16 matrix product in TFLOP/s and copy in TB/s (read + write), measured now."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    matmul = 2 * 8192**3 / time_events([lambda: a @ b], 0.3) / 1e9
    source = torch.empty(1 << 31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / time_events([lambda: target.copy_(source)], 0.3) / 1e9
    return {"tflop_per_s": matmul, "tb_per_s": copy}


def floor_ms(name: str, tokens: int, peak: dict[str, float], weight_bytes: int = 2) -> float:
    """Forward floor: the larger of arithmetic and bytes, with the expected distinct experts.

    Weights of one byte also have twice the arithmetic.
    """
    width, inner, experts, picks, _ = SHAPES[name]
    flop = 3 * weight_bytes * tokens * picks * width * inner
    distinct = experts * (1 - (1 - picks / experts) ** tokens)
    size = distinct * 3 * weight_bytes * width * inner + tokens * width * 4 + 12 * tokens * picks
    return max(flop / peak["tflop_per_s"] / 1e9, size / peak["tb_per_s"] / 1e9)


def train_floor_ms(name: str, tokens: int, peak: dict[str, float]) -> float:
    """Forward + backward floor: arithmetic only."""
    width, inner, _, picks, _ = SHAPES[name]
    return 18 * tokens * picks * width * inner / peak["tflop_per_s"] / 1e9
