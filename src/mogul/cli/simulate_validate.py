"""`mogul simulate validate`: the accuracy tables, and whether they clear their bars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mogul.core.table import Table
    from mogul.simulate.validate.scoreboard import Bar

EXAMPLES = """
examples:
  mogul simulate validate                          all sets that can run here
  mogul simulate validate --sets silicon kernels   with AIConfigurator's wheel installed
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Score predictions against measurements; exit code 1 when a bar does not hold."""

    sets: tuple[
        Literal["own", "vllm", "published", "pangu", "training", "balance", "kernels", "silicon"],
        ...,
    ] = ()
    """What to score; by default everything (without the wheel: all but kernels and silicon)."""

    rows: int | None = None
    """Score only so many silicon rows (in the order of a hash of their ids)."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json"] = "table"
    """How to print; json in base units."""


def run(options: Options) -> int:
    """Print the tables and the bars."""
    from mogul.core.log import say
    from mogul.core.table import Table
    from mogul.simulate.validate.scoreboard import scores

    found = scores(options.sets or _sets_that_can_run(), silicon_rows=options.rows)
    summary = _bars_table([bar for score in found for bar in score.bars])
    if options.format == "json":
        data = {"tables": [s.table.as_data() for s in found], "bars": summary.as_data()}
        Table("", (), (), data=data).show("json")
    else:
        for score in found:
            score.table.show()
        summary.show()
    if options.html:
        from mogul.simulate.report import validation_page

        say(f"wrote {validation_page(found, summary).write(options.html)}")
    return 0 if all(bar.holds for score in found for bar in score.bars) else 1


def _sets_that_can_run() -> tuple[str, ...]:
    """Every set; without AIConfigurator's wheel the others, with a line that says so."""
    from mogul.core.log import say
    from mogul.simulate.aiconfigurator import wheel_dir
    from mogul.simulate.validate.scoreboard import NEEDS_WHEEL, SETS

    if wheel_dir():
        return SETS
    say(
        "not scored without AIConfigurator's wheel: " + ", ".join(NEEDS_WHEEL) + " "
        "(pip install pyarrow && pip install --no-deps aiconfigurator-core==0.12.0)"
    )
    return tuple(name for name in SETS if name not in NEEDS_WHEEL)


def _bars_table(bars: Sequence[Bar]) -> Table:
    from mogul.core.table import Table

    rows = [
        (
            bar.set_name,
            bar.metric,
            round(bar.value, 4),
            ("<= " if bar.is_upper else ">= ") + f"{bar.limit:g}",
            "holds" if bar.holds else "MISSED",
        )
        for bar in bars
    ]
    return Table("Bars", ("set", "metric", "value", "bar", ""), rows)
