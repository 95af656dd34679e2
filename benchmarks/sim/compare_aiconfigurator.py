"""mogul and AIConfigurator on the same measured deployments.

Question: whose TPOT is nearer to the measurement, zero-shot and with one constant a backend fitted
on the same fifth of the rows (by hash), on the rows both price and on all? The peer's answers are
in `aiconfigurator_answers.jsonl` (`run_aiconfigurator.py`), its best reading of a row counts.

    python benchmarks/sim/compare_aiconfigurator.py [--record]
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from mogul.bench import ledger
from mogul.core.table import Table
from mogul.simulate.validate import silicon
from mogul.simulate.validate.scoreboard import statistics

ANSWERS = Path(__file__).parent / "aiconfigurator_answers.jsonl"


def answers() -> dict[str, float | None]:
    """The peer's TPOT in seconds by row id: its reading in ours, then its default formats."""
    found: dict[str, float | None] = {}
    for line in ANSWERS.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        given = (one.get(key, {}).get("tpot_ms") for key in ("read", "default", "file"))
        best = next((value for value in given if value), None)
        found[one["id"]] = best * 1e-3 if best else None
    return found


def main() -> None:
    """Print both tools' scores."""
    peer = answers()
    ours = [silicon.score(row) for row in silicon.rows() if row["id"] in peer]
    theirs = [replace(one, predicted_s=peer[one.row_id]) for one in ours]
    both = {a.row_id for a, b in zip(ours, theirs, strict=True) if a.predicted_s and b.predicted_s}
    rows, records = [], []
    for fitted in (False, True):
        for scope in ("all", "common"):
            for tool, scored in (("mogul", ours), ("AIConfigurator 0.12.0", theirs)):
                chosen = [x for x in scored if scope == "all" or x.row_id in both]
                scales = silicon.fit_scales(chosen) if fitted else {}
                chosen = [x for x in chosen if not (fitted and x.is_for_fitting)]
                one = statistics(chosen, scales)
                kind = "fitted" if fitted else "zero-shot"
                shown = [f"{100 * one[key]:.1f} %" for key in ("coverage", "median", "mean", "p90")]
                rows.append(
                    (kind, scope, tool, int(one["rows"]), *shown, round(one["spearman"], 3))
                )
                for metric in ("median", "coverage", "spearman"):
                    case = f"silicon sample, aggregated MoE, {scope} rows, {kind}, {tool}"
                    records.append((case, metric, round(one[metric], 4)))
    columns = ("", "rows of", "tool", "rows", "priced", "median", "mean", "p90", "Spearman")
    Table("TPOT of measured deployments", columns, rows).show()
    if "--record" in sys.argv:
        ledger.append(
            ledger.row(
                bench="simulate-silicon",
                case=case,
                metric=metric,
                unit="ratio",
                value=value,
                runs=1,
                command="python benchmarks/sim/compare_aiconfigurator.py --record",
            )
            for case, metric, value in records
        )


if __name__ == "__main__":
    main()
