"""`mogul simulate run`: one point, taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mogul.cli.simulate_options import Deployment

EXAMPLES = """
examples:
  mogul simulate run preset:qwen3-30b-a3b --device h100 --batch 16
  mogul simulate run preset:pangu-pro-moe-72b --device ascend-910b --tp 4 --quant w8a8-kv8 \\
      --engine ascend --batch 456 --together
  mogul simulate run ./my-checkpoint --device my-machine.toml --tp 2 --html point.html
"""


@dataclass(frozen=True, kw_only=True)
class Options(Deployment):
    """Predict latency, throughput, memory and price of one deployment."""

    loads: bool = False
    """Also print the rows and distinct experts of every rank."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json"] = "table"
    """How to print; json in base units."""


def run(options: Options) -> int:
    """Print the point."""
    from mogul.cli.simulate_options import setting_of, workload_of
    from mogul.core.table import Table
    from mogul.simulate.run import predict
    from mogul.simulate.tables import as_data, load_table, point_tables

    point = predict(setting_of(options), workload_of(options))
    if options.format == "json":
        Table("", (), (), data=as_data(point)).show("json")
    else:
        for table in point_tables(point):
            table.show()
        if options.loads:
            load_table(point).show()
    if options.html:
        from mogul.core.log import say
        from mogul.simulate.report import point_page

        say(f"wrote {point_page(point).write(options.html)}")
    return 0
