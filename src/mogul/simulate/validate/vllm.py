"""vLLM's nine measured decode steps: one constant fitted on one table, scored on the other.

Two points are cliffs of the default kernel configuration (a larger batch runs faster, or another
tile file halves the time): no model of the hardware explains them, so they are named and scored
apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mogul.simulate.engines import engine
from mogul.simulate.run import Setting, predict
from mogul.simulate.validate.published import load, model
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload


@dataclass(frozen=True)
class Point:
    """One measured step."""

    table: str
    batch: int
    measured_s: float
    zero_shot_s: float
    fitted_s: float
    is_cliff: bool


def points() -> list[Point]:
    """All nine points, each scaled by the constant of the other table."""
    tables = load("vllm")
    plain = {name: _predict(table) for name, table in tables.items()}
    scale = {name: _scale(table, plain[name]) for name, table in tables.items()}
    found = []
    for name, table in tables.items():
        other = next(key for key in tables if key != name)
        for index, batch in enumerate(table["batch"]):
            seconds = float(plain[name][index])
            measured_s = table["measured_ms"][index] * 1e-3
            is_cliff = batch in table["cliffs"]
            found.append(Point(name, batch, measured_s, seconds, scale[other] * seconds, is_cliff))
    return found


def _scale(table: dict[str, Any], predicted: np.ndarray) -> float:
    """Median of measured over predicted, cliffs left out."""
    keep = ~np.isin(table["batch"], table["cliffs"])
    return float(np.median((np.array(table["measured_ms"]) * 1e-3 / predicted)[keep]))


def _predict(table: dict[str, Any]) -> np.ndarray:
    setting = Setting(
        _model(table),
        hardware(table["device"]),
        quant=QuantScheme(**table["quant"]),
        engine=engine("vllm"),
    )
    loads = (
        Workload(
            input_tokens=table["input_tokens"], output_tokens=32, batch=batch, arrival="together"
        )
        for batch in table["batch"]
    )
    return np.array([predict(setting, load, check_memory=False).tpot_s for load in loads])


def _model(table: dict[str, Any]) -> ModelSpec:
    shape = model(table["model"])
    if not table.get("free_routing"):
        return shape
    assert shape.moe is not None
    free = shape.moe.grouping.replace(num_groups=1)
    return shape.replace(moe=shape.moe.replace(grouping=free))
