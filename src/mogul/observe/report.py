"""The report page of one trace: what its experts do, device by device, layer by layer.

Sections follow a person's questions: is some expert too busy; what do my devices wait for, and how
does a placement help; which experts idle; who is picked together; can the next layer be guessed;
do experts specialise (arXiv 2505.21411, figures 7 to 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mogul.core.table import Table
from mogul.draw.chart import BLUE, GREY, Chart, HeatMap, Series
from mogul.draw.page import Page
from mogul.observe import numbers
from mogul.observe.report_devices import (
    Placements,
    device_charts,
    device_table,
    each_device_table,
    rows_chart,
)
from mogul.observe.report_pairs import pairs_map, recall_chart, shown_layers, transition_map
from mogul.observe.uniform import imbalance_chart
from mogul.spec.trace import Trace

_MAX_EXPERTS_SHOWN = 32
_MAX_TASKS_SHOWN = 6


def page_of(trace: Trace, found: Placements) -> Page:
    """Build the page."""
    model = trace.meta.model
    groups = f", {model.num_groups} groups" if model.num_groups > 1 else ""
    partial = "" if trace.meta.is_complete else " The run was cut off before its end."
    page = Page(
        f"The experts of {model.name}",
        f"{len(trace.meta.layers)} layers of {model.num_experts} experts, {model.top_k} picks a "
        f"token{groups}; {trace.meta.num_tokens:,} tokens of {', '.join(_data(trace))}.{partial}",
    )
    _facts(page, trace, found)
    page.section("Is some expert too busy?")
    page.figure(_load_map(trace))
    page.figure(_busiest_chart(trace))
    page.section("What do devices wait for?")
    page.table(device_table(trace, found))
    page.figure(rows_chart(trace, found))
    page.table(each_device_table(trace, *list(found.items())[-1]))
    for figure in device_charts(trace, found):
        page.figure(figure)
    page.figure(_distinct_chart(trace))
    if figure := _uniform_chart(trace, list(found)[-1]):
        page.figure(figure)
    page.section("Does the router choose?")
    _entropy(page, trace)
    page.table(_layer_table(trace))
    page.section("Who is picked together?")
    page.figure(pairs_map(trace))
    if len(trace.meta.layers) > 1:
        page.section("Can the next layer be guessed?")
        page.figure(transition_map(trace))
        page.figure(recall_chart(trace))
    _tasks(page, trace)
    page.footer(_small_print(trace))
    return page


def _data(trace: Trace) -> list[str]:
    return [name.rsplit(":", 1)[0] for name in trace.meta.data] or ["unnamed data"]


def _small_print(trace: Trace) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in trace.meta.versions.items())
    return (
        f"Trace schema {trace.meta.schema_version}, level {trace.meta.level}, seed "
        f"{trace.meta.seed}; weights {trace.meta.model.weights_hash or 'in memory'}; {versions}. "
        "The numbers stand in the JSON file beside this page."
    )


def _facts(page: Page, trace: Trace, found: Placements) -> None:
    layers = numbers.layer_numbers(trace)
    worst = int(layers.busiest.argmax())
    cards = [
        (
            f"{layers.busiest.max():.2f}x",
            "rows of the busiest expert over the mean",
            f"layer {layers.layers[worst]}; median layer {np.median(layers.busiest):.2f}x",
        )
    ]
    for devices, placement in list(found.items())[-2:]:
        before = numbers.whole_rho(trace, devices)[0]
        note = "no placement is balanced by construction"
        if placement:
            after = numbers.whole_rho(trace, devices, placement)[0]
            note = f"{after:.3f} with `mogul place --devices {devices}`"
        cards.append((f"{before:.3f}", f"rho on {devices} devices, contiguous", note))
    all_experts, cold = layers.dead.size * trace.meta.model.num_experts, int(layers.cold.sum())
    idle_note = f"of {all_experts:,}; {cold:,} below a tenth of the mean"
    cards.append((f"{int(layers.dead.sum()):,}", "experts without a row", idle_note))
    if layers.entropy is not None:
        cards.append(
            (f"{layers.entropy.mean():.2f}", "router entropy over ln E", "1: it does not choose")
        )
    page.facts(cards)


def _load_map(trace: Trace) -> HeatMap:
    mean_L1 = np.maximum(trace.count.mean(1, keepdims=True), 1e-30)
    return HeatMap(
        title="Load of every expert",
        x_label="expert",
        y_label="layer (in order)",
        value_label="rows over the mean of its layer",
        panels=[("", trace.count / mean_L1)],
        range=(0.0, float(max(2.0, np.quantile(trace.count / mean_L1, 0.99)))),
        caption="Each row is a layer with experts, each cell an expert. An even layer is one "
        "colour; dark cells are experts that others wait for. The colour scale ends at the 99th "
        "percentile.",
    )


def _busiest_chart(trace: Trace) -> Chart:
    found = numbers.layer_numbers(trace)
    return Chart(
        title="Busiest expert of each layer",
        x_label="layer",
        y_label="rows over the mean",
        series=[Series(name="busiest expert", x=list(found.layers), y=found.busiest.tolist())],
        reference=(1.0, "even"),
        y_from_zero=True,
        caption="With one expert a device, the whole layer waits this many times the mean.",
    )


def _uniform_chart(trace: Trace, devices: int) -> Chart | None:
    """What chance alone does on these devices; None where no grouping has as many groups."""
    model = trace.meta.model
    if devices == 1 or model.num_experts % devices or model.top_k % devices:
        return None
    return imbalance_chart(
        num_experts=model.num_experts, top_k=model.top_k, num_devices=devices, draws=4000
    )


def _distinct_chart(trace: Trace) -> Chart:
    model = trace.meta.model
    sizes = [
        (index, size)
        for index, size in enumerate(trace.meta.batch_sizes)
        if not np.isnan(numbers.mean_distinct(trace, index)).any()
    ]
    names = [str(size) for _, size in sizes]
    seen = [numbers.mean_distinct(trace, index) for index, _ in sizes]
    miss = 1 - model.top_k / model.num_experts
    even = [model.num_experts * (1 - miss**size) for _, size in sizes]
    return Chart(
        title="Distinct experts a batch touches in one layer",
        x_label="tokens in the batch",
        y_label="experts",
        series=[
            Series(
                name="this model (range over layers)",
                x=names,
                y=[float(v.mean()) for v in seen],
                low=[float(v.min()) for v in seen],
                high=[float(v.max()) for v in seen],
                color=BLUE,
            ),
            Series(name="uniform picks", x=names, y=even, color=GREY, dashed=True),
        ],
        y_from_zero=True,
        caption="Batches as they followed each other in the data, one position of all sequences "
        "after the other. Fewer distinct experts mean fewer bytes to read.",
    )


def _entropy(page: Page, trace: Trace) -> None:
    found = numbers.layer_numbers(trace)
    if found.entropy is None:
        page.prose("This model's routers show no scores, so their entropy is not known.")
        return
    page.figure(
        Chart(
            title="Entropy of the router's scores",
            x_label="layer",
            y_label="entropy over ln E",
            series=[Series(name="entropy", x=list(found.layers), y=found.entropy.tolist())],
            y_range=(0.0, 1.05),
            caption="Mean over tokens. Near 1 the router hardly prefers any expert; near 0 it is "
            "sure of one.",
        )
    )


def _layer_table(trace: Trace) -> Table:
    found = numbers.layer_numbers(trace)
    unknown: list[float | None] = [None] * len(found.layers)
    entropy = unknown if found.entropy is None else [round(float(v), 3) for v in found.entropy]
    rows = [
        (
            layer,
            round(float(found.busiest[i]), 3),
            int(found.dead[i]),
            int(found.cold[i]),
            entropy[i],
        )
        for i, layer in enumerate(found.layers)
    ]
    chosen = sorted(rows, key=lambda row: -row[1])[:8]
    return Table(
        "The most uneven layers",
        ("layer", "busiest / mean", "dead", "cold", "entropy / ln E"),
        sorted(chosen),
        ("dead: no row; cold: below a tenth of the mean. All layers stand in the JSON file.",),
    )


def _tasks(page: Page, trace: Trace) -> None:
    tokens_U = trace.get("task_count").sum((1, 2))
    tasks = [t for t in np.argsort(-tokens_U, kind="stable")[:_MAX_TASKS_SHOWN] if tokens_U[t]]
    page.section("Do experts specialise?")
    if len(tasks) > 1:
        special = numbers.specialisation(trace)
        page.figure(
            Chart(
                title="Specialisation by task",
                x_label="layer",
                y_label="distance between tasks",
                series=[Series(name="distance", x=list(trace.meta.layers), y=special.tolist())],
                y_from_zero=True,
                caption="Mean total variation between the tasks' expert shares: 0 when all tasks "
                "use the experts alike, 1 when no two share an expert.",
            )
        )
    else:
        page.prose(
            "The data has one task. Give several files, or lines with `task`, to see which experts "
            "serve which task."
        )
    for position in shown_layers(trace):
        page.figure(_share_chart(trace, position, tasks))


def _share_chart(trace: Trace, position: int, tasks: Sequence[int]) -> Chart:
    model = trace.meta.model
    share_UE = 100 * numbers.task_shares(trace, position)
    chosen = list(range(model.num_experts))
    which = "every expert"
    if model.num_groups > 1:
        size = model.num_experts // model.num_groups
        shown = max(1, min(model.num_groups, _MAX_EXPERTS_SHOWN // size))
        chosen = chosen[: shown * size]
        which = f"the first {shown} groups of {size} experts"
    elif model.num_experts > _MAX_EXPERTS_SHOWN:
        total_E = trace.count[position]
        chosen = np.sort(np.argsort(-total_E, kind="stable")[:_MAX_EXPERTS_SHOWN]).tolist()
        which = f"the {_MAX_EXPERTS_SHOWN} busiest experts"
    names = [str(expert) for expert in chosen]
    return Chart(
        title=f"Share of tokens that pick an expert, layer {trace.meta.layers[position]}",
        x_label="expert",
        y_label="% of the task's tokens",
        series=[
            Series(name=trace.meta.tasks[t], x=names, y=share_UE[t][chosen].tolist(), kind="bars")
            for t in tasks
        ],
        reference=(100 * model.top_k / model.num_experts, "uniform"),
        y_from_zero=True,
        caption=f"Shown: {which}.",
    )
