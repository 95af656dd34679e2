"""Draw a chart with Matplotlib into a PNG file: for papers, slides and plain readers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas

from mogul.core.files import atomic_write
from mogul.draw.chart import HEAT, Chart, Figure, HeatMap, Series

_INK, _GRID = "#3c434d", "#e3e7ec"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": "#b6bec9",
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write the chart as a PNG of about 1200 pixels' width; returns its path."""
    with mpl.rc_context(_STYLE):
        canvas = _heat_map(figure) if isinstance(figure, HeatMap) else _chart(figure)
        data = io.BytesIO()
        canvas.savefig(data, format="png", dpi=160, facecolor="white", bbox_inches="tight")
    atomic_write(path, data.getvalue())
    return Path(path)


def _chart(chart: Chart) -> Canvas:
    canvas = Canvas(figsize=(7.5, 4.2), layout="constrained")
    axes = canvas.subplots()
    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    for index, series in enumerate(chart.series):
        _draw(axes, chart, series, index)
    if chart.categories:
        axes.set_xticks(range(len(chart.categories)), chart.categories)
    if chart.reference:
        value, name = chart.reference
        axes.axhline(value, color=_INK, linestyle=":", linewidth=1.2)
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), xytext=(0, -4),
            textcoords="offset points", ha="right", va="top", fontsize=9,
        )  # fmt: skip
    if chart.is_log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    elif chart.y_range:
        axes.set_ylim(*chart.y_range)
    elif chart.y_from_zero:
        axes.set_ylim(bottom=0)
    if len(chart.series) > 1:
        # More columns of long names than fit would squeeze the axes.
        columns = 2 if max(len(series.name) for series in chart.series) > 24 else 3
        below = -0.23 if any("\n" in name for name in chart.categories or ()) else -0.16
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns, frameon=False)
    return canvas


def _draw(axes: Axes, chart: Chart, series: Series, index: int) -> None:
    color, names = chart.color_of(index), chart.categories
    x = np.asarray([names.index(str(v)) for v in series.x] if names else series.x, dtype=float)
    y = np.asarray(series.y, dtype=float)
    error = None
    if series.low is not None and series.high is not None:
        error = np.stack([y - np.asarray(series.low), np.asarray(series.high) - y])
    if series.kind == "line":
        axes.plot(x, y, color=color, label=series.name, linestyle="--" if series.dashed else "-")
        return
    width = 0.8 / len(chart.series) if names else 0.8
    if names:
        x = x + (index - (len(chart.series) - 1) / 2) * width
    if series.kind == "bars":
        axes.bar(x, y, 0.92 * width, color=color, label=series.name, yerr=error)
    else:
        marker = "D" if series.dashed else "o"
        axes.errorbar(
            x, y, yerr=error, fmt=marker, color=color, label=series.name, capsize=2, markersize=5
        )


def _separate_cells(axes: Axes, shape: tuple[int, ...]) -> None:
    for edge in range(1, shape[1]):
        axes.axvline(edge - 0.5, color="white", linewidth=0.7)
    for edge in range(1, shape[0]):
        axes.axhline(edge - 0.5, color="white", linewidth=0.7)


def _heat_map(heat: HeatMap) -> Canvas:
    heights = [0.9 + min(0.18 * len(values), 1.8) for _, values in heat.panels]
    canvas = Canvas(figsize=(7.5, 1.0 + sum(heights)), layout="constrained")
    panels = canvas.subplots(
        len(heat.panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    canvas.suptitle(heat.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    colors = LinearSegmentedColormap.from_list("heat", HEAT)
    low, high = heat.limits
    image = None
    for axes, (name, values) in zip(panels, heat.panels, strict=True):
        image = axes.imshow(
            values, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest"
        )
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel(heat.y_label)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        _separate_cells(axes, np.shape(values))
    panels[-1].set_xlabel(heat.x_label)
    if image is not None:
        canvas.colorbar(image, ax=list(panels), label=heat.value_label, shrink=0.8)
    return canvas
