"""`mogul simulate compare`: grouped against free routing, and models at equal TPOT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mogul.cli.simulate_options import Deployment

EXAMPLES = """
examples:
  mogul simulate compare preset:pangu-pro-moe-72b --device h100 --tp 8 --batch 16
  mogul simulate compare preset:qwen3-30b-a3b --others preset:qwen3-32b --device h100 \\
      --tp 2 --max-tpot-ms 30
"""


@dataclass(frozen=True, kw_only=True)
class Options(Deployment):
    """Compare the model in groups with free top-k at equal load, or models at equal TPOT.

    With --others all models get the largest batch that keeps --max-tpot-ms.
    """

    others: tuple[str, ...] = ()
    """Models to compare with."""

    groups: int | None = None
    """Groups of the grouped twin; by default the model's own, or its picks."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print; json in base units."""


def run(options: Options) -> int:
    """Print the comparison."""
    from mogul.cli.simulate_options import write_page
    from mogul.simulate.tables import compare_table

    points = _equal_tpot(options) if options.others else _grouped(options)
    setting = points[0].prediction.setting
    where = f"{setting.parallel.devices} x {setting.device.title}"
    title = f"At most {options.max_tpot_ms} ms a token on {where}"
    if not options.others:
        title = f"{setting.title} at equal load on {where}"
    table = compare_table(points, title)
    table.show(options.format)
    write_page(options.html, table.title, [table])
    return 0


def _grouped(options: Options) -> list:
    from dataclasses import replace

    from mogul.cli.simulate_options import setting_of, workload_of
    from mogul.core.errors import ConfigError
    from mogul.simulate.compare import Compared, with_groups
    from mogul.simulate.run import predict

    setting = setting_of(options)
    grouping = setting.model.grouping
    if grouping is None:
        raise ConfigError(
            f"{setting.title} is dense: it has nothing to group",
            fix="name models to compare with: --others",
        )
    own = grouping.num_groups if grouping.num_groups > 1 else grouping.top_k
    groups = options.groups or own
    found = []
    for name, count in (("free top-k", 1), (f"{groups} groups", groups)):
        model = with_groups(setting.model, count)
        found.append(Compared(name, predict(replace(setting, model=model), workload_of(options))))
    return found


def _equal_tpot(options: Options) -> list:
    from dataclasses import replace

    from mogul.cli.simulate_options import setting_of, workload_of
    from mogul.core.errors import ConfigError
    from mogul.simulate.compare import Compared, at_equal_tpot

    if options.max_tpot_ms is None:
        raise ConfigError("models are compared at equal TPOT", fix="give --max-tpot-ms")
    found = []
    for name in (options.model, *options.others):
        one = replace(options, model=name)
        point = at_equal_tpot(setting_of(one), workload_of(one), options.max_tpot_ms * 1e-3)
        found.append(Compared(point.setting.title, point))
    return found
