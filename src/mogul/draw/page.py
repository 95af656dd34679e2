"""A report page: one HTML file that works offline, on a phone, in light and in dark.

All text given is escaped; `code` in backquotes and **bold** are the only marks. plotly.js is
inlined once, and only if the page has a figure; a page of tables needs no plotly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mogul.core.files import atomic_write
from mogul.core.table import Table
from mogul.draw.chart import Figure

_CSS = """
:root { color-scheme: light dark; --ink: #20262e; --soft: #5d6673; --paper: #ffffff;
  --card: #f5f7fa; --line: #dde2e9; --accent: #2f6fce; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b1;
  --paper: #14181d; --card: #1d232a; --line: #323b46; --accent: #77a8f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1.1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
p { margin: .6rem 0; }
.lead { color: var(--soft); font-size: 1.08rem; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--card);
  padding: .1em .3em; border-radius: 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.fact { background: var(--card); border-radius: 10px; padding: .8rem .95rem; }
.fact b { display: block; font-size: 1.45rem; line-height: 1.25; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.fact span { font-size: .9rem; } .fact small { display: block; color: var(--soft); }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .92rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .7rem .38rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td.n, th.n { text-align: right; }
td.n { white-space: nowrap; }
th:not(:last-child), td:not(:last-child) { padding-right: 1rem; }
figure { margin: 1.4rem 0; } figcaption, .note { color: var(--soft); font-size: .92rem; }
.note { margin: .2rem 0; }
blockquote { margin: .7rem 0; padding: .6rem 1rem; background: var(--card);
  border-left: 3px solid var(--accent); border-radius: 0 8px 8px 0; white-space: pre-wrap; }
blockquote cite { display: block; color: var(--soft); font-style: normal; font-size: .88rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .88rem; }
"""


def marked_up(text: str) -> str:
    """Escape text, then turn `code` and **bold** into tags."""
    safe = escape(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe)


def show_cell(value: object) -> str:
    """A table cell as text: four digits of a float, all of a large one, thousands grouped."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _is_numeric(value: object) -> bool:
    """Whether a cell reads as a number, and so stands right."""
    return not isinstance(value, str) or value.lstrip("-+<>=")[:1].isdigit() or value == "-"


class Page:
    """Collect parts from top to bottom, then `write` the file."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{marked_up(title)}</h1>"]
        self._num_figures = 0
        if lead:
            self._parts.append(f'<p class="lead">{marked_up(lead)}</p>')

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{marked_up(title)}</h2>")

    def prose(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self._parts += [f"<p>{marked_up(text)}</p>" for text in paragraphs]

    def facts(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """Add cards of (number, what it is, note)."""
        cards = (
            f'<div class="fact"><b>{escape(number)}</b><span>{marked_up(what)}</span>'
            f"<small>{marked_up(note)}</small></div>"
            for number, what, note in facts
        )
        self._parts.append(f'<div class="facts">{"".join(cards)}</div>')

    def quote(self, text: str, source: str) -> None:
        """Add words somebody or some model said, line breaks kept."""
        cite = f"<cite>{marked_up(source)}</cite>"
        self._parts.append(f"<blockquote>{cite}{escape(text)}</blockquote>")

    def table(self, table: Table) -> None:
        """Add a table with its title above and its notes below."""
        columns = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
        kinds = [' class="n"' if all(map(_is_numeric, cells)) else "" for cells in columns]
        head = "".join(
            f"<th{kind}>{marked_up(name)}</th>"
            for kind, name in zip(kinds, table.columns, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{kind}>{marked_up(show_cell(v))}</td>"
                for kind, v in zip(kinds, row, strict=True)
            )
            + "</tr>"
            for row in table.rows
        )
        head = f"<thead><tr>{head}</tr></thead>" if any(table.columns) else ""
        self._parts.append(
            f"<h3>{marked_up(table.title)}</h3>"
            f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
        )
        self._parts += [f'<p class="note">{marked_up(note)}</p>' for note in table.notes]

    def figure(self, figure: Figure) -> None:
        """Add a figure with its title above and its caption below."""
        from mogul.draw.interactive import plotly_fragment

        self._num_figures += 1
        drawn = plotly_fragment(figure, f"figure-{self._num_figures}")
        self._parts.append(
            f"<figure><h3>{marked_up(figure.title)}</h3>{drawn}"
            f"<figcaption>{marked_up(figure.caption)}</figcaption></figure>"
        )

    def drawing(self, svg: str, caption: str) -> None:
        """Add an SVG of our own making; unlike all else it is not escaped."""
        self._parts.append(f"<figure>{svg}<figcaption>{marked_up(caption)}</figcaption></figure>")

    def footer(self, text: str) -> None:
        """Add the small print."""
        self._parts.append(f"<footer>{marked_up(text)}</footer>")

    def html(self) -> str:
        """The whole page."""
        script = ""
        if self._num_figures:
            from mogul.draw.interactive import plotly_script

            script = f"<script>{plotly_script()}</script>"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_CSS}</style>{script}</head>\n"
            f"<body><main>\n{chr(10).join(self._parts)}\n</main></body></html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the file, whole or not at all; returns its path."""
        atomic_write(path, self.html())
        return Path(path)
