"""What quantised weights and an fp8 cache cost in quality, through the engine that serves them.

Decides the measure: an engine opens the checkpoint as a server would (`quantise=`, `kv_dtype=`, the
files of `mogul calibrate` or none) and tells the log-probabilities of held-out windows; bits per
byte, likeliest tokens and picked experts stand beside those of the same engine unquantised.
`quant_quality.py` simulates the arithmetic in fp32 instead and needs no device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mogul.serve import Engine, SamplingParams
from mogul.serve.kv_scales import read_scales
from mogul.serve.loading import open_model
from mogul.serve.options import EngineOptions
from mogul.train.data import Windows


@dataclass(frozen=True)
class Case:
    """How an engine opens a checkpoint."""

    weights: str | None = None
    """A name of `quantise_load.WEIGHTS`; None keeps them."""

    is_kv_fp8: bool = False
    is_calibrated: bool = False
    """Whether it is given the files of `mogul calibrate`."""

    @property
    def name(self) -> str:
        """In a word: fp8, int4-64, fp8 cache, fp8 and fp8 cache."""
        parts = [self.weights or "", "fp8 cache" if self.is_kv_fp8 else ""]
        return " and ".join(part for part in parts if part) or "none"


@dataclass(frozen=True)
class Heard:
    """What an engine said about the windows."""

    bits_per_byte: float
    nats: np.ndarray
    """Of each window."""

    top1: np.ndarray
    picks: np.ndarray | None
    """[tokens, layers, K], sorted, of a model with experts."""


@dataclass(frozen=True)
class EngineQuality:
    """One case of one model."""

    model: str
    case: Case
    bits_per_byte: float
    loss: float
    """Bits per byte over those of the unquantised engine, less 1."""

    error: float
    """Standard error of `loss`, over windows of the same text."""

    same_top1: float
    same_picks: float | None
    num_tokens: int


def engine_qualities(
    name: str,
    folder: Path,
    held_out: Windows,
    cases: Sequence[Case],
    *,
    calibrated: Path,
    device: str,
    dtype: str = "auto",
    **options: Any,
) -> Iterator[EngineQuality]:
    """The unquantised engine, then every case, one at a time.

    Args:
        name: for the rows.
        folder: the checkpoint, without files of `mogul calibrate`.
        held_out: windows to hear about.
        cases: what to open.
        calibrated: folder of these files.
        device: where to.
        dtype: of what is not quantised.
        options: more fields of `EngineOptions`.
    """
    before: Heard | None = None
    for case in (Case(), *cases):
        engine = open_case(folder, case, held_out, calibrated, device, dtype, options)
        try:
            heard = hear(engine, held_out)
        finally:
            engine.close()
        before = before or heard
        yield EngineQuality(
            name,
            case,
            heard.bits_per_byte,
            heard.bits_per_byte / before.bits_per_byte - 1,
            standard_error(heard.nats, before.nats),
            float((heard.top1 == before.top1).mean()),
            same_picks(before.picks, heard.picks),
            len(heard.top1),
        )


def open_case(
    folder: Path,
    case: Case,
    windows: Windows,
    calibrated: Path,
    device: str,
    dtype: str,
    options: dict[str, Any],
) -> Engine:
    """An engine whose cache holds all windows."""
    model = open_model(
        folder,
        load="checkpoint",
        dtype=dtype,
        device=device,
        experts="mogul",
        quantise=case.weights,
        statistics=calibrated if case.is_calibrated and case.weights else None,
    )
    length = windows.ids.shape[1] + 2
    sizes: dict[str, Any] = {
        "max_length": length,
        "max_sequences": 8,
        "cache_tokens": 8 * (length + 64),
        "kv_dtype": "fp8" if case.is_kv_fp8 else "auto",
        "reuse_prefix": False,
        "graphs": False,
    }
    scales = read_scales(calibrated) if case.is_kv_fp8 and case.is_calibrated else None
    return Engine(model, None, EngineOptions(**{**sizes, **options}), kv_scales=scales)


def hear(engine: Engine, windows: Windows) -> Heard:
    """Bits per byte of the windows, the likeliest token and the picks at every position."""
    asked = SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=1,
        ignore_eos=True,
        routed_experts=engine.options.record_experts and bool(engine.runner.tap.num_layers),
    )
    nats, top1, picks = [], [], []
    for answer in engine.generate(windows.ids.tolist(), asked):
        records = [one for one in answer.prompt_logprobs or () if one is not None]
        nats.append(-sum(one.logprob for one in records))
        top1 += [one.top[0][0] for one in records]
        if answer.routed_experts is not None:
            picks.append(np.sort(answer.routed_experts[: windows.ids.shape[1]], -1))
    bits = sum(nats) / math.log(2.0) / int(windows.bytes_per_token[:, 1:].sum())
    return Heard(bits, np.array(nats), np.array(top1), np.concatenate(picks) if picks else None)


def standard_error(nats: np.ndarray, before: np.ndarray) -> float:
    """Of the summed nats over the summed nats before, less 1: the windows are the draws."""
    ratio = nats.sum() / before.sum()
    left = nats - ratio * before
    return float(np.sqrt(len(left)) * left.std(ddof=1) / before.sum())


def same_picks(before: np.ndarray | None, after: np.ndarray | None) -> float | None:
    """Share of picks that stay, over all tokens and layers."""
    if before is None or after is None:
        return None
    stays = (before[..., :, None] == after[..., None, :]).any(-1) & (before >= 0)
    return float(stays.sum() / (before >= 0).sum())
