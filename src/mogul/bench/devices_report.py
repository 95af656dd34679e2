"""Show what `bench devices` measured: a table, a page with the timeline of every rank, ledger rows.

The timeline is drawn from marks of one call: a rank's experts are bars, the gaps before and after
them are communication and waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mogul.bench import ledger
from mogul.core.table import Table
from mogul.core.units import show_s
from mogul.draw.chart import Chart, Series
from mogul.draw.page import Page

Row = Mapping[str, Any]
COLUMNS = (
    "tokens", "routing", "way", "layer us", "experts us", "waits us", "exposed %", "floor us",
    "x floor", "rho", "delta", "sent KiB", "host waits",
)  # fmt: skip
NOTES = (
    "layer: the slowest rank's, in a graph where sizes are known, else called",
    "experts: the slowest rank's, alone (on a processor: computing time, not waiting)",
    "waits: the rank with the least work waits so long for the slowest rank's experts",
    "exposed: share of the layer that is not the slowest rank's experts",
    "floor: an even share of the work at this run's limits, or the bytes over this run's link",
    "rho, delta: rows and distinct experts on the busiest device over the mean",
)
WIDTH, BAR, LEFT = 900, 16, 210
COLORS = {"experts": "#2b6cb0", "rest": "#d9dde3"}


def table(rows: Sequence[Row], facts: Row) -> Table:
    """One line a cell; refused ones say why in the notes."""
    lines = [_line(row) for row in rows if "refused" not in row]
    refused = {f"{row['way']}: {row['refused']}" for row in rows if "refused" in row}
    shape, ranks = (rows[0]["shape"], rows[0]["ranks"]) if rows else ("", "")
    limits = (
        f"limits of this run: {facts['tflop_per_s']:.3g} TFLOP/s, "
        f"{facts['memory_gb_per_s']:.4g} GB/s memory, {facts['link_gb_per_s']:.4g} GB/s link, "
        f"{show_s(facts['link_latency_s'])} for the smallest gather"
    )
    title = f"experts layer {shape} on {ranks} devices"
    data = {"facts": dict(facts), "rows": [dict(row) for row in rows]}
    return Table(title, COLUMNS, lines, (limits, *NOTES, *sorted(refused)), data=data)


def _line(row: Row) -> list[Any]:
    return [
        row["tokens"],
        row["routing"],
        row["way"],
        round(row["layer_s"] * 1e6),
        round(max(row["experts_s"]) * 1e6),
        round(max(row["wait_s"]) * 1e6),
        f"{row['exposed'] * 100:.0f}",
        round(row["floor_s"] * 1e6),
        f"{row['ratio']:.2f}",
        f"{row['rho']:.3f}",
        f"{row['delta']:.3f}",
        round(row["sent_bytes"] / 1024),
        row.get("host_waits", ""),
    ]


def timeline(phases: Sequence[Row]) -> str:
    """An SVG: one bar a rank for every case, experts dark, the rest of the call light."""
    longest = max(one["marks_s"][-1] for one in phases)
    scale = (WIDTH - LEFT - 60) / longest
    parts, y, last = [], 4, ""
    for one in phases:
        title = f"{one['shape']}, {one['tokens']} tokens, {one['routing']}, {one['way']}"
        if title != last:
            y += 18
            parts.append(f'<text x="0" y="{y}" font-size="12">{escape(title)}</text>')
            last, y = title, y + 6
        parts.append(_bar(one, y, scale))
        y += BAR + 3
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 8}" width="100%" role="img" '
        f'font-family="sans-serif">{"".join(parts)}</svg>'
    )


def _bar(one: Row, y: int, scale: float) -> str:
    marks = one["marks_s"]
    text = f'<text x="{LEFT - 8}" y="{y + 12}" font-size="11" text-anchor="end">'
    end_x, shown = LEFT + marks[-1] * scale + 5, escape(show_s(marks[-1]))
    parts = [
        f"{text}rank {one['rank']}</text>",
        _box(0.0, marks[-1], y, scale, COLORS["rest"]),
        *(
            _box(begin, end, y, scale, COLORS["experts"])
            for begin, end in zip(marks[1:-1:2], marks[2:-1:2], strict=True)
        ),
        f'<text x="{end_x:.1f}" y="{y + 12}" font-size="11">{shown}</text>',
    ]
    return "".join(parts)


def _box(begin: float, end: float, y: int, scale: float, color: str) -> str:
    x, width = LEFT + begin * scale, max((end - begin) * scale, 0.5)
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{color}"/>'


def write_page(folder: Path, tables: Iterable[Table], phases: Sequence[Row]) -> Path:
    """The report as one HTML file."""
    page = Page(
        "Devices that wait",
        "One experts layer spread over devices, by router and dispatch: how long it takes, who "
        "waits for whom, and how far it is from what the devices could do.",
    )
    for one in tables:
        page.table(one)
    if phases:
        page.section("One call of every rank")
        page.drawing(
            timeline(phases),
            "Dark: the rank's experts. Light: communication, waiting for the other ranks, and (as "
            "these are plain calls, in no graph) for the host.",
        )
    return page.write(folder / "devices.html")


def ledger_rows(rows: Iterable[Row], facts: Row, device: str) -> list[dict[str, Any]]:
    """A ledger row for every load: the best grouped static dispatch, all other ways as peers.

    `gain` is the time of the best way of an ungrouped router over it.
    """
    loads: dict[str, list[Row]] = {}
    for row in rows:
        if "refused" not in row:
            case = f"{row['shape']} x{row['ranks']} {row['routing']} T{row['tokens']}"
            loads.setdefault(case, []).append(row)
    return [_load_row(case, ways, facts, device) for case, ways in loads.items()]


def best_of(ways: Iterable[Row], *words: str) -> Row | None:
    """The fastest way whose name begins with one of these words."""
    found = [row for row in ways if row["way"].startswith(words)]
    return min(found, key=lambda row: row["layer_s"]) if found else None


def _load_row(case: str, ways: Sequence[Row], facts: Row, device: str) -> dict[str, Any]:
    best = best_of(ways, "grouped static") or min(ways, key=lambda row: row["layer_s"])
    other = best_of(ways, "top-k")
    kept = ("way", "experts_s", "exposed", "rho", "delta", "sent_bytes", "host_waits", "draws_s")
    detail = {key: _short(best[key]) for key in kept if key in best}
    if other is not None:
        detail |= {f"top-k {key}": _short(other[key]) for key in ("way", "exposed", "rho", "delta")}
    return ledger.row(
        device,
        bench="devices",
        case=case,
        metric="layer",
        unit="s",
        value=_short(best["layer_s"]),
        runs=5,
        floor=_short(best["floor_s"]),
        ratio=_short(best["ratio"]),
        gain=None if other is None else _short(other["layer_s"] / best["layer_s"]),
        peers={row["way"]: _short(row["layer_s"]) for row in ways},
        detail=detail,
        limits=_short(dict(facts)),
    )


def _short(value: Any) -> Any:
    """Four digits are more than is known."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def training_rows(steps: Sequence[Row], device: str) -> list[dict[str, Any]]:
    """A ledger row for every training step; the floor is one device's time for its tokens."""
    alone = next((step for step in steps if step["ranks"] == 1), None)
    found = []
    for step in steps:
        gain = step["tokens_per_s"] / alone["tokens_per_s"] if alone else None
        case = f"train x{step['ranks']} {step['dispatch']} in {step['chunks']} chunks"
        found.append(
            ledger.row(
                device,
                bench="devices",
                case=case,
                metric="step",
                unit="s",
                value=step["step_s"],
                runs=5,
                gain=gain,
                detail=dict(step),
            )
        )
    return found


