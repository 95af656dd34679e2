"""Published training speeds (Megatron, DeepSeek-V3), and what an uneven router costs there.

One constant a framework, `scale`, is fitted on a quarter of its rows (chosen by a hash of their
names) and scored on the others. The ratios of forced
balance over dropless need no scale: the router's skew is fitted on the shortest sequences and the
rest follows from how the experts' share of a step shrinks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from mogul.simulate.routing import Routing
from mogul.simulate.train import TrainPrediction, predict_training
from mogul.simulate.train_plan import TrainPlan
from mogul.simulate.validate.published import load, model
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme


@dataclass(frozen=True)
class TrainingRow:
    """Measured and predicted speed of one published run, in the unit it was printed in."""

    name: str
    measured: float
    zero_shot: float
    fitted: float
    is_for_fitting: bool
    note: str


def _prediction(
    row: dict[str, Any], scale: float, routing: Routing | None = None
) -> TrainPrediction:
    return predict_training(
        model(row["model"]),
        hardware(row["device"]),
        Parallel(**row["parallel"]),
        TrainPlan(**row["plan"], scale=scale),
        quant=QuantScheme(**row.get("quant", {})),
        routing=routing,
    )


def _speed(row: dict[str, Any], scale: float) -> tuple[float, float]:
    """(measured, predicted)."""
    one = _prediction(row, scale)
    if "measured_tflops" in row:
        return float(row["measured_tflops"]), one.flop_per_s_per_device / 1e12
    if "measured_step_s" in row:
        measured = one.tokens / one.plan.devices / row["measured_step_s"]
        return measured, one.tokens_per_s_per_device
    return float(row["measured_tokens_per_s"]), one.tokens_per_s_per_device


def is_for_fitting(name: str) -> bool:
    """Whether a row belongs to the quarter a framework's constant is fitted on."""
    return hashlib.sha256(name.encode()).digest()[0] < 64


def fit_scale(rows: list[dict[str, Any]]) -> float:
    """The scale at which the errors of the rows cancel (bisection in the logarithm)."""
    low, high = 0.4, 4.0
    for _ in range(20):
        middle = float(np.sqrt(low * high))
        errors = [np.log(np.divide(*_speed(row, middle))) for row in rows]
        low, high = (low, middle) if np.mean(errors) > 0 else (middle, high)
    return float(np.sqrt(low * high))


def training_rows() -> tuple[list[TrainingRow], dict[str, float]]:
    """All rows, and the constant of each framework that has rows to fit and rows to score."""
    rows = load("training")["row"]
    scales: dict[str, float] = {}
    for framework in {row["framework"] for row in rows}:
        mine = [row for row in rows if row["framework"] == framework]
        chosen = [row for row in mine if is_for_fitting(row["name"])]
        if chosen and len(chosen) < len(mine):
            scales[framework] = fit_scale(chosen)
    found = []
    for row in rows:
        measured, plain = _speed(row, 1.0)
        scale = scales.get(row["framework"], 1.0)
        is_fitted = row["framework"] in scales and is_for_fitting(row["name"])
        note = row.get("note", "")
        fitted = _speed(row, scale)[1]
        found.append(TrainingRow(row["name"], measured, plain, fitted, is_fitted, note))
    return found, scales


def balance_ratios() -> list[tuple[int, float, float, bool]]:
    """Forced balance over dropless: (sequence tokens, measured, predicted, fitted)."""
    data = load("training")
    chosen = data["long_context"]
    by_length = {row["plan"].get("sequence_tokens"): row for row in data["row"]}
    rows = [by_length[length] for length in chosen["rows"]]
    forced = [row["measured_tflops"] for row in rows]
    measured = np.divide(forced, chosen["dropless_tflops"])
    low, high = 1.0, 4.0
    for _ in range(16):
        spread = (low + high) / 2
        low, high = (spread, high) if _ratio(rows[0], spread) < measured[0] else (low, spread)
    return [
        (row["plan"]["sequence_tokens"], float(value), _ratio(row, low), index == 0)
        for index, (row, value) in enumerate(zip(rows, measured, strict=True))
    ]


def _ratio(row: dict[str, Any], spread: float) -> float:
    """Step time with the skew over that with balance forced."""
    skewed = row | {"plan": row["plan"] | {"is_balanced": False}}
    uneven = _prediction(skewed, 1.0, Routing(spread=spread))
    return uneven.step_s / _prediction(row, 1.0).step_s
