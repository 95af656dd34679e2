"""One HTML page a run: where the time and memory go, the front, balance, sensitivity, accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mogul.core.errors import ConfigError
from mogul.core.table import Table
from mogul.core.units import show_s
from mogul.draw.chart import Chart, HeatMap, Series
from mogul.draw.page import Page
from mogul.simulate.run import Prediction, predict
from mogul.simulate.sweep import Searched
from mogul.simulate.tables import front_table, memory_table, point_tables
from mogul.simulate.validate.scoreboard import Score

MOST_BATCH_POWER = 13
"""Batches up to 4,096 a copy are priced for the front of a point."""

KNOBS = ("memory bandwidth", "peak arithmetic", "link bandwidth", "launch and host time")


def point_page(p: Prediction) -> Page:
    """The page of one point."""
    device, layout = p.setting.device, p.setting.parallel
    page = Page(
        f"{p.setting.title} on {layout.devices} x {device.title}",
        f"{layout.describe()}; {p.workload.input_tokens} + {p.workload.output_tokens} tokens, "
        f"{p.workload.batch} requests in flight",
    )
    low, middle, high = p.tpot_band()
    page.facts(
        [
            (show_s(p.ttft_s), "TTFT", ""),
            (show_s(middle), "TPOT", f"p10 {show_s(low)}, p90 {show_s(high)}"),
            (f"{p.tokens_per_s_per_device:,.0f}", "tokens/s a device", p.decode.binding),
        ]
    )
    page.table(point_tables(p)[0])
    page.figure(_batches_chart(p))
    _sections(page, p)
    _how_far_off(page)
    return page


def _batches_chart(p: Prediction) -> Chart:
    """The front of one layout: what other batches of it reach."""
    found: list[Prediction] = []
    for power in range(MOST_BATCH_POWER):
        batch = p.setting.parallel.dp * 2**power
        try:
            found.append(predict(p.setting, p.workload.replace(batch=batch)))
        except ConfigError:  # the first batch that does not fit
            break
    shown = [one for one in found if one.meets_targets()] or found
    return Chart(
        title="Throughput against speed for the user",
        x_label="tokens/s a user",
        y_label="tokens/s a device",
        series=(
            Series(
                name="this point",
                x=[p.tokens_per_s_per_user],
                y=[p.tokens_per_s_per_device],
                kind="dots",
            ),
            Series(
                name="this layout at other batches",
                x=[one.tokens_per_s_per_user for one in shown],
                y=[one.tokens_per_s_per_device for one in shown],
            ),
        ),
        caption=f"Batches of {shown[0].workload.batch} to {shown[-1].workload.batch} that fit"
        f"{' and meet the targets' if len(shown) < len(found) else ''}; `mogul simulate sweep` "
        "tries other layouts.",
        y_from_zero=True,
    )


def _sections(page: Page, p: Prediction) -> None:
    """What every page of a deployment has: time, memory, balance, sensitivity, sources."""
    page.section("Where the time goes")
    page.figure(_breakdown_chart(p))
    page.section("Memory")
    page.figure(_memory_chart(p))
    page.table(memory_table(p))
    if p.decode.loads:
        page.section("Balance")
        page.figure(_load_map(p))
    page.section("What would change it")
    page.figure(_sensitivity(p))
    page.section("How it is known")
    parts_of: dict[str, set[str]] = {}
    for timed in p.decode.operators:
        for source in timed.estimate.sources:
            parts_of.setdefault(source, set()).add(timed.operator.part)
    told = (f"{', '.join(sorted(parts))}: {source}" for source, parts in sorted(parts_of.items()))
    page.prose(f"Most of the decode step is **{p.tier}**.", *told)


def _how_far_off(page: Page) -> None:
    """Published deployments beside their predictions: how much to believe of the page."""
    from mogul.simulate.validate.scoreboard import scores

    page.section("Predicted against measured")
    for score in scores(("published",)):
        if score.pairs:
            page.figure(_pairs_chart(score))


def _memory_chart(p: Prediction) -> Chart:
    names = list(p.memory.parts)
    sizes = [p.memory.parts[name] / 2**30 for name in names]
    room = p.memory.capacity_bytes / 2**30
    return Chart(
        title="Memory of the fullest device",
        x_label="part",
        y_label="GiB",
        series=(Series(name="GiB", x=names, y=sizes, kind="bars"),),
        caption=f"{sum(sizes):.1f} GiB of the {room:.1f} GiB the engine may use.",
        y_from_zero=True,
        reference=(room, "what the engine may use"),
    )


def _breakdown_chart(p: Prediction) -> Chart:
    decode, prefill = p.decode.parts(), p.prefill.parts()
    names = sorted(decode, key=lambda name: -decode[name])
    shares = [100 * prefill.get(name, 0.0) / sum(prefill.values()) for name in names]
    return Chart(
        title="Parts of a decode and a prompt step",
        x_label="part",
        y_label="share of the step, %",
        series=(
            Series(
                name="decode",
                x=names,
                y=[100 * decode[name] / sum(decode.values()) for name in names],
                kind="bars",
            ),
            Series(name="prompt", x=names, y=shares, kind="bars"),
        ),
        caption=f"A decode step takes {show_s(p.decode.seconds)}, "
        f"a prompt {show_s(p.prefill.seconds)}.",
        y_from_zero=True,
    )


def _load_map(p: Prediction) -> HeatMap:
    loads = [load for _, load in p.decode.loads]
    rows = np.stack([load.rows_D / max(load.rows_D.mean(), 1e-9) for load in loads])
    distinct = np.stack([load.distinct_D / max(load.distinct_D.mean(), 1e-9) for load in loads])
    first = loads[0]
    return HeatMap(
        title="Expected load of every rank over the mean",
        x_label="rank",
        y_label="layers",
        value_label="over the mean",
        panels=(("rows", rows), ("distinct experts", distinct)),
        caption="A row is a kind of layer. Within one step the busiest rank has rho "
        f"{first.rho:.2f} times the mean rows and delta {first.delta:.2f} times the mean distinct "
        "experts.",
        range=(0.5, 2.0),
    )


def _sensitivity(p: Prediction) -> Chart:
    """TPOT when one property of the machine is 20 % better."""
    gains = [100 * (1 - _with_knob(p, knob) / p.tpot_s) for knob in KNOBS]
    return Chart(
        title="TPOT saved by a machine that is 20 % better in one thing",
        x_label="property",
        y_label="TPOT saved, %",
        series=(Series(name="saved", x=KNOBS, y=gains, kind="bars"),),
        caption="Where a bar is small, paying for that property buys nothing here.",
        y_from_zero=True,
    )


def _with_knob(p: Prediction, knob: str) -> float:
    """TPOT with one property improved; time shares move as their limits do."""
    limits = p.decode.limits()
    total = sum(limits.values())
    share = {
        "memory bandwidth": limits.get("memory", 0.0),
        "peak arithmetic": limits.get("arithmetic", 0.0),
        "link bandwidth": limits.get("communication", 0.0),
        "launch and host time": limits.get("launches", 0.0) + limits.get("host", 0.0),
    }[knob]
    return p.tpot_s * (1 - share / total * (1 - 1 / 1.2))


def sweep_page(found: Searched) -> Page:
    """The page of a search."""
    page = Page("Deployments", f"{len(found.points)} points priced")
    page.table(front_table(found))
    page.figure(_front_chart(found))
    if found.front:
        best = found.front[-1]
        page.section("The point with the highest throughput")
        page.table(point_tables(best)[0])
        _sections(page, best)
    _how_far_off(page)
    return page


def _front_chart(found: Searched) -> Chart:
    every = Series(
        name="all points",
        x=[p.tokens_per_s_per_user for p in found.points],
        y=[p.tokens_per_s_per_device for p in found.points],
        kind="dots",
    )
    best = Series(
        name="front",
        x=[p.tokens_per_s_per_user for p in found.front],
        y=[p.tokens_per_s_per_device for p in found.front],
    )
    return Chart(
        title="Throughput against speed for the user",
        x_label="tokens/s a user",
        y_label="tokens/s a device",
        series=(every, best) if found.front else (every,),
        caption="The line joins the points that meet the targets and nothing else beats.",
        y_from_zero=True,
    )


def validation_page(scores: Sequence[Score], bars: Table) -> Page:
    """The page of a validation run."""
    page = Page("Predicted against measured", "Every accuracy table with its bar.")
    page.table(bars)
    for score in scores:
        page.section(score.table.title)
        if score.pairs:
            page.figure(_pairs_chart(score))
        if score.ratios:
            page.figure(_ratio_chart(score))
        page.table(score.table)
    return page


def _pairs_chart(score: Score) -> Chart:
    """Predicted over measured, with the diagonal."""
    measured = np.array([one for one, _ in score.pairs])
    predicted = np.array([one for _, one in score.pairs])
    ends = [
        float(min(measured.min(), predicted.min())),
        float(max(measured.max(), predicted.max())),
    ]
    off = np.abs(predicted / measured - 1)
    return Chart(
        title=f"{score.table.title}: every row",
        x_label="measured",
        y_label="predicted",
        series=(
            Series(name="rows", x=measured.tolist(), y=predicted.tolist(), kind="dots"),
            Series(name="perfect", x=ends, y=ends, dashed=True),
        ),
        is_log=True,
        caption=f"{len(off)} rows; half of them are within {100 * np.median(off):.0f} %, nine of "
        f"ten within {100 * np.quantile(off, 0.9):.0f} %.",
    )


def _ratio_chart(score: Score) -> Chart:
    names = [name for name, _ in score.ratios]
    values = [value for _, value in score.ratios]
    return Chart(
        title="Predicted over measured",
        x_label="row",
        y_label="ratio",
        series=(Series(name="predicted / measured", x=names, y=values, kind="dots"),),
        caption="1 is a perfect prediction.",
        y_from_zero=True,
        reference=(1.0, "measured"),
    )


def tables_page(title: str, tables: Sequence[Table]) -> Page:
    """The page of a run whose result is its tables."""
    page = Page(title)
    for table in tables:
        page.table(table)
    return page
