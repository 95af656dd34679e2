"""`mogul report`: what a trace says, on the terminal and as one HTML file; two traces compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from typing import Any

    from mogul.spec.trace import Trace

EXAMPLES = """
examples:
  mogul report trace/
  mogul report trace/ --devices 4 8 --html experts.html
  mogul report trace/ --placement placement.json
  mogul report before/ after/
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Show which experts the devices wait for, and what a placement would change.

    Writes one self-contained HTML page and the numbers as JSON beside it.
    """

    traces: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TRACE...")]
    """One trace folder, or two to compare."""
    devices: tuple[int, ...] = ()
    """Device counts to look at; by default the legal ones of a MoGE, else powers of two."""
    placement: tuple[Path, ...] = ()
    """placement.json of `mogul place`: shown for its device count instead of a new one."""
    html: Path | None = None
    """The page; by default report.html in the (first) trace folder."""
    no_html: bool = False
    """Print only."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Print the summary and write the page."""
    from mogul.core.errors import ConfigError
    from mogul.spec.trace import load_trace

    if len(options.traces) not in (1, 2):
        raise ConfigError(
            f"{len(options.traces)} traces were given", fix="give one, or two to compare"
        )
    traces = [load_trace(folder) for folder in options.traces]
    for folder, trace in zip(options.traces, traces, strict=True):
        if not trace.count.any():
            raise ConfigError(f"{folder} counts no token", fix="trace some text first")
    if len(traces) == 2:
        return _compare(options, *traces)
    return _report(options, traces[0])


def _check_devices(options: Options, trace: Trace) -> None:
    from mogul.core.errors import ConfigError

    most = trace.meta.model.num_experts
    for count in options.devices:
        if not 1 <= count <= most:
            raise ConfigError(
                f"{most} experts do not stand on {count} devices", fix=f"use 1 to {most} devices"
            )


def _report(options: Options, trace: Trace) -> int:
    from mogul.observe.numbers import summary
    from mogul.observe.report_devices import (
        default_devices,
        device_table,
        each_device_table,
        with_given,
    )
    from mogul.spec.placement import load_placement

    _check_devices(options, trace)
    given = [load_placement(path) for path in options.placement]
    devices = options.devices or (() if given else default_devices(trace))
    found = with_given(trace, devices, given)
    table, by_device = summary(trace), device_table(trace, found)
    each = [each_device_table(trace, *one) for one in found.items()]
    numbers = {
        "summary": table.as_data(),
        "devices": by_device.as_data(),
        "every_device": [one.as_data() for one in each],
        **_layers(trace),
    }
    if options.format == "json":
        from mogul.core.table import Table

        Table(table.title, (), (), data=numbers).show("json")
    else:
        table.show(options.format)
        by_device.show(options.format)
        if len(each) == 1:
            each[0].show(options.format)
    if not options.no_html:
        from mogul.observe.report import page_of

        _write(page_of(trace, found), options, numbers)
    return 0


def _layers(trace: Trace) -> dict[str, Any]:
    from mogul.observe.numbers import layer_numbers

    found = layer_numbers(trace)
    entropy = None if found.entropy is None else [round(float(v), 6) for v in found.entropy]
    return {
        "layers": {
            "layer": list(found.layers),
            "busiest_over_mean": [round(float(v), 6) for v in found.busiest],
            "dead": found.dead.tolist(),
            "cold": found.cold.tolist(),
            "entropy_over_ln_e": entropy,
        }
    }


def _compare(options: Options, first: Trace, second: Trace) -> int:
    from mogul.observe.compare import compare_page, comparison

    table = comparison(first, second)
    table.show(options.format)
    if not options.no_html:
        _write(compare_page(first, second), options, table.as_data())
    return 0


def _write(page: Any, options: Options, numbers: dict[str, Any]) -> None:
    import json

    from mogul.core.files import atomic_write
    from mogul.core.log import say

    target = options.html or options.traces[0] / "report.html"
    page.write(target)
    atomic_write(target.with_suffix(".json"), json.dumps(numbers, indent=1) + "\n")
    say(f"wrote {target} and {target.with_suffix('.json').name}")
