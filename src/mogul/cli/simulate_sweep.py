"""`mogul simulate sweep`: every legal deployment -> the ones nothing beats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mogul.cli.simulate_options import Deployment

EXAMPLES = """
examples:
  mogul simulate sweep preset:qwen3-30b-a3b --device h200 --devices 1 2 4 8 \\
      --input 4000 --output 500 --max-ttft-ms 2000 --max-tpot-ms 30
  mogul simulate sweep preset:deepseek-v3 --device h200 --devices 8 16 --quants fp8 \\
      --plan plan.json --html sweep.html
"""


@dataclass(frozen=True, kw_only=True)
class Options(Deployment):
    """Search layouts, formats and batches: those flags are refused here."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Device counts of one copy."""

    quants: tuple[str, ...] = ("bf16", "fp8")
    """Formats to try."""

    max_pp: int = 1
    """Most pipeline stages."""

    plan: Path | None = None
    """Write the best point (by tokens/s a device) as plan.json."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print; json in base units."""


def run(options: Options) -> int:
    """Search and print the front."""
    from mogul.cli.simulate_options import refuse_unused, setting_of, workload_of
    from mogul.core.log import say
    from mogul.simulate.sweep import search
    from mogul.simulate.tables import as_data, front_table
    from mogul.spec.quant import scheme

    searched = ("tp", "dp", "pp", "ep", "moe_tp", "shared_tp", "quant", "batch", "placement")
    refuse_unused(options, "sweep", *searched)
    base = setting_of(options)
    found = search(
        base.model,
        base.device,
        workload_of(options),
        device_counts=options.devices,
        quants=[scheme(name) for name in options.quants],
        base=base,
        max_pp=options.max_pp,
    )
    table = front_table(found)
    if options.format == "json":
        from mogul.core.table import Table

        data = {"front": [as_data(p) for p in found.front], "notes": list(table.notes)}
        Table("", (), (), data=data).show("json")
    else:
        table.show(options.format)
    if options.html:
        from mogul.simulate.report import sweep_page

        say(f"wrote {sweep_page(found).write(options.html)}")
    if not found.front:
        say("no point meets the targets; the fastest for the user is shown with --max-* left out")
        return 1
    if options.plan:
        _write_plan(options, found.front[-1])
    return 0


def _write_plan(options: Options, best: object) -> None:
    from mogul.core.log import say
    from mogul.simulate.run import Prediction
    from mogul.spec.plan import Plan

    assert options.plan is not None
    assert isinstance(best, Prediction)
    expected = {
        "ttft_s": best.ttft_s,
        "tpot_s": best.tpot_s,
        "tokens_per_s_per_device": best.tokens_per_s_per_device,
        "memory_bytes": best.memory.total_bytes,
    }
    plan = Plan(
        model=options.model,
        device=best.setting.device.name,
        parallel=best.setting.parallel,
        quant=best.setting.quant,
        workload=best.workload,
        expected=expected,
    )
    plan.write(options.plan)
    say(f"wrote {options.plan}")