def decode_rows(
    steps: Sequence[Row], device: str, profiles: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """A ledger row for every decode step, with what it spends its time in where that is known."""
    spent = {_profiled(one): one["found"] for one in profiles}
    return [
        ledger.row(
            device,
            bench="devices",
            case=_decode_case(step),
            metric="time per output token",
            unit="s",
            value=step["step_s"],
            runs=5,
            floor=step["floor_s"],
            ratio=step["ratio"],
            detail=dict(step),
            **(
                {"kernels_us": _by_kernel(spent[_profiled(step)])}
                if _profiled(step) in spent
                else {}
            ),
        )
        for step in steps
    ]


def _profiled(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("layout", "wire", "compiled", "batch"))


def _by_kernel(found: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Microseconds by name, kernels of one name together."""
    total: dict[str, float] = {}
    for name, _launches, seconds in found:
        short = name[:60]
        total[short] = round(total.get(short, 0.0) + seconds * 1e6, 1)
    return total


def _decode_case(step: Row) -> str:
    how = step["wire"] + (" compiled" if step["compiled"] else "")
    where = f"{step['layout']} {how} batch {step['batch']} context {step['context']}"
    return f"decode {step['layers']} layers {where}"


def busiest(row: Row) -> float:
    """Time of the slowest rank's experts over the mean of all ranks."""
    return max(row["experts_s"]) * len(row["experts_s"]) / sum(row["experts_s"])


def busiest_rows(rows: Iterable[Row], device: str) -> list[dict[str, Any]]:
    """Ledger rows of what ranks compute: the slowest over the mean, with its rho."""
    return [
        ledger.row(
            device,
            bench="devices",
            case=f"{row['shape']} x{row['ranks']} {row['way']} {row['routing']} T{row['tokens']}",
            metric="experts of the slowest rank over the mean",
            unit="x",
            value=busiest(row),
            runs=5,
            detail={key: row[key] for key in ("experts_s", "rho", "delta")},
        )
        for row in rows
    ]


def busiest_chart(rows: Sequence[Row]) -> Chart:
    """Bars of the slowest rank over the mean, by router and load."""
    ranks = rows[0]["ranks"]
    series = [
        Series(
            name=way,
            x=[f"{row['routing']}\n{row['tokens']}" for row in rows if row["way"] == way],
            y=[busiest(row) for row in rows if row["way"] == way],
            kind="bars",
        )
        for way in dict.fromkeys(row["way"] for row in rows)
    ]
    return Chart(
        title=f"Who waits: experts of the slowest of {ranks} ranks",
        x_label="routing, tokens of all ranks",
        y_label="computing time, slowest / mean",
        series=series,
        caption="1 means that no rank waits for another's experts.",
        y_range=(0.0, 1.5),
    )


RIVALS = {
    "gathered": ("top-k gather",),
    "all-to-all in a graph": ("top-k all_to_all fixed",),
    "Transformers": ("top-k transformers",),
}
"""Ways of an ungrouped router that a chart shows -> the ways' first words."""


def gain_chart(rows: Sequence[Row], device: str, routing: str = "skewed") -> Chart:
    """Time of an ungrouped router's ways over the best grouped static one, by layer and load."""
    loads: dict[str, list[Row]] = {}
    for row in rows:
        if row["routing"] == routing and "layer_s" in row:
            loads.setdefault(f"{row['model'].split('-')[0]}\n{row['tokens']}", []).append(row)
    series = []
    for name, words in RIVALS.items():
        found = {
            x: (best_of(ways, *words), best_of(ways, "grouped static")) for x, ways in loads.items()
        }
        both = {x: a["layer_s"] / b["layer_s"] for x, (a, b) in found.items() if a and b}
        series.append(Series(name=name, x=list(both), y=list(both.values()), kind="bars"))
    ranks = rows[0]["ranks"]
    return Chart(
        title=f"What an ungrouped router's layer takes on {ranks} x {device}",
        x_label=f"layer, tokens of all devices ({routing} routing)",
        y_label="time / grouped static",
        series=[one for one in series if one.x],
        caption="1 is the grouped router with static dispatch.",
        y_from_zero=True,
        reference=(1.0, ""),
    )
