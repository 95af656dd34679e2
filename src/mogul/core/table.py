"""One result, three faces: a table on the terminal, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from shutil import get_terminal_size
from typing import Any, Literal, TextIO

TableFormat = Literal["table", "json", "csv"]
PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Table:
    """Rows under named columns, with notes that explain them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()
    data: Mapping[str, Any] | None = None
    """What JSON shows instead of the rows, where rows are rounded for people."""

    extra: Mapping[str, Any] = field(default_factory=dict)
    """Keys added to the JSON object."""

    def show(self, format: TableFormat = "table", file: TextIO | None = None) -> None:
        """Print to `file` (standard output by default)."""
        out = file or sys.stdout
        if format == "json":
            out.write(json.dumps(self.as_data(), indent=2, default=str) + "\n")
        elif format == "csv":
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows)
        else:
            self._print(out)

    def as_data(self) -> dict[str, Any]:
        """The JSON object: `data` where given, else a list of records."""
        if self.data is not None:
            return {**self.data, **self.extra}
        records = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": records, "notes": list(self.notes), **self.extra}

    def _print(self, out: TextIO) -> None:
        from rich import box
        from rich.console import Console
        from rich.padding import Padding
        from rich.table import Table as RichTable
        from rich.text import Text

        buffer = io.StringIO()
        width = get_terminal_size().columns if out.isatty() else PLAIN_WIDTH
        console = Console(file=buffer, width=width, highlight=False, force_terminal=out.isatty())
        table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, column in enumerate(self.columns):
            numeric = bool(self.rows) and all(_is_numeric(row[index]) for row in self.rows)
            table.add_column(Text(column), justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        console.print(Text(self.title, style="bold"))
        console.print(table)
        for note in self.notes:
            console.print(Padding(Text(f"* {note}", style="dim"), (0, 0, 0, 2)))
        lines = (line.rstrip() for line in buffer.getvalue().splitlines())
        out.write("\n".join(lines) + "\n\n")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def _is_numeric(value: Any) -> bool:
    if value is None or isinstance(value, (int, float)):
        return True
    return bool(value) and str(value).lstrip("-+<>=")[:1].isdigit()
