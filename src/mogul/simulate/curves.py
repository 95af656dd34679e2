"""How far a kernel stays above its roofline: few constants a kind, where nothing was measured.

    time = floor + ((flop / (compute * peak))^P + (bytes / (memory * bandwidth))^P)^(1/P)

`floor` is what the smallest call takes inside a graph. `constants.toml` holds the constants by
architecture and kind with the table each was fitted on and the error it left.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mogul.simulate.physics import Demand
from mogul.spec.hardware import Hardware
from mogul.spec.quant import ARITHMETIC

SHARPNESS = 2.0
"""P above: 1 adds compute and memory time, infinity takes the larger."""

FILE = Path(__file__).parent / "constants.toml"


@dataclass(frozen=True)
class Curve:
    """Constants of one kind of kernel on one architecture."""

    floor_s: float
    compute: float
    memory: float
    source: str
    sigma: float
    """Standard deviation of log(measured / curve) on the table it was fitted on."""

    is_generic: bool = False

    def seconds(self, demand: Demand, device: Hardware, arithmetic: str) -> Any:
        """Time of a call, or of a table of calls."""
        peak = device.peak(ARITHMETIC.get(arithmetic, arithmetic))
        compute_s = demand.padded_flop / (self.compute * peak)
        memory_s = demand.moved_bytes / (self.memory * device.memory_bytes_per_s)
        sharp = (compute_s**SHARPNESS + memory_s**SHARPNESS) ** (1 / SHARPNESS)
        return self.floor_s + sharp


@cache
def _constants() -> dict[str, dict[str, Any]]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


@cache
def curve(architecture: str, kind: str, dtype: str = "bf16") -> Curve:
    """The curve of a kind: of this architecture and arithmetic, or the nearest there is."""
    constants = _constants()
    for place in (architecture, "generic"):
        for name in (f"{kind}-{dtype}", f"{kind}-{ARITHMETIC.get(dtype, dtype)}", kind):
            if values := constants.get(place, {}).get(name):
                return Curve(**values, is_generic=place == "generic")
    raise AssertionError(f"constants.toml has no generic curve for {kind!r}")
