"""Collectives between the processes of one job: what `calibrate` does under torchrun.

Sizes are those of the simulator: the whole buffer of one rank (gathered, or before scattering).
On GPUs 20 calls run as one graph, as in a captured step, so the host's launches don't count. With
4 or 8 processes groups of 2 and 4 are measured too, all at once. The slowest rank's time counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from mogul.bench.calibrate_timing import event_s
from mogul.core.log import say

SIZES = tuple(2**power for power in range(12, 30, 2))
LARGE = 2**24
"""Bytes from which 3 calls are enough."""

Operation = Callable[[torch.Tensor, torch.Tensor, Any], object]
"""Runs on the whole buffer and an output of its size, in a group."""


def collectives(device: torch.device, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Measure every collective; the same list on all ranks.

    An operation the backend lacks is left out and named.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    found: list[dict[str, Any]] = []
    for ranks in group_sizes(world()):
        group = _own_group(ranks)
        for name, operation in _OPERATIONS.items():
            try:
                for num_bytes in sizes:
                    seconds = _slowest(_timed(operation, num_bytes, device, ranks, group), device)
                    found.append({"name": name, "ranks": ranks, "bytes": num_bytes, "s": seconds})
            except RuntimeError as error:
                say(f"{name} is not measured: {str(error).splitlines()[0]}")
    return found


def group_sizes(processes: int) -> list[int]:
    """Powers of two that cut the processes into equal groups, and all of them."""
    powers = {2**power for power in range(1, 10) if processes % 2**power == 0}
    return sorted(powers | {processes})


def _own_group(ranks: int) -> Any:
    """The group of neighbours this rank is in; every rank makes all of them."""
    members = [range(first, first + ranks) for first in range(0, world(), ranks)]
    groups = [distributed.new_group(list(one)) for one in members]
    return groups[distributed.get_rank() // ranks]


def world() -> int:
    """Processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The accelerator of this process."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.accelerator.set_device_index(index)
    return torch.device(accelerator.type, index)


def _all_reduce(whole: torch.Tensor, out: torch.Tensor, group: Any) -> None:
    distributed.all_reduce(whole, group=group)


def _all_gather(whole: torch.Tensor, out: torch.Tensor, group: Any) -> None:
    part = out[: out.numel() // distributed.get_world_size(group)]
    distributed.all_gather_into_tensor(whole, part, group=group)


def _reduce_scatter(whole: torch.Tensor, out: torch.Tensor, group: Any) -> None:
    part = out[: out.numel() // distributed.get_world_size(group)]
    distributed.reduce_scatter_tensor(part, whole, group=group)


def _all_to_all(whole: torch.Tensor, out: torch.Tensor, group: Any) -> None:
    distributed.all_to_all_single(out, whole, group=group)


_OPERATIONS: dict[str, Operation] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def _timed(
    operation: Operation, num_bytes: int, device: torch.device, ranks: int, group: Any
) -> float:
    whole = torch.zeros(num_bytes // 2 // ranks * ranks, device=device, dtype=torch.bfloat16)
    out = torch.zeros_like(whole)
    repeat = 20 if num_bytes < LARGE else 3

    def calls() -> None:
        for _ in range(repeat):
            operation(whole, out, group)

    calls()
    distributed.barrier()
    if device.type == "cuda":
        replay = _captured(calls)
        distributed.barrier()
        return event_s(replay, runs=5) / repeat
    start_s = time.perf_counter()
    calls()
    return (time.perf_counter() - start_s) / repeat


def _captured(calls: Callable[[], None]) -> Callable[[], None]:
    """One graph of the calls, or the calls as they are where that fails."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            calls()
    except RuntimeError as error:
        say(f"not in a graph: {str(error).splitlines()[0]}")
        return calls
    return graph.replay


def _slowest(seconds: float, device: torch.device) -> float:
    kept = torch.tensor([seconds], device=device)
    distributed.all_reduce(kept, op=distributed.ReduceOp.MAX)
    return float(kept.item())
