"""A chart as data: what is shown, not how. Plotly and Matplotlib both draw it.

Every chart has a title, labelled axes with units and a caption that says what to see in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mogul.core.errors import ConfigError

BLUE, ORANGE, GREY = "#3b7ddd", "#e07b24", "#8a93a0"
GREEN, RED, PURPLE = "#2a9d76", "#d1495b", "#8e6bd0"
PALETTE = (BLUE, ORANGE, GREY, GREEN, RED, PURPLE)

HEAT = ((0.0, "#dfe9f8"), (0.35, "#8db4ec"), (0.7, "#2f62b5"), (1.0, "#0c2350"))
"""Light to dark; the light end is visible on white, the dark end on black."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One named set of points."""

    name: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower ends of a range around y."""
    high: Sequence[float] | None = None
    kind: Literal["line", "dots", "bars"] = "line"
    color: str = ""
    """Empty: the next of the palette."""
    dashed: bool = False

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.x, self.y, self.low, self.high) if part is not None}
        if len(lengths) != 1:
            raise ConfigError(f"series {self.name!r}: x, y, low and high differ in length")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over common axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    caption: str
    y_from_zero: bool = False
    y_range: tuple[float, float] | None = None
    is_log: bool = False
    """Both axes in powers of ten."""
    reference: tuple[float, str] | None = None
    """A horizontal line and its name: the ideal, or the limit."""

    @property
    def categories(self) -> list[str] | None:
        """The names on the x axis where it has names instead of numbers."""
        names = [x for series in self.series for x in series.x if isinstance(x, str)]
        return list(dict.fromkeys(names)) or None

    def color_of(self, index: int) -> str:
        """The colour of one series."""
        return self.series[index].color or PALETTE[index % len(PALETTE)]


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Panels of cells that share one colour scale."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    """What a cell's colour means, with its unit."""
    panels: Sequence[tuple[str, np.ndarray]]
    """Name and values [rows, columns] of each panel; row 0 is at the top."""
    caption: str
    range: tuple[float, float] | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The common colour range: the given one, or that of all cells."""
        if self.range:
            return self.range
        values = np.concatenate([np.ravel(value) for _, value in self.panels])
        return float(values.min()), float(values.max())


Figure = Chart | HeatMap
