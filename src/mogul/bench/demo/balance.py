"""Act 2, balance: what each device computes and reads when MoGE and twin decode.

A router sees one token at a time, so the picks at a position are the same whether that
token was decoded alone or stood in a longer prefill: the sequences are read once, and their last
positions are the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from mogul.bench.demo.cast import DemoSettings, Name
from mogul.bench.demo.cells import (
    Cell,
    decode_steps,
    device_counts,
    measure,
    spread_experts,
)
from mogul.core.log import progress
from mogul.observe.recorder import record_routing
from mogul.spec.balance import random_picks, rows_per_device
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows


@dataclass(frozen=True)
class BalanceResult:
    """Act 2."""

    cells: tuple[Cell, ...]
    """With the routers of step 0."""
    uniform: tuple[Cell, ...]
    """With picks drawn uniformly: the best a perfectly trained router could hope for."""
    example: dict[Name, list[list[float]]]
    """Rows of each device over the mean, [devices][steps], of one layer."""
    example_devices: int
    example_batch: int
    example_layer: int


def act_balance(models: dict[Name, Any], windows: Windows, settings: DemoSettings) -> BalanceResult:
    """Read the sequences once with each model and measure every cell."""
    cells, uniform, example = [], [], {}
    rng = np.random.default_rng(settings.seed)
    devices = max(settings.twin_grouping.num_experts, 1)
    batch = sorted(settings.batch_sizes)[len(settings.batch_sizes) // 2]
    layer = 0
    for name, model in models.items():
        grouping = settings.grouping_of(name)
        ids = picks_of(model, windows, description=f"act 2: {name} reads {len(windows)} sequences")
        ids = ids[:, :, -settings.decode_steps :]
        chance = random_picks(grouping, ids[..., 0].size, rng).reshape(ids.shape)
        for size in settings.batch_sizes:
            for num_devices in device_counts(name, settings):
                cells.append(measure(name, "random router", ids, size, num_devices, grouping))
                uniform.append(measure(name, "uniform", chance, size, num_devices, grouping))
        layer = len(ids) // 2
        example[name] = _example(ids[layer : layer + 1], batch, devices, grouping)
    return BalanceResult(tuple(cells), tuple(uniform), example, devices, batch, layer)


def picks_of(
    model: Any, windows: Windows, *, batch_size: int = 8, description: str
) -> Int[np.ndarray, "layers N L K"]:
    """Ids picked at every position of every window, by one prefill."""
    with torch.inference_mode(), record_routing(model) as recording:
        with progress(description, len(windows)) as bar:
            for first in range(0, len(windows), batch_size):
                rows = torch.from_numpy(windows.ids[first : first + batch_size])
                model.model(input_ids=rows, use_cache=False)
                bar.advance(len(rows))
        ids = recording.ids()
    return ids.reshape(len(ids), len(windows), windows.length, -1)


def _example(
    ids: Int[np.ndarray, "1 N steps K"], batch: int, num_devices: int, grouping: Grouping
) -> list[list[float]]:
    device_E = spread_experts(grouping, num_devices)
    rows = np.stack(
        [rows_per_device(ids_BK, device_E, num_devices) for ids_BK in decode_steps(ids, batch)]
    )
    return (rows / rows.mean(axis=1, keepdims=True)).T[:, :48].tolist()
