"""Time calls that several ranks make together: on a GPU by events and in a graph, else by the wall.

All ranks make the same number of calls, as calls contain collectives; a number is the median of
rounds, and what is reported is the slowest rank's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from mogul.parallel.move import gather_into

Call = Callable[[], Any]
ROUNDS = 5


@dataclass(frozen=True)
class Clock:
    """Times calls on one device."""

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether calls are queued."""
        return self.device.type != "cpu"

    def sync(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.accelerator.synchronize()

    def line_up(self) -> None:
        """Wait for the device and for all ranks."""
        self.sync()
        dist.barrier()
        self.sync()

    def most(self, value: float) -> float:
        """The largest over the ranks."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return float(found)

    def of_all(self, value: float) -> list[float]:
        """The value of every rank."""
        found = [torch.zeros(1, dtype=torch.float64, device=self.device) for _ in range(_size())]
        dist.all_gather(found, torch.tensor([value], dtype=torch.float64, device=self.device))
        return [float(one) for one in found]

    def own_s(self, call: Call, budget_s: float, *, busy: bool = False) -> float:
        """Median seconds of a call on this rank; every rank makes equally many.

        `busy`: on a processor count what this thread computed, not what it waited; for calls
        without collectives on a machine that is shared.
        """
        for _ in range(2):
            call()
        self.line_up()
        start = time.perf_counter()
        call()
        self.sync()
        once = self.most(time.perf_counter() - start)
        count = int(max(1, min(40, budget_s / ROUNDS / max(once, 1e-6))))
        rounds = []
        for _ in range(ROUNDS):
            self.line_up()
            rounds.append(self._round(call, count, busy))
        return median(rounds)

    def _round(self, call: Call, count: int, busy: bool) -> float:
        if not self.on_gpu:
            now = time.thread_time if busy else time.perf_counter
            start = now()
            for _ in range(count):
                call()
            return (now() - start) / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            call()
        last.record()
        self.sync()
        return first.elapsed_time(last) / 1e3 / count

    @contextmanager
    def captured(self, call: Call) -> Any:
        """A call that replays `call` as one graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.line_up()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        self.line_up()
        yield graph.replay
        self.line_up()
        del graph


def _size() -> int:
    return dist.get_world_size()


@dataclass(frozen=True)
class Link:
    """What the devices reached among themselves in this run."""

    bytes_per_s: float
    """Bytes a rank sends (and receives) in large gathers over their time."""
    latency_s: float
    """Time of the smallest gather."""


def measure_link(clock: Clock, large_bytes: int) -> Link:
    """Time a large and a small all-gather."""
    size = _size()
    if size == 1:
        return Link(float("inf"), 0.0)

    def gather(num_bytes: int) -> Call:
        part = torch.zeros(max(1, num_bytes // size), dtype=torch.uint8, device=clock.device)
        out = torch.empty(part.numel() * size, dtype=torch.uint8, device=clock.device)
        return lambda: gather_into(out, part)

    large_s = clock.most(clock.own_s(gather(large_bytes), 0.2))
    small_s = clock.most(clock.own_s(gather(64), 0.1))
    return Link(large_bytes * (size - 1) / size / large_s, small_s)


def best_s(clock: Clock, call: Call, budget_s: float, *, graph: bool) -> dict[str, Any]:
    """The slowest rank's time in a graph (`graph_s`), or called where there is none."""
    row: dict[str, Any] = {}
    if graph:
        try:
            with clock.captured(call) as replay:
                row["graph_s"] = clock.most(clock.own_s(replay, budget_s))
        except RuntimeError as error:
            row["graph_failed"] = str(error)[:300]
    if "graph_s" not in row:
        row["called_s"] = clock.most(clock.own_s(call, budget_s))
    return row


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def host_waits(call: Call, *, profiled: bool = True) -> dict[str, Any]:
    """Times that the host waits for the GPU in ten calls by torch's profiler, and torch's own word.

    `is_sync_free`: one call under torch's debug mode in which a waiting operator is an error.
    """
    found: dict[str, Any] = {"is_sync_free": True}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        found |= {"is_sync_free": False, "sync": str(error)[:120]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not (profiled and found["is_sync_free"]):
        return found
    try:
        found["host_waits"] = _profiled(call, 10) - _profiled(call, 0)
    except RuntimeError as error:
        found["profiler"] = str(error)[:120]
    return found


def _profiled(call: Call, calls: int) -> int:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(calls):
            call()
    return sum(event.count for event in profile.key_averages() if event.key in WAITS)


def kernels_of(call: Call, most: int = 30) -> list[tuple[str, int, float]]:
    """(name, launches, seconds) of the kernels of one call that take the longest together."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = [
        (event.key[:90], event.count, event.self_device_time_total / 1e6)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda one: -one[2])[:most]
