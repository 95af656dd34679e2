"""The part of the report about devices: what they wait for, before and after a placement.

Decides the tables and charts of rows and distinct experts by device and by batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mogul.core.errors import ConfigError
from mogul.core.table import Table
from mogul.draw.chart import BLUE, ORANGE, Chart, Series
from mogul.observe import numbers
from mogul.place.solve import Wish, place
from mogul.spec.placement import Placement
from mogul.spec.trace import Trace

BATCHES = (1, 4, 16, 64, 256)
SMALL_BATCH = 16
"""Tokens of the batch in which tables count distinct experts."""

_DEVICE_NOTE = (
    "rho: rows on the busiest device over the mean (whole trace). delta: the same for distinct "
    "experts, which decide the time of small batches. IS: (max - min rows) / tokens. Means over "
    "layers; 1, 1 and 0 are perfect."
)
_EACH_NOTE = (
    "The layer that is most uneven without a placement. Rows: the whole trace. Experts read: "
    f"distinct experts in a batch of {SMALL_BATCH} tokens, mean over batches."
)
_NO_PLACEMENT_NOTE = (
    "On {} devices there is no placement of whole groups, so nothing balances a MoGE there; "
    "legal counts: {}."
)
_STUCK = 1.05
_STUCK_NOTE = (
    "On {} devices some expert alone has more than a device's even share: no placement without "
    "replicas gets lower (`mogul place --replicas N`)."
)
_BALANCES = {
    "rho": ("Rows", "Rows on the busiest device over the mean: the time of large batches."),
    "delta": (
        "Distinct experts",
        (
            "Distinct experts on the busiest device over the mean: the time of small batches, "
            "where reading weights decides. Grouping evens it, but not to 1."
        ),
    ),
    "imbalance": ("Imbalance score IS", "(max - min rows) / tokens, as the MoGE paper counts."),
}

Placements = Mapping[int, Placement | None]
"""Device count -> the placement beside the contiguous one; None: there is none."""


def placements(trace: Trace, devices: Sequence[int]) -> dict[int, Placement | None]:
    """A placement for each device count; None where none is legal (a MoGE on other devices)."""
    found: dict[int, Placement | None] = {}
    for count in devices:
        try:
            found[count] = place(trace, Wish(num_devices=count))
        except ConfigError:
            if trace.meta.model.num_groups == 1:
                raise
            found[count] = None
    return found


def with_given(
    trace: Trace, devices: Sequence[int], given: Sequence[Placement]
) -> dict[int, Placement | None]:
    """Placements to show: a given one for its device count, else one that is found now.

    Raises:
        ConfigError: A placement of another model.
    """
    for one in given:
        one.model.check_same(trace.meta.model, what="the trace")
    known = {one.num_devices: one for one in given}
    others = [count for count in devices if count not in known]
    found = {**placements(trace, others), **known}
    return {count: found[count] for count in sorted(found)}


def default_devices(trace: Trace) -> tuple[int, ...]:
    """The device counts worth a look: legal ones of a MoGE, else powers of two."""
    model = trace.meta.model
    if model.num_groups > 1:
        return tuple(d for d in model.grouping.legal_devices() if d > 1)
    most = max(model.num_experts // 8, min(8, model.num_experts // 2))
    return tuple(d for d in (2, 4, 8, 16, 32, 64) if d <= most)[-3:] or (2,)


def device_table(trace: Trace, found: Placements) -> Table:
    """Tabulate rho over the whole trace, delta and IS of small batches, before and after."""
    rows, stuck = [], []
    for devices, placement in found.items():
        if placement and np.mean([one.rho_bound for one in placement.layers]) > _STUCK:
            stuck.append(str(devices))
        worst = round(numbers.whole_rho(trace, devices)[1], 3)
        rho, delta, imbalance = _balance(trace, devices)
        after = _balance(trace, devices, placement) if placement else (None, None, None)
        rows.append((devices, rho, worst, after[0], delta, after[1], imbalance, after[2]))
    notes = [_STUCK_NOTE.format(" and ".join(stuck))] if stuck else []
    if without := [str(devices) for devices, placement in found.items() if placement is None]:
        legal = ", ".join(map(str, trace.meta.model.grouping.legal_devices()))
        notes.append(_NO_PLACEMENT_NOTE.format(" and ".join(without), legal))
    return Table(
        "Devices",
        ("devices", "rho", "worst layer", "rho placed", "delta, batch 16", "delta placed",
         "IS, batch 16", "IS placed"),
        rows,
        (_DEVICE_NOTE, *notes),
    )  # fmt: skip


def _balance(trace: Trace, devices: int, placement: Placement | None = None) -> tuple[float, ...]:
    """Rho of the whole trace, delta and IS of small batches: means over layers."""
    small = numbers.device_balance(trace, devices, SMALL_BATCH, placement)
    rho = numbers.whole_rho(trace, devices, placement)[0]
    return round(rho, 3), round(small.delta, 3), round(small.imbalance, 3)


def each_device_table(trace: Trace, devices: int, placement: Placement | None) -> Table:
    """Rows and distinct experts of every device in the layer that is worst contiguously."""
    worst, _ = numbers.worst_layer(trace, devices)
    sides = [numbers.of_every_device(trace, worst, devices, SMALL_BATCH)]
    if placement:
        sides.append(numbers.of_every_device(trace, worst, devices, SMALL_BATCH, placement))
    columns = [
        values
        for rows_D, distinct_D in sides
        for values in (rows_D.round().astype(int), distinct_D.round(2))
    ]
    return Table(
        f"Every device, layer {trace.meta.layers[worst]}, {devices} devices",
        ("device", "rows", "experts read", "rows placed", "experts read, placed")[
            : 1 + len(columns)
        ],
        [(device, *(values[device].item() for values in columns)) for device in range(devices)],
        (_EACH_NOTE,),
    )


def device_charts(trace: Trace, found: Placements) -> list[Chart]:
    """Draw rho, delta and IS over batch sizes, on the most devices asked for."""
    devices, placement = list(found.items())[-1]
    plain = [numbers.device_balance(trace, devices, size) for size in BATCHES]
    sides = [("contiguous", plain, ORANGE)]
    if placement:
        placed = [numbers.device_balance(trace, devices, size, placement) for size in BATCHES]
        sides.append(("placed", placed, BLUE))
    names = [str(size) for size in BATCHES]
    charts = []
    for value, (title, caption) in _BALANCES.items():
        charts.append(
            Chart(
                title=f"{title} by batch size, {devices} devices",
                x_label="tokens in the batch",
                y_label={"imbalance": "IS"}.get(value, value),
                series=[
                    Series(name=name, x=names, y=[getattr(one, value) for one in side], color=color)
                    for name, side, color in sides
                ],
                reference=(0.0, "balanced") if value == "imbalance" else (1.0, "balanced"),
                y_from_zero=True,
                caption=caption,
            )
        )
    return charts


def rows_chart(trace: Trace, found: Placements) -> Chart:
    """Rows of every device in the layer that is worst without a placement."""
    devices, placement = list(found.items())[-1]
    worst, rows_D = numbers.worst_layer(trace, devices)
    names = [str(device) for device in range(devices)]
    sides = [("contiguous", rows_D, ORANGE)]
    if placement:
        placed_D = numbers.of_every_device(trace, worst, devices, SMALL_BATCH, placement)[0]
        sides.append(("placed", placed_D, BLUE))
    return Chart(
        title=f"Rows of every device, layer {trace.meta.layers[worst]}, {devices} devices",
        x_label="device",
        y_label="rows over the mean",
        series=[
            Series(name=name, x=names, y=(rows / rows_D.mean()).tolist(), color=color, kind="bars")
            for name, rows, color in sides
        ],
        reference=(1.0, "even"),
        y_from_zero=True,
        caption="The layer that is most uneven without a placement. All devices wait for the "
        "tallest bar.",
    )
