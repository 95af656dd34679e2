"""`report.html` of a run: curves of loss, speed and balance, and maps of the experts' loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mogul.core.errors import ArtifactError
from mogul.core.files import read_json
from mogul.core.units import show_count
from mogul.draw.chart import Chart, HeatMap, Series
from mogul.draw.page import Page
from mogul.train.metrics import LOADS_FILE, METRICS_FILE, read_lines
from mogul.train.recipe_file import RECIPE_FILE

REPORT_FILE = "report.html"
CURVES = (
    ("Loss", "nats a token", ("loss", "held_out_loss"), "Mean of each interval; held-out text."),
    ("Bits per byte", "bits", ("bits_per_byte",), "Held-out text, whatever the tokenizer."),
    ("Gradient norm", "norm before clipping", ("grad_norm",), "Jumps announce trouble."),
    ("Learning rate", "rate", ("lr",), "The schedule as it was run."),
    ("Speed", "tokens/s", ("tokens_per_s",), "Saves and tests are not in it."),
    ("MFU", "share of peak", ("mfu",), "Model FLOP (6 an active parameter, causal attention)."),
    (
        "MaxVio",
        "busiest / mean - 1",
        ("max_vio", "max_vio_in_groups", "max_vio_step"),
        "0: even use. In groups: the worst of a layer. Step: single steps, where a bias swings.",
    ),
    ("Dead experts", "experts", ("dead_experts",), "Without a row in the interval."),
)

FROM_ZERO = ("Speed", "MFU", "MaxVio", "Dead experts")


def write_report(folder: Path) -> Path:
    """Write the page of a run folder.

    Raises:
        ArtifactError: The folder holds no metrics.
    """
    lines = read_lines(folder / METRICS_FILE)
    if not lines:
        raise ArtifactError(f"{folder} holds no {METRICS_FILE} with a line", fix="train first")
    page = Page(f"Training of {folder.name}", _lead(lines))
    page.facts(_facts(lines))
    page.section("Curves")
    for title, unit, keys, caption in CURVES:
        if chart := _chart(lines, title, unit, keys, caption):
            page.figure(chart)
    for prefix, what in (("rho_", "rows"), ("delta_", "distinct experts of 16 tokens")):
        keys = tuple(key for key in lines[-1] if key.startswith(prefix))
        caption = f"Busiest device over the mean, {what}; 1 is even. Contiguous placement."
        if chart := _chart(lines, prefix.rstrip("_"), "busiest / mean", keys, caption):
            page.figure(chart)
    if loads := read_lines(folder / LOADS_FILE):
        page.section("Loads")
        page.figure(_load_maps(loads))
    page.footer(_small_print(folder))
    return page.write(folder / REPORT_FILE)


def _lead(lines: Sequence[dict[str, Any]]) -> str:
    last = lines[-1]
    return f"{last['step']:,} steps, {show_count(last['tokens'])} tokens, loss {last['loss']:.3f}."


def _facts(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    last = lines[-1]
    speed = float(np.median([line["tokens_per_s"] for line in lines]))
    facts = [(f"{last['loss']:.3f}", "nats a token, training", f"from {lines[0]['loss']:.3f}")]
    if "bits_per_byte" in last:
        facts.append((f"{last['bits_per_byte']:.3f}", "bits per byte", "held-out text"))
    facts.append((show_count(round(speed)), "tokens/s", "median of the intervals"))
    if "mfu" in last:
        mfu = float(np.median([line["mfu"] for line in lines if "mfu" in line]))
        facts.append((f"{mfu:.1%}", "MFU", "median of the intervals"))
    if "max_vio_in_groups" in last:
        facts.append((f"{last['max_vio_in_groups']:.2f}", "MaxVio in groups", "last interval"))
        facts.append((f"{last['dead_experts']:.0f}", "dead experts", "last interval"))
    return facts


def _chart(
    lines: Sequence[dict[str, Any]], title: str, unit: str, keys: Sequence[str], caption: str
) -> Chart | None:
    series = []
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            steps, values = zip(*points, strict=True)
            kind = "dots" if len(points) == 1 else "line"
            series.append(Series(name=key.replace("_", " "), x=steps, y=values, kind=kind))
    if all(len(one.x) == 1 for one in series):  # one point is a number, and stands above
        return None
    return Chart(
        title=title,
        x_label="step",
        y_label=unit,
        series=series,
        caption=caption,
        y_from_zero=title in FROM_ZERO,
    )


def _load_maps(loads: Sequence[dict[str, Any]]) -> HeatMap:
    chosen = [loads[0], loads[len(loads) // 2], loads[-1]][-min(3, len(loads)) :]
    panels = []
    for line in chosen:
        rows = np.asarray(line["rows"], dtype=float)
        mean = np.maximum(rows.mean(axis=1, keepdims=True), 1e-9)
        panels.append((f"step {line['step']}", rows / mean))
    return HeatMap(
        title="Rows of every expert",
        x_label="expert",
        y_label="layer with experts",
        value_label="rows over the layer's mean",
        panels=panels,
        caption="Each cell is an expert of a layer; 1 is its even share.",
    )


def _small_print(folder: Path) -> str:
    content = read_json(folder / RECIPE_FILE) if (folder / RECIPE_FILE).exists() else {}
    versions = content.get("versions", {})
    return ", ".join(f"{name} {version}" for name, version in versions.items())
