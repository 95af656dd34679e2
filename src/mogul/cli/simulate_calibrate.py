"""`mogul simulate calibrate`: measure this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXAMPLES = """
examples:
  mogul simulate calibrate --device h100 --out my-h100
  mogul simulate run preset:qwen3-30b-a3b --device h100 --measured my-h100
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure products, experts, attention and launches of this machine; at most 10 minutes.

    The tables are used by `--measured FOLDER` of the other verbs.
    """

    device: str
    """The simulator's name of this machine, or your own .toml."""

    out: Path
    """Folder for the tables."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    small: bool = False
    """A few tiny cases only, to see that it works."""


def run(options: Options) -> int:
    """Measure and name the files."""
    from mogul.bench.calibrate import SMALL, Grid, calibrate
    from mogul.core.log import say
    from mogul.spec.hardware import hardware

    name = hardware(options.device).name
    options.out.mkdir(parents=True, exist_ok=True)
    for path in calibrate(options.out, name, SMALL if options.small else Grid(), options.dtype):
        say(f"wrote {path}")
    return 0
