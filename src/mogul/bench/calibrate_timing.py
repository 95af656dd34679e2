"""How `calibrate` takes times: graphs on a GPU, the clock on a CPU; launches, copies, versions."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mogul.bench import ledger

RUNS = 10


def seconds_of(call: Callable[[int], object], copies: int, device: torch.device) -> float:
    """Median time of a call over rotated inputs; a graph of them on a GPU."""
    for index in range(min(copies, 3)):
        call(index)
    if device.type == "cuda":
        return _graph_s(call, copies)
    times = []
    start_s = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start_s < 0.05 and len(times) < 100):
        before = time.perf_counter()
        call(len(times) % copies)
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def _graph_s(call: Callable[[int], object], copies: int) -> float:
    """Time a call inside one graph of `copies` calls; what cannot be captured runs as it is."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for index in range(copies):
                call(index)
        replay: Callable[[], object] = graph.replay
    except RuntimeError:
        replay = lambda: [call(index) for index in range(copies)]  # noqa: E731

    return event_s(replay) / copies


def event_s(call: Callable[[], object], runs: int = RUNS) -> float:
    """Median time of a call between two events of the device."""
    times = []
    for _ in range(runs + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return sorted(times[2:])[runs // 2]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy, inside a graph or not: the faster."""
    count = 2**30 if device.type != "cpu" else 2**25
    source = torch.empty(count, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def copy(_: int = 0) -> torch.Tensor:
        return target.copy_(source)

    seconds = seconds_of(copy, 1, device)
    if device.type == "cuda":  # a graph's copy may take another path
        seconds = min(seconds, event_s(copy))
    return 2 * count / seconds


def launch_s(device: torch.device) -> float:
    """Host time to launch one small kernel without a graph."""
    x = torch.zeros(8, device=device)
    for _ in range(100):
        x.add_(1)
    _wait(device)
    start_s = time.perf_counter()
    for _ in range(1000):
        x.add_(1)
    return (time.perf_counter() - start_s) / 1000


def graph_launch_s(device: torch.device) -> float | None:
    """Time a small kernel takes inside a graph; None without graphs."""
    if device.type != "cuda":
        return None
    x = torch.zeros(8, device=device)
    return seconds_of(lambda _: x.add_(1), 200, device)


def eager_kernel_s(device: torch.device) -> float | None:
    """Host time a kernel of an eager forward and backward through modules; None on a CPU.

    A gated layer of tiny width: the device never keeps the host waiting.
    """
    if device.type == "cpu":
        return None
    layers = nn.ModuleList(_Gated(64) for _ in range(20)).to(device)

    def step() -> None:
        x = torch.zeros(4, 64, device=device)
        for layer in layers:
            x = layer(x)
        x.sum().backward()

    for _ in range(3):
        step()
    _wait(device)
    start_s = time.perf_counter()
    for _ in range(10):
        step()
    seconds = (time.perf_counter() - start_s) / 10
    _wait(device)
    return seconds / _num_kernels(step)


class _Gated(nn.Module):
    """A norm, a gated layer and a residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.down = nn.Linear(width, width, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(inner)) * self.up(inner))


def _num_kernels(step: Callable[[], None]) -> int:
    kinds = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        step()
        torch.accelerator.synchronize()
    events = profile.events() or []
    return max(1, sum(str(event.device_type).endswith("CUDA") for event in events))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def versions(device: torch.device) -> dict[str, str]:
    """What the numbers depend on beside the device."""
    found = {"torch": torch.__version__, "cpu": ledger.cpu_name()}
    if device.type == "cuda":
        from torch.cuda import nccl

        found["cuda"] = str(torch.version.cuda)
        multicast = "" if os.environ.get("NCCL_NVLS_ENABLE", "1") != "0" else " without multicast"
        found["nccl"] = ".".join(map(str, nccl.version())) + multicast
        found["driver"] = _driver()
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    return ledger.cpu_name()


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text)
    return found[1] if found else "unknown"
