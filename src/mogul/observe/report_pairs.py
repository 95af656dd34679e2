"""The report's figures of who is picked with whom: in one layer, and from a layer to the next."""

from __future__ import annotations

import numpy as np

from mogul.draw.chart import BLUE, GREY, Chart, HeatMap, Series
from mogul.observe import numbers
from mogul.spec.trace import Trace


def shown_layers(trace: Trace) -> list[int]:
    """Positions of the first, the middle and the last layer."""
    last = len(trace.meta.layers) - 1
    return sorted({0, last // 2, last})


def pairs_map(trace: Trace) -> HeatMap:
    """Pairs of experts one token picks in one layer."""
    model = trace.meta.model
    chosen, which = _shown_experts(trace)
    more = ""
    if model.num_groups == model.top_k > 1:
        more = " Pairs within a group are never picked together when a token picks once a group."
    panels = [
        (
            f"layer {trace.meta.layers[i]}",
            100 * numbers.pair_probability(trace, i)[chosen][:, chosen],
        )
        for i in shown_layers(trace)
    ]
    even = 100 * model.top_k * (model.top_k - 1) / (model.num_experts * (model.num_experts - 1))
    return HeatMap(
        title="Co-activation",
        x_label="expert (in the order of the caption)",
        y_label="expert",
        value_label="% of tokens that pick both",
        panels=panels,
        caption=f"Pairs among {which}; uniform picks would give {even:.2f} % everywhere.{more}",
    )


def _shown_experts(trace: Trace) -> tuple[list[int], str]:
    """Experts a map of pairs has room for, and how to call them."""
    model = trace.meta.model
    if model.num_groups == 1:
        chosen = list(range(min(16, model.num_experts)))
        return chosen, f"the first {len(chosen)} experts"
    size, groups = model.num_experts // model.num_groups, min(4, model.num_groups)
    per_group = min(4, size)
    chosen = [g * size + j for g in range(groups) for j in range(per_group)]
    return chosen, f"the first {per_group} experts of the first {groups} groups"


def transition_map(trace: Trace) -> HeatMap:
    """Which expert follows which from one layer to the next, over what chance would give."""
    chosen, which = _shown_experts(trace)
    layers = trace.meta.layers
    panels = [
        (
            f"layer {layers[i]} to {layers[i + 1]}",
            numbers.transition_lift(trace, i)[chosen][:, chosen],
        )
        for i in sorted({0, (len(layers) - 2) // 2, len(layers) - 2})
    ]
    top = max(2.0, float(np.quantile(np.concatenate([np.ravel(p) for _, p in panels]), 0.98)))
    return HeatMap(
        title="Transitions from layer to layer",
        x_label="expert of the next layer",
        y_label="expert",
        value_label="times as often as by chance",
        panels=panels,
        range=(0.0, top),
        caption=f"Rows: a pick in one layer; columns: picks of the same token in the next; {which} "
        "of both. 1 is chance; dark cells are paths that tokens take together, light ones paths "
        "they avoid.",
    )


def recall_chart(trace: Trace) -> Chart:
    """How many of the next picks follow from the last ones."""
    guesses = trace.meta.model.top_k
    layers = [str(layer) for layer in trace.meta.layers[1:]]
    known = [numbers.transition_recall(trace, i, guesses) for i in range(len(layers))]
    blind = [numbers.frequency_recall(trace, i, guesses) for i in range(len(layers))]
    return Chart(
        title="Guessing a layer's picks from those of the layer before",
        x_label="layer that is guessed",
        y_label="share of transitions guessed",
        series=[
            Series(name=f"{guesses} likeliest after each pick", x=layers, y=known, color=BLUE),
            Series(name=f"{guesses} busiest experts", x=layers, y=blind, color=GREY, dashed=True),
        ],
        y_range=(0.0, 1.02),
        caption="What prefetching experts from memory could hit. The distance between the lines "
        "is what knowing the layer before is worth.",
    )
