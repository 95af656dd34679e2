"""What an fp8 cache costs in quality: bits per byte through the engine's own pages.

Decides the measure: log-probabilities of whole held-out windows as the engine computes them, every
key and value read back from its page, with a cache in the model's dtype, in fp8 with scale 1, and
in fp8 with scales measured on training text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mogul.bench.engine_quality import hear, standard_error
from mogul.serve import Engine
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
    error: float
    """Standard error of `loss`, over windows of the same text."""
    same_top1: float
    """Share of positions whose likeliest next token stays."""


def kv_qualities(subject: Subject) -> Iterator[KvQuality]:
    """Scale 1 and measured scales."""
    model = subject.build()
    with_plain = open_engine(model, subject.held_out, "auto")
    plain = hear(with_plain, subject.held_out)
    with_plain.close()
    calm = open_engine(model, subject.calibration, "auto")
    scales = measure_scales(calm, subject.calibration.ids.tolist())
    calm.close()
    for given in (None, scales):
        engine = open_engine(model, subject.held_out, "fp8", given)
        found = hear(engine, subject.held_out)
        engine.close()
        yield KvQuality(
            subject.name,
            given is not None,
            found.bits_per_byte,
            found.bits_per_byte / plain.bits_per_byte - 1,
            standard_error(found.nats, plain.nats),
            float((found.top1 == plain.top1).mean()),
        )


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
