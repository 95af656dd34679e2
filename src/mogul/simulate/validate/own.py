"""mogul's own engine and training: steps measured whole, predicted zero-shot.

The kernels below a prediction were measured apart from the engine, in other runs. Of the engine's
own times one profile counts: how much of a step its host does not hide. Training takes what every
framework's training takes; nothing of it was fitted on these runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mogul.simulate.engines import engine
from mogul.simulate.run import Prediction, Setting, predict
from mogul.simulate.train import predict_training
from mogul.simulate.train_plan import TrainPlan
from mogul.simulate.validate.published import load, model
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload


@dataclass(frozen=True)
class Step:
    """One measured step."""

    name: str
    measured_s: float
    predicted_s: float
    tier: str
    note: str = ""
    """Why it is not scored; empty where it is."""


def steps() -> list[Step]:
    """All measured steps of `data/own.toml`."""
    found = []
    for run in load("own")["run"]:
        for batch, measured_ms in zip(run["batch"], run["step_ms"], strict=True):
            point = _predict(run, batch)
            name = f"{run['name']}, decode {batch}"
            note = "set the host's share" if batch in run.get("fitted", ()) else ""
            found.append(Step(name, measured_ms * 1e-3, point.tpot_s, point.tier, note))
        for one in run.get("prompts", ()):
            alone = run | {"input_tokens": one.get("input_tokens", run["input_tokens"])}
            point = _predict(alone, one["batch"])
            tokens = one["batch"] * alone["input_tokens"]
            name = f"{run['name']}, prompts {tokens}"
            measured_s = one["ms"] * 1e-3 if "ms" in one else tokens / one["tokens_per_s"]
            note = one.get("note", "")
            found.append(Step(name, measured_s, point.prefill.seconds, point.tier, note))
    return found


@dataclass(frozen=True)
class TrainingStep:
    """One measured training step and the most memory it held."""

    name: str
    measured_s: float
    predicted_s: float
    measured_bytes: float
    predicted_bytes: float


def training_steps() -> list[TrainingStep]:
    """All measured training steps of `data/own.toml`."""
    found = []
    for run in load("own")["training"]:
        plan = TrainPlan(devices=1, graphs="full", recompute="none", **run["plan"])
        one = predict_training(_model(run), hardware(run["device"]), Parallel(), plan)
        measured = run["step_ms"] * 1e-3, run["memory_gib"] * 2**30
        memory = one.memory.total_bytes
        found.append(TrainingStep(run["name"], measured[0], one.step_s, measured[1], memory))
    return found


def _model(run: dict[str, Any]) -> ModelSpec:
    if "config" not in run:
        return model(run["model"])
    whole = presets.config(run["model"]) if "model" in run else {}
    return model_spec(whole | run["config"])


def _predict(run: dict[str, Any], batch: int) -> Prediction:
    setting = Setting(
        _model(run),
        hardware(run["device"]),
        Parallel(**run.get("parallel", {})),
        QuantScheme(**run["quant"]),
        engine=engine("mogul").replace(**run.get("engine", {})),
    )
    load_ = Workload(
        input_tokens=run["input_tokens"],
        output_tokens=run["output_tokens"],
        batch=batch,
        prefill_batch=batch,
        arrival="together",
    )
    return predict(setting, load_, check_memory=False)
