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
