"""What an fp8 cache costs in quality: bits per byte through the engine's own pages.

Decides the measure: log-probabilities of whole held-out windows as the engine computes them, every
key and value read back from its page, with a cache in the model's dtype, in fp8 with scale 1, and
in fp8 with scales measured on training text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mogul.serve import Engine, SamplingParams
from mogul.serve.kv_scales import KvScales, measure_scales
from mogul.serve.options import EngineOptions
from mogul.train.data import Windows

if TYPE_CHECKING:
    from mogul.bench.quant_quality import Subject


@dataclass(frozen=True)
class KvQuality:
    """One model with an fp8 cache."""

    model: str
    calibrated: bool
    """Whether scales were measured; else they are 1."""
    bits_per_byte: float
    loss: float
    """Bits per byte over those with a cache of the model's dtype, less 1."""
    same_top1: float
    """Share of positions whose likeliest next token stays."""


def kv_qualities(subject: Subject) -> Iterator[KvQuality]:
    """Scale 1 and measured scales."""
    model = subject.build()
    with_plain = open_engine(model, subject.held_out, "auto")
    bits, top1 = look(with_plain, subject.held_out)
    with_plain.close()
    calm = open_engine(model, subject.calibration, "auto")
    scales = measure_scales(calm, subject.calibration.ids.tolist())
    calm.close()
    for given in (None, scales):
        engine = open_engine(model, subject.held_out, "fp8", given)
        found, likeliest = look(engine, subject.held_out)
        engine.close()
        same = sum(a == b for a, b in zip(top1, likeliest, strict=True)) / len(top1)
        yield KvQuality(subject.name, given is not None, found, found / bits - 1, same)


def open_engine(
    model: Any, windows: Windows, kv_dtype: Literal["auto", "fp8"], scales: KvScales | None = None
) -> Engine:
    """An engine whose cache holds all windows."""
    length = windows.ids.shape[1] + 2
    options = EngineOptions(
        max_length=length,
        max_sequences=4,
        cache_tokens=(len(windows) + 4) * (length + 64),
        kv_dtype=kv_dtype,
    )
    return Engine(model, None, options, kv_scales=scales)


def look(engine: Engine, windows: Windows) -> tuple[float, list[int]]:
    """Bits per byte of the windows, and the likeliest token at every position."""
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, ignore_eos=True)
    nats, top1 = 0.0, []
    for answer in engine.generate(windows.ids.tolist(), asked):
        for record in (answer.prompt_logprobs or ())[1:]:
            assert record is not None
            nats -= record.logprob
            top1.append(record.top[0][0])
    return nats / math.log(2.0) / int(windows.bytes_per_token[:, 1:].sum()), top1
