"""`mogul simulate shape`: the shape study."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mogul.core.table import Table
    from mogul.simulate.shape import Study, Target

EXAMPLES = """
examples:
  mogul simulate shape                        the paper's constraints and machines
  mogul simulate shape --total 25e9 35e9 --active 2.5e9 4e9 --targets h100:1:20 l40s:2:50 \\
      --quant fp8 --engine vllm --candidates 100
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw model shapes under parameter budgets and rank them by decode rate on several machines.

    Scores are relative to Pangu Pro MoE's published shape. Quality by scaling laws is shown
    beside; all are extrapolated at this size, and none knows groups.
    """

    total: tuple[float, float] = (60e9, 80e9)
    """Least and most parameters."""

    active: tuple[float, float] = (15e9, 18e9)
    """Least and most active parameters."""

    targets: tuple[str, ...] = ("ascend-300i-duo-chip:8:100:h2p", "ascend-910b:4:50")
    """DEVICE:COUNT:MS (machine, devices of one copy, most milliseconds a token), and :h2p for the
    paper's hybrid layout."""

    picks_per_group: tuple[int, ...] = (1,)
    """Picks in each group, one or more to draw from: 1 as in the paper, 0 for no groups."""

    quant: str = "w8a8-kv8"
    """As in `mogul simulate run`."""

    engine: str = "ascend"
    """As in `mogul simulate run`."""

    context: int = 2048
    """Cached tokens a request."""

    tokens: float = 13e12
    """Training tokens, for the laws."""

    candidates: int = 200
    """Shapes to draw."""

    seed: int = 0
    """Seed of the draw."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print; json in base units."""


def run(options: Options) -> int:
    """Study and print."""
    from mogul.cli.simulate_options import write_page
    from mogul.core.log import progress
    from mogul.simulate.shape import Ranges, study

    ranges = Ranges(
        total_params=options.total,
        active_params=options.active,
        picks_per_group=options.picks_per_group,
    )
    targets = [_target(text, options) for text in options.targets]
    with progress(f"pricing {options.candidates} shapes on {len(targets)} targets"):
        found = study(
            ranges,
            targets,
            num_candidates=options.candidates,
            seed=options.seed,
            tokens=options.tokens,
        )
    table = _table(found)
    table.show(options.format)
    write_page(options.html, "Model shapes", [table])
    return 0


def _table(found: Study) -> Table:
    """The reference first, then the fastest shapes."""
    from mogul.core.table import Table

    shown = [("published", found.reference), *(("", one) for one in found.candidates[:15])]
    keys = tuple(found.reference.shape)
    rows = [
        (
            name,
            *(one.shape[key] for key in keys),
            round(one.model.params() / 1e9, 1),
            round(one.model.active_params() / 1e9, 1),
            round(one.score, 3),
            f"{one.quality.equivalent_flop:.3g}",
        )
        for name, one in shown
    ]
    columns = ("", *keys, "total B", "active B", "score", "equal FLOP")
    beaten = f"{found.better} of {len(found.candidates)} candidates"
    at_quality = found.percentile_at_quality
    told = "no candidate" if math.isnan(at_quality) else f"{100 * at_quality:.0f} %"
    notes = (
        f"{beaten} beat the published shape ({100 * found.percentile:.0f} %)",
        f"of those with its size and quality or more: {told}",
        "equal FLOP: dense compute of equal loss by efficiency leverage, extrapolated",
    )
    extra = {
        "percentile": found.percentile,
        "at_quality": None if math.isnan(at_quality) else at_quality,
    }
    return Table("Shapes, fastest first", columns, rows, notes, extra=extra)


def _target(text: str, options: Options) -> Target:
    from mogul.core.errors import ConfigError
    from mogul.simulate.shape import Target

    bare = text.removesuffix(":h2p")
    try:
        device, count, limit_ms = bare.split(":")
        devices, limit_s = int(count), float(limit_ms) * 1e-3
    except ValueError:
        raise ConfigError(f"target {text!r} is not DEVICE:COUNT:MS", fix="h100:2:50") from None
    return Target(
        device=device,
        devices=devices,
        max_tpot_s=limit_s,
        is_hybrid=bare != text,
        quant=options.quant,
        engine=options.engine,
        context=options.context,
    )
