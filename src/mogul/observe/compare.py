"""Two traces side by side: another data set, or the same model before and after something."""

from __future__ import annotations

import numpy as np

from mogul.core.errors import ConfigError
from mogul.core.table import Table
from mogul.draw.chart import BLUE, ORANGE, Chart, Series
from mogul.draw.page import Page
from mogul.observe import numbers
from mogul.spec.trace import Trace


def check_comparable(first: Trace, second: Trace) -> None:
    """Raise ConfigError unless both traces have the same layers and experts."""
    for what in ("num_experts", "top_k"):
        a, b = getattr(first.meta.model, what), getattr(second.meta.model, what)
        if a != b:
            raise ConfigError(
                f"the traces cannot be compared: {what} is {a} in one and {b} in the other",
                fix="compare traces of models of one shape",
            )
    if first.meta.layers != second.meta.layers:
        raise ConfigError(
            "the traces cannot be compared: they have other layers with experts",
            fix="compare traces of models of one shape",
        )


def comparison(first: Trace, second: Trace) -> Table:
    """Means over layers of both, and how far apart their loads are."""
    check_comparable(first, second)
    a, b = numbers.layer_numbers(first), numbers.layer_numbers(second)
    rows: list[tuple[object, ...]] = [
        ("tokens", first.meta.num_tokens, second.meta.num_tokens, None)
    ]

    def add(name: str, one: np.ndarray, two: np.ndarray) -> None:
        left, right = float(np.mean(one)), float(np.mean(two))
        rows.append((name, round(left, 4), round(right, 4), round(right - left, 4)))

    add("busiest expert / mean rows", a.busiest, b.busiest)
    add("dead experts a layer", a.dead, b.dead)
    add("cold experts a layer", a.cold, b.cold)
    if a.entropy is not None and b.entropy is not None:
        add("router entropy / ln E", a.entropy, b.entropy)
    for index, size in enumerate(first.meta.batch_sizes):
        if second.meta.batch_sizes[index : index + 1] == (size,):
            pair = [numbers.mean_distinct(trace, index) for trace in (first, second)]
            if not np.isnan(pair).any():
                add(f"distinct experts, batch of {size}", *pair)
    distance = numbers.load_distance(first, second)
    rows.append(("distance of the loads, 0..1", None, None, round(float(distance.mean()), 4)))
    same = first.meta.model.weights_hash == second.meta.model.weights_hash
    notes = ["means over layers; the distance is the total variation between expert loads"]
    if not same:
        notes.append("the traces are of different weights")
    return Table(
        f"{first.meta.model.name} and {second.meta.model.name}",
        ("mean over layers", "first", "second", "change"),
        rows,
        notes,
    )


def compare_page(first: Trace, second: Trace) -> Page:
    """The page of two traces."""
    table = comparison(first, second)
    page = Page(
        "Two traces",
        f"First: {_about(first)}. Second: {_about(second)}.",
    )
    page.table(table)
    layers = list(first.meta.layers)
    page.figure(
        Chart(
            title="Distance of the expert loads",
            x_label="layer",
            y_label="total variation",
            series=[
                Series(name="distance", x=layers, y=numbers.load_distance(first, second).tolist())
            ],
            y_from_zero=True,
            caption="0: both use the experts alike; 1: they share no expert.",
        )
    )
    sides = [("first", numbers.layer_numbers(first)), ("second", numbers.layer_numbers(second))]
    page.figure(
        Chart(
            title="Busiest expert of each layer",
            x_label="layer",
            y_label="rows over the mean",
            series=[
                Series(name=name, x=layers, y=found.busiest.tolist(), color=color)
                for (name, found), color in zip(sides, (ORANGE, BLUE), strict=True)
            ],
            reference=(1.0, "even"),
            y_from_zero=True,
            caption="Lower is more even.",
        )
    )
    return page


def _about(trace: Trace) -> str:
    data = ", ".join(name.rsplit(":", 1)[0] for name in trace.meta.data) or "unnamed data"
    return f"{trace.meta.model.name}, {trace.meta.num_tokens:,} tokens of {data}"
