"""AIConfigurator's sample of measured deployments: aggregated MoE rows, read from its wheel.

Some rows write `tpN epN` on N devices as N*N devices (a device count no node has); they are read
as N devices. Rows whose ranks cannot be laid out at all have no reading and count against
coverage. No measured TTFT or TPOT enters a prediction except through `fit_scales`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mogul.core.errors import ConfigError
from mogul.simulate import aiconfigurator
from mogul.simulate.approximate import spec_to_price
from mogul.simulate.calibration import with_aiconfigurator
from mogul.simulate.engines import engine
from mogul.simulate.routing import Routing
from mogul.simulate.run import P90, Prediction, Setting, predict
from mogul.spec.hardware import hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload

_DENSE = ("Llama", "Qwen3-32B")
_DEVICES = {theirs: ours for ours, theirs in aiconfigurator.DEVICES.items()}
_FORMATS = {"": "bf16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "fp4", "int4_wo": "int4"}
_CONFIGS = {
    "zhipuai/GLM-5": "zai-org--GLM-5",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-ai--DeepSeek-R1",
}

ROUTING = Routing()
"""Uniform: what a person knows before he has measured anything."""

FIT_SHARE = 0.2


@dataclass(frozen=True)
class Reading:
    """How one row is laid out."""

    tp: int
    dp: int
    moe_tp: int
    ep: int
    batch: int
    """Requests in flight over all copies."""


@dataclass(frozen=True)
class Scored:
    """One row, measured and predicted."""

    row_id: str
    backend: str
    measured_s: float
    predicted_s: float | None
    """None: not priced."""

    why_not: str = ""
    sigma: float = 0.0
    """Standard deviation of the prediction's logarithm."""

    @property
    def is_in_band(self) -> bool:
        """Whether the measurement lies within the prediction's p10 and p90."""
        if self.predicted_s is None:
            return False
        return abs(math.log(self.measured_s / self.predicted_s)) <= P90 * self.sigma

    @property
    def is_for_fitting(self) -> bool:
        """Whether the row belongs to the 20 % the constants are fitted on (by hash of its id)."""
        digest = hashlib.sha256(self.row_id.encode()).digest()
        return digest[0] / 256 < FIT_SHARE


def rows() -> list[dict[str, str]]:
    """Aggregated MoE rows, in the order of a hash of their ids."""
    path = aiconfigurator.require_wheel() / "systems" / "silicon_sample.csv"
    with path.open(encoding="utf-8") as file:
        found = [
            row
            for row in csv.DictReader(file)
            if row["mode"] == "agg" and not any(name in row["model_path"] for name in _DENSE)
        ]
    return sorted(found, key=lambda row: hashlib.sha1(row["id"].encode()).hexdigest())


def reading(row: Mapping[str, str]) -> Reading | None:
    """The layout a row means; None where its ranks do not fill its devices."""
    tp, dp = _int(row["tp_size"]), _int(row["attention_dp_size"])
    moe_tp, ep = _int(row["moe_tp_size"]), _int(row["moe_ep_size"])
    if dp == 0:
        dp = max(1, moe_tp * ep // max(tp, 1))
    if moe_tp == ep > 1 and tp * dp == moe_tp * ep:
        tp, dp, moe_tp = (1, ep, 1) if dp > 1 else (ep, 1, 1)
    elif tp == dp > 1 and ep == tp * dp:
        tp, ep = 1, tp
    if tp * dp != moe_tp * ep:
        return None
    told = re.search(r"concurrency=(\d+)", row["silicon_data_source"])
    batch = int(told[1]) if told else _int(row["batch_size"]) * dp
    return Reading(tp, dp, moe_tp, ep, max(batch, dp))


def _int(text: str) -> int:
    return int(float(text)) if text else 0


def score(row: Mapping[str, str]) -> Scored:
    """Predict one row."""
    measured_s = float(row["silicon_tpot_ms"]) * 1e-3
    layout = reading(row)
    if layout is None:
        return Scored(row["id"], row["backend"], measured_s, None, "the ranks fill no devices")
    try:
        predicted = _predict(row, layout)
    except ConfigError as error:
        return Scored(row["id"], row["backend"], measured_s, None, str(error))
    return Scored(row["id"], row["backend"], measured_s, predicted.tpot_s, sigma=predicted.sigma)


def _predict(row: Mapping[str, str], layout: Reading) -> Prediction:
    device = hardware(_DEVICES[row["system"]])
    model = _model(row["model_path"])
    setting = Setting(
        model,
        device,
        Parallel(tp=layout.tp, dp=layout.dp, ep=layout.ep, moe_tp=layout.moe_tp),
        _quant(row, model),
        ROUTING,
        engine(row["backend"]),
        with_aiconfigurator(device.name),
        aiconfigurator.collective_tables(device.name, row["backend"]),
    )
    workload = Workload(
        input_tokens=_int(row["isl"]), output_tokens=_int(row["osl"]), batch=layout.batch
    )
    return predict(setting, workload, check_memory=False)


@cache
def _model(path: str) -> ModelSpec:
    return spec_to_price(_config(path))[0]


@cache
def _config(path: str) -> dict[str, Any]:
    name = _CONFIGS.get(path, path.replace("/", "--"))
    file = aiconfigurator.require_wheel() / "model_configs" / f"{name}_config.json"
    return json.loads(Path(file).read_text(encoding="utf-8"))


def _is_block_scaled(path: str) -> bool:
    """Whether the released 8-bit checkpoint has a scale a block (all of these but gpt-oss)."""
    stored = _config(path).get("quantization_config") or {}
    return "weight_block_size" in stored or "Qwen3.5" in path or "GLM-5" in path


def _quant(row: Mapping[str, str], model: ModelSpec) -> QuantScheme:
    weights, experts = _FORMATS[row["gemm_quant_mode"]], _FORMATS[row["moe_quant_mode"]]
    if model.family == "gpt_oss":  # released in MXFP4; everything but the experts in 16 bits
        weights, experts = "bf16", "mxfp4"
    elif weights == "int4":
        weights = "bf16"
    if experts == "fp8" and _is_block_scaled(row["model_path"]):
        experts = "fp8_block"
    if weights == "fp8" and _is_block_scaled(row["model_path"]):
        weights = "fp8_block"
    is_small = experts in ("fp4", "mxfp4") or row["backend"] == "trtllm"
    return QuantScheme(
        weights=weights,
        experts=experts,
        activations="bf16" if experts in ("int4", "mxfp4") and weights == "bf16" else None,
        kv="fp8" if is_small and weights != "bf16" else "bf16",
    )


def fit_scales(scored: Iterable[Scored]) -> dict[str, float]:
    """One constant a backend: the median of measured over predicted on the fitting rows."""
    ratios: dict[str, list[float]] = {}
    for one in scored:
        if one.predicted_s is not None and one.is_for_fitting:
            ratios.setdefault(one.backend, []).append(one.measured_s / one.predicted_s)
    return {backend: float(np.median(values)) for backend, values in ratios.items()}
