"""In which number formats a model is stored and computed.

A format's bits include its scales: fp8 in blocks of 128 x 128 costs 8.002 bits, nvfp4 4.5.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from mogul.core.errors import ConfigError, nearest
from mogul.spec.base import Spec

BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "fp8": 8.0,
    "fp8_block": 8.002,
    "fp8-w8a16": 8.0,
    "int8": 8.0,
    "int4": 4.25,
    "fp4": 4.5,
    "mxfp4": 4.25,
}
"""Bits a stored number takes, scales included."""

ARITHMETIC = {"mxfp4": "fp4", "fp8_block": "fp8", "fp8-w8a16": "fp8"}
"""Formats that compute like another one; fp8-w8a16 twice: its rows are sums of two numbers."""


class QuantScheme(Spec):
    """Formats by part; `None` follows the line above it."""

    weights: str = "bf16"
    """Attention, dense and shared weights."""

    experts: str | None = None
    """Routed experts; None means like `weights`."""

    activations: str | None = None
    """Inputs of the matrix products; None: like weights (16 bit when they have 4 integer bits)."""

    kv: str = "bf16"
    dispatch: str = "bf16"
    """Rows sent to experts on other devices."""

    head: str = "bf16"
    """Embeddings and output head."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for field in ("weights", "experts", "activations", "kv", "dispatch", "head"):
            value = getattr(self, field)
            if value is not None and value not in BITS:
                raise ConfigError(f"quant.{field}={value!r} is unknown", fix=nearest(value, BITS))
        return self

    @property
    def expert_format(self) -> str:
        """Format of the routed experts."""
        return self.experts or self.weights

    def arithmetic(self, weights: str) -> str:
        """What a product with weights of this format computes in."""
        stored = self.activations
        if stored is None:
            stored = "bf16" if weights == "int4" else weights
        wider = stored if BITS[stored] >= BITS[weights] else weights
        return ARITHMETIC.get(wider, wider)


def bytes_of(kind: str) -> float:
    """Bytes one stored number takes."""
    return BITS[kind] / 8


_NAMED = {
    "bf16": QuantScheme(),
    "fp8": QuantScheme(weights="fp8", kv="fp8"),
    "fp8-kv16": QuantScheme(weights="fp8"),
    "fp8-experts": QuantScheme(experts="fp8"),
    "fp8-w8a16": QuantScheme(experts="fp8-w8a16"),
    "w8a8": QuantScheme(weights="int8", activations="int8"),
    "w8a8-kv8": QuantScheme(weights="int8", activations="int8", kv="int8"),
    "w4a8": QuantScheme(weights="int8", experts="int4", activations="int8"),
    "w4a16": QuantScheme(experts="int4"),
    "nvfp4": QuantScheme(weights="fp4", kv="fp8"),
    "mxfp4": QuantScheme(experts="mxfp4"),
}


def scheme(name: str) -> QuantScheme:
    """Return a scheme by its usual name.

    Raises:
        ConfigError: an unknown name, with the nearest.
    """
    if name not in _NAMED:
        raise ConfigError(f"unknown quantisation {name!r}", fix=nearest(name, _NAMED))
    return _NAMED[name]
