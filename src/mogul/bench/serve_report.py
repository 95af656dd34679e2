"""What was measured of an engine, as a table and as lines of the ledger.

Decides which numbers stand for a load: percentiles in milliseconds, medians over runs.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from mogul.bench import ledger
from mogul.bench.serve import Cell, Result
from mogul.bench.serve_load import FORCED_TEMPERATURE, Workload
from mogul.core.table import Table

COLUMNS = (
    "load", "TTFT ms", "TTFT p95", "TPOT ms", "TPOT p95", "ITL p99 ms", "prefill tok/s",
    "output tok/s", "decode ms", "distinct", "floor ms", "ratio",
)  # fmt: skip


def table(result: Result) -> Table:
    """One row a load."""
    rows = [_table_row(cell) for cell in result.cells]
    one = result.cells[0].workload
    speed = f"{result.bytes_per_s / 1e9:.4g} GB/s measured by a copy"
    sizes = f"{one.input_tokens} + {one.output_tokens} tokens a request, none shared"
    notes = [
        f"{result.device}; {speed}; {sizes}",
        "decode: a token of every request while all decode (arriving at random: median ITL)",
        "floor: weights, distinct experts, keys and values read once",
    ]
    for cell in result.cells:
        if cell.workload.temperature == FORCED_TEMPERATURE:
            notes.append(f"{load_name(cell.workload)}: tokens at random")
        if cell.workload.rate is not None:
            notes.append(f"{load_name(cell.workload)}: {cell.decoding:.1f} decode together")
        if cell.acceptance:
            shares = ", ".join(f"{share:.2f}" for share in cell.acceptance)
            notes.append(f"{load_name(cell.workload)}: guesses that stood, by position: {shares}")
    return Table(f"Serving {result.model}, {result.dtype}", COLUMNS, rows, notes)


def _table_row(cell: Cell) -> list[Any]:
    return [
        load_name(cell.workload),
        cell.percentile("ttft_s", 50) * 1e3,
        cell.percentile("ttft_s", 95) * 1e3,
        cell.percentile("tpot_s", 50) * 1e3,
        cell.percentile("tpot_s", 95) * 1e3,
        cell.percentile("itl_s", 99) * 1e3,
        None if cell.workload.rate else round(cell.typical("prefill_per_s")),
        round(cell.typical("output_per_s"), 1),
        None if cell.decode_s is None else cell.decode_s * 1e3,
        None if cell.distinct is None else round(cell.distinct, 1),
        cell.floor_s * 1e3,
        None if cell.ratio is None else round(cell.ratio, 2),
    ]


def load_name(workload: Workload) -> str:
    """A load in a word."""
    if workload.rate is None:
        return f"batch {workload.requests}"
    return f"{workload.rate:g}/s x {workload.requests}"


PERCENTILES = (50, 95, 99)


def ledger_rows(result: Result) -> list[dict[str, Any]]:
    """Two rows a closed load (decode step, prefill), one an open load (time to first token)."""
    rows = []
    for cell in result.cells:
        one = cell.workload
        common = {
            "bench": "serve",
            "case": f"{result.model} {result.dtype}, {load_name(one)}, {one.input_tokens} + "
            f"{one.output_tokens} tokens",
            "runs": len(cell.runs),
            "tokens": "random" if one.temperature == FORCED_TEMPERATURE else "greedy",
        }
        more = _about(cell)
        if one.rate is not None:
            waits = [run.ttft_s().mean() * 1e3 for run in cell.runs]
            more["decoding"] = round(cell.decoding, 2)
            rows.append(_row(result, common, "time to first token", "ms", waits, **more))
            continue
        steps = [run.decode_s * 1e3 for run in cell.runs if run.decode_s is not None]
        if steps:
            rows.append(_row(result, common, "decode step", "ms", steps, **more))
        speeds = [run.prefill_per_s for run in cell.runs]
        rows.append(_row(result, common, "prefill speed", "tokens/s", speeds))
    return rows


def _about(cell: Cell) -> dict[str, Any]:
    """What stands beside a load's time: percentiles in milliseconds, experts, floor, ratio."""
    found: dict[str, Any] = {
        f"{what}_ms": {
            f"p{share}": round(cell.percentile(f"{what}_s", share) * 1e3, 4)
            for share in PERCENTILES
        }
        for what in ("ttft", "tpot", "itl")
    }
    return found | {
        "output_per_s": round(cell.typical("output_per_s"), 2),
        "distinct_experts": None if cell.distinct is None else round(cell.distinct, 3),
        "floor": round(cell.floor_s * 1e3, 4),
        "ratio": None if cell.ratio is None else round(cell.ratio, 3),
        "acceptance": list(cell.acceptance),
    }


def _row(
    result: Result, common: dict[str, Any], metric: str, unit: str, values: list[float], **more: Any
) -> dict[str, Any]:
    return ledger.row(
        result.device,
        **common,
        metric=metric,
        unit=unit,
        value=round(float(median(values)), 4),
        spread=[round(float(min(values)), 4), round(float(max(values)), 4)],
        bandwidth_tb_s=round(result.bytes_per_s / 1e12, 4),
        **more,
    )
