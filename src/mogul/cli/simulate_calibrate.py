"""`mogul simulate calibrate`: measure this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXAMPLES = """
examples:
  mogul simulate calibrate --device h100 --out my-h100
  torchrun --nproc-per-node 2 --no-python mogul simulate calibrate --device h100 --out my-h100
  mogul simulate run preset:qwen3-30b-a3b --device h100 --machine my-h100/machine.json
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure products, experts, attention, launches and copies; at most 10 minutes.

    Under torchrun the collectives between its processes are measured instead and added to the
    machine.json of the folder. `--machine` and `--measured` of the other verbs use the results.
    """

    device: str
    """The simulator's name of this machine, or your own .toml."""

    out: Path
    """Folder for the tables."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of everything that is measured."""

    budget: float = 540.0
    """Seconds after which nothing new is measured."""

    small: bool = False
    """A few tiny cases only, to see that it works."""


def run(options: Options) -> int:
    """Measure and name the files."""
    from dataclasses import replace

    from mogul.bench.calibrate import SMALL, Grid, calibrate, calibrate_links_of
    from mogul.bench.calibrate_links import world
    from mogul.core.log import say
    from mogul.spec.hardware import hardware

    name = hardware(options.device).name
    options.out.mkdir(parents=True, exist_ok=True)
    if world() > 1:
        paths = calibrate_links_of(options.out, name)
    else:
        grid = replace(SMALL if options.small else Grid(), budget_s=options.budget)
        paths = calibrate(options.out, name, grid, options.dtype)
    for path in paths:
        say(f"wrote {path}")
    return 0
