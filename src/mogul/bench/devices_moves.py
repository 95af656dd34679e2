"""The moves of a static dispatch alone: a gather and a scatter, by collectives and by a window."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mogul.bench.devices_clock import Call, Clock, best_s
from mogul.bench.devices_units import Bench
from mogul.core.errors import BackendError
from mogul.parallel.move import gather, scatter
from mogul.parallel.window import Window, open_window

ROWS = (8, 32, 228, 2048, 8192)
WIDTH = 5120


@torch.no_grad()
def measure_moves(bench: Bench, *, tiny: bool) -> None:
    """A row for every number of rows of a rank and every wire."""
    group = dist.group.WORLD
    assert group is not None
    wires: dict[str, Window | None] = {"collective": None}
    try:
        wires["window"] = open_window(group)
    except BackendError as refused:
        bench.put("moves", {"wire": "window", "refused": str(refused)})
    for rows in ROWS[:2] if tiny else ROWS:
        for wire, window in wires.items():
            found = _one(bench, rows, 64 if tiny else WIDTH, window)
            bench.put("moves", {"wire": wire, "rows": rows, **found})


def _one(bench: Bench, rows: int, width: int, window: Window | None) -> dict[str, Any]:
    clock, size = Clock(bench.world.device), bench.world.size
    dtype = torch.bfloat16 if clock.on_gpu else torch.float32
    own = torch.randn(rows, width, device=bench.world.device, dtype=dtype)
    many = torch.randn(size * rows, width, device=bench.world.device, dtype=dtype)
    group = dist.group.WORLD
    assert group is not None
    calls: dict[str, Call] = {
        "gather": lambda: gather(own, group, window),
        "scatter": lambda: scatter(many, group, window),
    }
    found: dict[str, Any] = {"bytes": (size - 1) * own.nbytes}
    for name, call in calls.items():
        once = best_s(clock, call, 0.02, graph=clock.on_gpu)
        found |= {f"{name}_{key}": value for key, value in once.items()}
    return found
