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
LONGEST_WORD = 12
"""Letters; longer words are folded where room is short, numbers never."""


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
        widths = [self._least_width(index) for index in range(len(self.columns))]
        width = get_terminal_size().columns if out.isatty() else PLAIN_WIDTH
        width = max(width, sum(widths) + 4 * len(widths))
        console = Console(file=buffer, width=width, highlight=False, force_terminal=out.isatty())
        table = RichTable(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(self.columns)
        )
        for index, column in enumerate(self.columns):
            side = "right" if self._is_numeric(index) else "left"
            least = widths[index]
            table.add_column(Text(column), justify=side, min_width=least, overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        console.print(Text(self.title, style="bold"))
        console.print(table)
        for note in self.notes:
            console.print(Padding(Text(f"* {note}", style="dim"), (0, 0, 0, 2)))
        lines = (line.rstrip() for line in buffer.getvalue().splitlines())
        out.write("\n".join(lines) + "\n\n")

    def _is_numeric(self, index: int) -> bool:
        return bool(self.rows) and all(_is_numeric(row[index]) for row in self.rows)

    def _least_width(self, index: int) -> int:
        """Letters a column needs so that no number is cut and no short word is folded."""
        words = str(self.columns[index]).split()
        for row in self.rows:
            words += [_cell(row[index])] if self._is_numeric(index) else _cell(row[index]).split()
        longest = max(map(len, words), default=1)
        return longest if self._is_numeric(index) else min(longest, LONGEST_WORD)


def _cell(value: Any) -> str:
    if isinstance(value, float):  # four digits, but no power of ten where a person would not
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"
    return "" if value is None else str(value)


def _is_numeric(value: Any) -> bool:
    if value is None or isinstance(value, (int, float)):
        return True
    return bool(value) and str(value).lstrip("-+<>=")[:1].isdigit()
