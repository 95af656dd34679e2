"""Draw a chart with Plotly, as one HTML fragment that needs plotly.js on the page.

Backgrounds are transparent and text is mid-grey: a figure reads on light and on dark pages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from mogul.draw.chart import HEAT, Chart, Figure, HeatMap, Series

_INK, _GRID = "#858d98", "rgba(133,141,152,0.25)"
_FONT = {"family": "system-ui, sans-serif", "size": 13, "color": _INK}
_AXIS = {
    "gridcolor": _GRID,
    "zeroline": False,
    "linecolor": _GRID,
    "automargin": True,
    "fixedrange": True,
    "title": {"standoff": 8},
}


def plotly_script() -> str:
    """plotly.js as text, to be inlined once in a page."""
    return get_plotlyjs()


def plotly_fragment(figure: Figure, element_id: str) -> str:
    """One <div> with its script; its size follows the page."""
    drawn = _heat_map(figure) if isinstance(figure, HeatMap) else _chart(figure)
    config = {"displayModeBar": False, "displaylogo": False, "responsive": True}
    return drawn.to_html(full_html=False, include_plotlyjs=False, div_id=element_id, config=config)


def _layout(height: int) -> dict[str, Any]:
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": _FONT,
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 28, "b": 44},
        "hoverlabel": {"font": {"family": _FONT["family"]}},
    }


def _chart(chart: Chart) -> go.Figure:
    figure = go.Figure()
    for index, series in enumerate(chart.series):
        figure.add_trace(_trace(series, chart.color_of(index)))
    figure.update_layout(
        **_layout(380),
        barmode="group",
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        showlegend=len(chart.series) > 1,
    )
    figure.update_xaxes(**_AXIS, title_text=chart.x_label)
    figure.update_yaxes(**_AXIS, title_text=chart.y_label)
    places = {x for series in chart.series for x in series.x}
    if len(places) <= 12 and all(isinstance(x, int) for x in places):
        figure.update_xaxes(dtick=1)  # no half layers
    if chart.categories:
        figure.update_layout(scattermode="group")
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=chart.categories)
    if chart.is_log:
        figure.update_xaxes(type="log")
        figure.update_yaxes(type="log")
    elif chart.y_range:
        figure.update_yaxes(range=chart.y_range)
    else:
        figure.update_yaxes(rangemode="tozero" if chart.y_from_zero else "normal")
    if chart.reference:
        value, name = chart.reference
        figure.add_hline(
            y=value, line={"dash": "dot", "color": _INK, "width": 1.5}, annotation_text=name,
            annotation_font={"color": _INK, "size": 12}, annotation_xanchor="right",
            annotation_yanchor="bottom", annotation_x=1, annotation_y=value,
        )  # fmt: skip
    return figure


def _trace(series: Series, color: str) -> go.Bar | go.Scatter:
    error = None
    if series.low is not None and series.high is not None:
        error = {
            "type": "data",
            "symmetric": False,
            "array": [h - y for h, y in zip(series.high, series.y, strict=True)],
            "arrayminus": [y - w for w, y in zip(series.low, series.y, strict=True)],
            "thickness": 1.5,
            "width": 3,
            "color": color,
        }
    common: dict[str, Any] = {"x": list(series.x), "y": list(series.y), "name": series.name}
    if series.kind == "bars":
        return go.Bar(**common, marker={"color": color}, error_y=error)
    if series.kind == "dots":
        # offsetgroup puts the dots of one category side by side.
        marker = {"color": color, "size": 9, "symbol": "diamond" if series.dashed else "circle"}
        return go.Scatter(
            **common, mode="markers", marker=marker, error_y=error, offsetgroup=series.name
        )
    line = {"color": color, "width": 2.2, "dash": "dash" if series.dashed else "solid"}
    # One offset group for all lines: over categories they stay on their category.
    return go.Scatter(**common, mode="lines", line=line, error_y=error, offsetgroup="lines")


def _heat_colours(heat: HeatMap, bar_y: float) -> dict[str, Any]:
    """The common scale of all panels, its bar below them at a share of the plot's height."""
    low, high = heat.limits
    return {
        "colorscale": [list(stop) for stop in HEAT],
        "cmin": low,
        "cmax": high,
        "colorbar": {
            "title": {"text": heat.value_label, "side": "top"},
            "orientation": "h",
            "thickness": 10,
            "y": bar_y,
            "yanchor": "top",
        },
    }


def _heat_map(heat: HeatMap) -> go.Figure:
    names = [name for name, _ in heat.panels]
    height = 150 + sum(60 + min(28 * len(values), 260) for _, values in heat.panels)
    figure = make_subplots(
        rows=len(names), cols=1, subplot_titles=names, vertical_spacing=70 / height
    )
    for row, (name, values) in enumerate(heat.panels, start=1):
        trace = go.Heatmap(
            z=values,
            coloraxis="coloraxis",
            name=name,
            xgap=1,
            ygap=1,
            hovertemplate=(
                f"{heat.x_label}: %{{x}}<br>{heat.y_label}: %{{y}}<br>"
                f"{heat.value_label}: %{{z:.3g}}<extra>{name}</extra>"
            ),
        )
        figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(row=row, col=1, title_text=heat.y_label, autorange="reversed")
        if np.shape(values)[1] <= 8:
            figure.update_xaxes(row=row, col=1, dtick=1)
    below = -66 / (height - 130)  # of the plot, without its margins
    figure.update_layout(**_layout(height), coloraxis=_heat_colours(heat, below))
    figure.update_xaxes(**{**_AXIS, "showgrid": False})
    figure.update_yaxes(**{**_AXIS, "showgrid": False}, dtick=_tick(heat))
    figure.update_xaxes(title_text=heat.x_label, row=len(names), col=1)
    figure.update_annotations(font={"size": 13, "color": _INK})
    return figure


def _tick(heat: HeatMap) -> int:
    return max(1, max(len(values) for _, values in heat.panels) // 6)
