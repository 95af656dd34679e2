"""Collectives between the processes of one job: what `calibrate` does under torchrun.

Sizes are those of the simulator: the whole buffer of one rank (gathered, or before scattering).
The slowest rank's time counts.
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


def collectives(device: torch.device, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    """Measure every collective; the same list on all ranks.

    An operation the backend lacks is left out and named.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    found: list[dict[str, Any]] = []
    for name, operation in _OPERATIONS.items():
        try:
            for num_bytes in sizes:
                seconds = _slowest(_timed(operation, num_bytes, device), device)
                found.append({"name": name, "ranks": world(), "bytes": num_bytes, "s": seconds})
        except RuntimeError as error:
            say(f"{name} is not measured: {str(error).splitlines()[0]}")
    return found


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


def _all_reduce(whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> None:
    distributed.all_reduce(whole)


def _all_gather(whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> None:
    distributed.all_gather_into_tensor(whole, part)


def _reduce_scatter(whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> None:
    distributed.reduce_scatter_tensor(part, whole)


def _all_to_all(whole: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> None:
    distributed.all_to_all_single(out, whole)


_OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
}


def _timed(
    operation: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    num_bytes: int,
    device: torch.device,
) -> float:
    count = num_bytes // 2 // world() * world()
    whole = torch.zeros(count, device=device, dtype=torch.bfloat16)
    part, out = torch.zeros_like(whole[: count // world()]), torch.zeros_like(whole)
    repeat = 20 if num_bytes < 2**24 else 3

    def calls() -> None:
        for _ in range(repeat):
            operation(whole, part, out)

    calls()
    distributed.barrier()
    if device.type == "cuda":
        return event_s(calls, runs=5) / repeat
    start_s = time.perf_counter()
    calls()
    return (time.perf_counter() - start_s) / repeat


def _slowest(seconds: float, device: torch.device) -> float:
    kept = torch.tensor([seconds], device=device)
    distributed.all_reduce(kept, op=distributed.ReduceOp.MAX)
    return float(kept.item())
