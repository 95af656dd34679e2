"""The demo's figures as data: what is plotted and what to see in it."""

from __future__ import annotations

import numpy as np

from mogul.bench.demo.balance import BalanceResult
from mogul.bench.demo.cast import Name
from mogul.bench.demo.cells import Cell
from mogul.bench.demo.learning import LearningResult
from mogul.draw.chart import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Chart, Figure, HeatMap, Series

COLORS: dict[Name, str] = {"MoGE": BLUE, "twin": ORANGE, "dense": GREY}
_MOGE_BLUES = (BLUE, PURPLE, GREEN)
_TWIN_REDS = (ORANGE, RED)


def figures(balance: BalanceResult, learning: LearningResult) -> dict[str, Figure]:
    """All figures by file name."""
    return {
        "rows": rows_figure(balance),
        "devices": example_figure(balance),
        "experts": experts_figure(balance),
        "loss": loss_figure(learning),
        "held_out": held_out_figure(learning),
        "shares": shares_figure(learning),
    }


def _series(cells: list[Cell], label: str, color: str, stat: str, *, dashed: bool) -> Series:
    cells = sorted(cells, key=lambda cell: cell.batch)
    spreads = [getattr(cell, stat) for cell in cells]
    return Series(
        name=label,
        kind="dots",
        x=[str(cell.batch) for cell in cells],
        y=[spread.mean for spread in spreads],
        low=[min(spread.low, spread.mean) for spread in spreads],
        high=[max(spread.high, spread.mean) for spread in spreads],
        color=color,
        dashed=dashed,
    )


def _by_devices(cells: tuple[Cell, ...], name: Name) -> dict[int, list[Cell]]:
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        if cell.model == name:
            found.setdefault(cell.devices, []).append(cell)
    return found


def rows_figure(result: BalanceResult) -> Chart:
    """Rho against batch size; all grouped device counts are one series, they are all 1."""
    moge = _by_devices(result.cells, "MoGE")
    counts = ", ".join(map(str, moge))
    series = [
        _series(
            moge[max(moge)], f"MoGE, {counts} devices: by construction", BLUE, "rho", dashed=False
        )
    ]
    twin, chance = _by_devices(result.cells, "twin"), _by_devices(result.uniform, "twin")
    for color, devices in zip(_TWIN_REDS, twin, strict=False):
        label = f"twin, {devices} devices"
        series.append(_series(twin[devices], label, color, "rho", dashed=False))
        series.append(
            _series(chance[devices], f"{label}, uniform picks", color, "rho", dashed=True)
        )
    return Chart(
        title="Rows: how much more the busiest device computes",
        x_label="sequences that decode together (batch)",
        y_label="rho = max / mean rows",
        y_range=(0.7, max(twin, default=1) + 0.2),
        series=series,
        reference=(1.0, "equal rows"),
        caption=(
            "Dots are means over decode steps and layers, bars reach from the 5th to the 95th "
            "percentile. The MoGE stands at 1 **by construction**, for any router: that is "
            "arithmetic, not a measurement. The twin's busiest device computes more, with its "
            "random routers (circles) and even when picks are uniformly random (diamonds)."
        ),
    )


def experts_figure(result: BalanceResult) -> Chart:
    """Delta against batch size, shown as it is."""
    series = []
    palettes: tuple[tuple[Name, tuple[str, ...]], ...] = (
        ("MoGE", _MOGE_BLUES),
        ("twin", _TWIN_REDS),
    )
    for name, colors in palettes:
        for color, (devices, cells) in zip(
            colors, _by_devices(result.cells, name).items(), strict=False
        ):
            label = f"{name}, {devices} devices"
            series.append(_series(cells, label, color, "delta", dashed=name == "twin"))
    return Chart(
        title="Distinct experts: how much more the busiest device reads",
        x_label="sequences that decode together (batch)",
        y_label="delta = max / mean experts",
        y_range=(0.7, max((cell.delta.high for cell in result.cells), default=1.0) + 0.3),
        series=series,
        reference=(1.0, "equal reading"),
        caption=(
            "In small-batch decode time follows the weights that are read, and those are the "
            "distinct experts, not the rows. Grouping evens them out at batch 1 (every group "
            "reads exactly one) and leaves a rest in between: delta is **not** 1 by construction."
        ),
    )


def example_figure(result: BalanceResult) -> HeatMap:
    """Rows of each device, step by step, in one layer."""
    devices = result.example_devices
    return HeatMap(
        title=f"{devices} devices at work: decode steps at batch {result.example_batch}",
        x_label="decode step",
        y_label="device",
        value_label="rows of the device / mean of the step",
        panels=[(name, np.asarray(rows)) for name, rows in result.example.items()],
        range=(0.0, float(devices)),
        caption=(
            f"Layer {result.example_layer}, random routers. A step ends when its darkest cell "
            "ends; the light cells of that column wait."
        ),
    )


def loss_figure(result: LearningResult) -> Chart:
    """The training loss of all three, step by step."""
    return Chart(
        title="Training loss on the same batches",
        x_label="step",
        y_label="loss, nats a token",
        series=[
            Series(
                name=one.model,
                x=list(range(1, one.training.steps + 1)),
                y=list(one.training.losses),
                color=COLORS[one.model],
                dashed=one.model == "MoGE",
            )
            # The MoGE is drawn last, dashed: it would hide the others, so close are they.
            for one in reversed(result.learners)
        ],
        caption=(
            "Each step is a new batch of text, easy or hard, so the curves jump, and they jump "
            "together: the models start from the same function. MoGE and twin carry the balance "
            "loss of their routers on top (about 0.01)."
        ),
    )


def held_out_figure(result: LearningResult) -> Chart:
    """Held-out loss before and after."""
    losses = [(one.before.nats_per_token, one.after.nats_per_token) for one in result.learners]
    names = [one.model for one in result.learners]
    low, high = min(map(min, losses)), max(map(max, losses))
    margin = max(0.15 * (high - low), 1e-3)
    return Chart(
        title="Held-out loss before and after",
        x_label="model",
        y_label="held-out loss, nats a token",
        y_range=(low - margin, high + margin),
        series=[
            Series(name="before", kind="dots", x=names, y=[a for a, _ in losses], color=GREY),
            Series(name="after", kind="dots", x=names, y=[b for _, b in losses], color=GREEN),
        ],
        caption=(
            "Cross-entropy on text none of them was trained on here; the axis does not start at "
            "zero. All three start at the same loss, because they compute the same function."
        ),
    )


def shares_figure(result: LearningResult) -> HeatMap:
    """Share of each expert in its group, layer by layer, after training."""
    panels = [
        (
            f"{one.model}: share in the picks of its group",
            np.asarray(one.routing_after.share_by_layer),
        )
        for one in result.learners
        if one.routing_after
    ]
    return HeatMap(
        title="Are all experts in use? After training",
        x_label="expert",
        y_label="layer",
        value_label="share of the picks of its group (0..1)",
        panels=panels,
        range=(0.0, 1.0),
        caption=(
            f"Even use is {1 / result.copies:.2f} everywhere. A dark cell is an expert that draws "
            "most tokens of its group. Random routers are uneven on real text, and the balance "
            "loss moves them slowly: so short a training leaves them much as they began."
        ),
    )
