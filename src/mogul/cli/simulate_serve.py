"""`mogul simulate serve`: requests as events."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mogul.cli.simulate_options import Deployment

if TYPE_CHECKING:
    from mogul.core.table import Table
    from mogul.simulate.serve import Served

EXAMPLES = """
examples:
  mogul simulate serve preset:qwen3-30b-a3b --device h100 --rate 8 --requests 500
  mogul simulate serve preset:qwen3-30b-a3b --device h200 --requests-file requests.jsonl
"""


@dataclass(frozen=True, kw_only=True)
class Options(Deployment):
    """Let requests arrive and be scheduled; print percentiles."""

    rate: float = 4.0
    """Requests a second (Poisson)."""

    requests: int = 300
    """Requests to draw."""

    requests_file: Path | None = None
    """JSON lines with arrival_s, input_tokens, output_tokens instead."""

    step_tokens: int = 8192
    """Most tokens computed in one step."""

    sequences: int = 256
    """Most requests running at once on a copy."""

    seed: int = 0
    """Seed of the arrivals."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json"] = "table"
    """How to print; json in base units."""


NAMES = (("TTFT ms", "ttft_s"), ("TPOT ms", "tpot_s"), ("latency ms", "latency_s"))


def table_of(served: Served, title: str) -> Table:
    """What came of it: percentiles, and in the data all that is not a line of the table."""
    from mogul.core.table import Table

    rows = [
        (label, *(round(1e3 * value, 2) for value in served.percentiles(name)))
        for label, name in NAMES
    ]
    running = f"at most {served.most_running} running, {served.num_preemptions} preempted"
    notes = (
        f"{len(served.latency_s)} requests in {served.end_s:.1f} s, {served.num_steps} steps",
        f"{served.tokens_per_s:.0f} output tokens/s, {running}",
    )
    data = {
        name: dict(zip(("p50", "p90", "p99"), served.percentiles(name), strict=True))
        for _, name in NAMES
    }
    data |= {"tokens_per_s": served.tokens_per_s, "steps": served.num_steps}
    data |= {"preemptions": served.num_preemptions, "end_s": served.end_s}
    return Table(title, ("", "p50", "p90", "p99"), rows, notes, data=data)


def run(options: Options) -> int:
    """Serve and print."""
    from dataclasses import replace

    from mogul.cli.simulate_options import refuse_unused, setting_of, write_page
    from mogul.simulate.serve import default_limits, poisson, read_arrivals, serve

    load = ("batch", "together", "prefix_hit", "drafts", "max_ttft_ms", "max_tpot_ms")
    refuse_unused(options, "serve", *load)
    setting = setting_of(options)
    if options.requests_file:
        arrivals = read_arrivals(options.requests_file)
    else:
        arrivals = poisson(
            options.rate, options.requests, options.input, options.output, options.seed
        )
    limits = replace(
        default_limits(setting, arrivals),
        step_tokens=options.step_tokens,
        sequences=options.sequences,
    )
    served = serve(setting, arrivals, limits)
    title = f"{setting.title} served on {setting.parallel.devices} x {setting.device.title}"
    table = table_of(served, title)
    table.show(options.format)
    write_page(options.html, title, [table])
    return 0
