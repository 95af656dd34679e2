"""Published serving numbers: Pangu Pro MoE on Ascend, DeepSeek on H800, H100 and CloudMatrix.

Each row is data with its source (`data/*.toml`); what the source leaves open is said there. Rows
marked `fitted` shaped the constants of their machine and prove nothing.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from mogul.simulate.engines import Engine, Overlap, engine
from mogul.simulate.routing import Routing
from mogul.simulate.run import Prediction, Setting, predict
from mogul.spec import presets
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme, scheme
from mogul.spec.workload import Speculation, Workload

DATA = Path(__file__).parent / "data"

_DENSE = {
    # Shapes inferred from the printed savings in cache and communication: like the dense models
    # of 32 and 72 billion parameters of the Qwen2.5 family.
    "dense-32b": (64, 5120, 40, 27648),
    "dense-72b": (80, 8192, 64, 29568),
}


def load(name: str) -> dict[str, Any]:
    """Read one data file of this folder."""
    return tomllib.loads((DATA / f"{name}.toml").read_text(encoding="utf-8"))


@cache
def model(name: str) -> ModelSpec:
    """A preset, or one of the dense models of the Pangu tables."""
    if name not in _DENSE:
        return model_spec(presets.config(name))
    layers, hidden, heads, width = _DENSE[name]
    return model_spec(
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "intermediate_size": width,
        }
    )


@dataclass(frozen=True)
class Row:
    """One published number."""

    name: str
    device: str
    model: str
    stage: str
    layout: Parallel
    batch: int
    measured_s: float
    is_fitted: bool = False


def pangu_rows() -> list[Row]:
    """Tables 5 to 7 of arXiv 2505.21411."""
    return [
        Row(
            one["name"],
            one["device"],
            one["model"],
            one["stage"],
            Parallel(**one["parallel"]),
            one["batch"],
            one["measured_ms"] * 1e-3,
            one.get("fitted", False),
        )
        for one in load("pangu")["row"]
    ]


def pangu_prediction(row: Row, speculation: Speculation | None = None) -> Prediction:
    """Price a row of the Pangu tables; the 300I Duo's chips in the paper's hybrid layout."""
    setting = Setting(
        model(row.model),
        hardware(row.device),
        row.layout,
        scheme("w8a8-kv8"),
        Routing(),
        engine("ascend"),
    )
    workload = Workload(
        input_tokens=2048,
        output_tokens=1,
        batch=row.batch,
        prefill_batch=row.batch // row.layout.dp if row.stage == "prefill" else 1,
        arrival="together",
        speculation=speculation,
    )
    return predict(setting, workload, check_memory=False)


def predict_row(row: Row) -> float:
    """Seconds of a row: the prompt step or the decode step."""
    one = pangu_prediction(row)
    return one.prefill.seconds if row.stage == "prefill" else one.tpot_s


def dense_ratios() -> dict[str, tuple[float, float]]:
    """Decode rate of the MoGE over the dense models' at the printed batches: (paper, predicted)."""
    rows = {row.name: row for row in pangu_rows()}
    rate = {
        name: rows[name].batch / predict_row(rows[name])
        for name in ("moge-decode-456", "32b-decode-336", "72b-decode-228")
    }
    moge = rate["moge-decode-456"]
    return {
        "dense 32B": (1.18, moge / rate["32b-decode-336"]),
        "dense 72B": (1.97, moge / rate["72b-decode-228"]),
    }


def implied_acceptance() -> dict[str, dict[str, float]]:
    """What the rows with drafts say of them, at one draft token a step, by row without drafts.

    They print the time of an emitted token; the step that verifies two tokens a request is
    predicted, and the acceptance follows.
    """
    plain = {row.name: row for row in pangu_rows()}
    found = {}
    for one in load("pangu")["drafts"]:
        row = replace(plain[one["plain"]], batch=one["batch"])
        step_s = pangu_prediction(row, Speculation(draft_tokens=1, acceptance=0.0)).tpot_s
        step_s *= row.measured_s / predict_row(plain[one["plain"]])
        tokens = step_s / (one["measured_ms"] * 1e-3)
        told = {"verify_step_s": step_s, "tokens_per_step": tokens, "acceptance": tokens - 1}
        found[one["rates"]] = told
    return found


def deployment(row: dict[str, Any]) -> Prediction:
    """Price one row of `data/deployments.toml`."""
    options = dict(row.get("engine", {}))
    base = engine(options.pop("name", "sglang"))
    overlap = Overlap(**options.pop("overlap", {}))
    chosen: Engine = base.replace(overlap=overlap, **options)
    setting = Setting(
        model(row["model"]),
        hardware(row["device"]),
        Parallel(**row["parallel"]),
        QuantScheme(**row["quant"]),
        Routing(**row.get("routing", {})),
        chosen,
    )
    return predict(setting, Workload(**row["workload"]), check_memory=False)


def deployment_rows() -> list[tuple[dict[str, Any], float]]:
    """Rows of `data/deployments.toml` with predicted tokens/s a device."""
    return [(row, _rate(row, 1.0)) for row in load("deployments")["row"]]


def batch_behind(row: dict[str, Any]) -> tuple[int, float]:
    """(requests a device, tokens/s there): the power of two that comes nearest to a printed speed.

    For rows that print a speed and no batch: nothing to score, but whether it can be reached.
    """
    ranks = Parallel(**row["parallel"]).dp
    tried = []
    for batch in (32, 64, 128, 256, 512, 1024):
        workload = row["workload"] | {"batch": batch * ranks}
        tried.append((batch, _rate(row | {"workload": workload}, 1.0)))
    return min(tried, key=lambda one: abs(one[1] / row["measured"] - 1))


def _rate(row: dict[str, Any], spread: float) -> float:
    one = deployment({**row, "routing": {"spread": spread}})
    devices = one.setting.parallel.devices
    if row["stage"] == "decode":
        return one.tokens_per_s_per_device
    tokens = one.workload.prefill_batch * one.workload.input_tokens * one.setting.parallel.dp
    return tokens / one.prefill.seconds / devices


def perfect_balance() -> list[tuple[str, float, float, bool]]:
    """Perfect over default balance: (row, paper, predicted, fitted); one skew fits the first."""
    data = load("deployments")
    rows = {row["name"]: row for row in data["row"]}
    facts = data["perfect_balance"]
    first, second = rows[facts["fitted_row"]], rows[facts["predicted_row"]]

    def ratio(row: dict[str, Any], spread: float) -> float:
        return _rate(row, 1.0) / _rate(row, spread)

    low, high = 1.0, 4.0
    for _ in range(16):
        middle = (low + high) / 2
        is_low = ratio(first, middle) < facts["fitted_ratio"]
        low, high = (middle, high) if is_low else (low, middle)
    return [
        (first["name"], facts["fitted_ratio"], ratio(first, low), True),
        (second["name"], facts["predicted_ratio"], ratio(second, low), False),
    ]
