"""Published training speeds (Megatron, DeepSeek-V3), and what an uneven router costs there.

One constant, the framework's `scale`, is fitted on the rows marked `fitted`. The ratios of forced
balance over dropless need no scale: the router's skew is fitted on the shortest sequences and the
rest follows from how the experts' share of a step shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mogul.simulate.routing import Routing
from mogul.simulate.train import TrainPlan, TrainPrediction, predict_training
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


def _prediction(row: dict[str, Any], scale: float) -> TrainPrediction:
    return predict_training(
        model(row["model"]),
        hardware(row["device"]),
        Parallel(**row["parallel"]),
        TrainPlan(**row["plan"], scale=scale),
        quant=QuantScheme(**row.get("quant", {})),
    )


def _speed(row: dict[str, Any], scale: float) -> tuple[float, float]:
    """(measured, predicted)."""
    one = _prediction(row, scale)
    if "measured_tflops" in row:
        return float(row["measured_tflops"]), one.flop_per_s_per_device / 1e12
    return float(row["measured_tokens_per_s"]), one.tokens_per_s_per_device


def fit_scale(rows: list[dict[str, Any]]) -> float:
    """The scale at which the fitted rows' errors cancel (bisection in the logarithm)."""
    low, high = 0.5, 4.0
    for _ in range(20):
        middle = float(np.sqrt(low * high))
        errors = [np.log(np.divide(*_speed(row, middle))) for row in rows if row.get("fitted")]
        low, high = (low, middle) if np.mean(errors) > 0 else (middle, high)
    return float(np.sqrt(low * high))


def training_rows() -> tuple[list[TrainingRow], float]:
    """All rows and the fitted scale."""
    rows = load("training")["row"]
    scale = fit_scale(rows)
    found = []
    for row in rows:
        measured, plain = _speed(row, 1.0)
        fitted = _speed(row, scale)[1]
        note = row.get("note", "")
        found.append(
            TrainingRow(row["name"], measured, plain, fitted, row.get("fitted", False), note)
        )
    return found, scale


def balance_ratios() -> list[tuple[int, float, float, bool]]:
    """Forced balance over dropless: (sequence tokens, measured, predicted, fitted)."""
    data = load("training")["long_context"]
    measured = np.divide(data["forced_tflops"], data["dropless_tflops"])
    lengths = data["sequence_tokens"]
    low, high = 1.0, 4.0
    for _ in range(16):
        spread = (low + high) / 2
        low, high = (
            (spread, high) if _ratio(data, lengths[0], spread) < measured[0] else (low, spread)
        )
    return [
        (length, float(value), _ratio(data, length, low), index == 0)
        for index, (length, value) in enumerate(zip(lengths, measured, strict=True))
    ]


def _ratio(data: dict[str, Any], sequence_tokens: int, spread: float) -> float:
    plan = TrainPlan(
        devices=256,
        global_batch=512,
        sequence_tokens=sequence_tokens,
        virtual_stages=4,
        recompute="experts",
    )

    def step_s(routing: Routing, is_balanced: bool) -> float:
        return predict_training(
            model(data["model"]),
            hardware(data["device"]),
            Parallel(**data["parallel"]),
            plan.replace(is_balanced=is_balanced),
            routing=routing,
        ).step_s

    return step_s(Routing(spread=spread), False) / step_s(Routing(), True)
