"""Every accuracy table with its bar: what `mogul simulate validate` prints and fails on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mogul.core.errors import ArtifactError
from mogul.core.table import Table
from mogul.simulate.validate import kernels, own, published, silicon, training, vllm

SETS = ("own", "vllm", "published", "pangu", "training", "balance", "kernels", "silicon")
NEEDS_WHEEL = ("kernels", "silicon")


@dataclass(frozen=True)
class Bar:
    """One number that must hold."""

    set_name: str
    metric: str
    value: float
    limit: float
    is_upper: bool = True

    @property
    def holds(self) -> bool:
        """Whether the number clears its bar."""
        return self.value <= self.limit if self.is_upper else self.value >= self.limit


@dataclass(frozen=True)
class Score:
    """One accuracy table and its bars."""

    table: Table
    bars: tuple[Bar, ...] = field(default=())
    ratios: tuple[tuple[str, float], ...] = field(default=())
    """Predicted over measured by row, for a chart."""

    pairs: tuple[tuple[float, float], ...] = field(default=())
    """(measured, predicted) by row, each in its own unit."""


def scores(names: tuple[str, ...], *, silicon_rows: int | None = None) -> list[Score]:
    """Score the named sets.

    Raises:
        ArtifactError: a set needs AIConfigurator's wheel, which is not installed.
    """
    makers: Mapping[str, Callable[[], Score]] = {
        "own": _own,
        "vllm": _vllm,
        "published": _published,
        "pangu": _pangu,
        "training": _training,
        "balance": _balance,
        "kernels": _kernels,
        "silicon": lambda: _silicon(silicon_rows),
    }
    return [makers[name]() for name in names]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _median(errors: list[float]) -> float:
    return float(np.median(np.abs(errors)))


def _own() -> Score:
    steps = own.steps()
    error = [one.predicted_s / one.measured_s - 1 for one in steps]
    rows = [
        (one.name, one.measured_s * 1e3, one.predicted_s * 1e3, _percent(off), one.tier, one.note)
        for one, off in zip(steps, error, strict=True)
    ]
    scored = [off for one, off in zip(steps, error, strict=True) if not one.note]
    columns = ("step", "measured ms", "predicted ms", "error", "known by", "note")
    bar = Bar("own", "median error", _median(scored), 0.15)
    pairs = tuple((one.measured_s, one.predicted_s) for one in steps if not one.note)
    notes = [
        f"{one.name}: {1e3 * one.measured_s:,.0f} ms measured, {1e3 * one.predicted_s:,.0f} "
        f"predicted ({_percent(one.predicted_s / one.measured_s - 1)}); memory "
        f"{one.measured_bytes / 2**30:.0f} GiB, predicted {one.predicted_bytes / 2**30:.0f} "
        "(not scored: no framework's training was fitted on these)"
        for one in own.training_steps()
    ]
    return Score(Table("mogul's own engine", columns, rows, notes), (bar,), pairs=pairs)


def _vllm() -> Score:
    rows, errors = [], []
    for p in vllm.points():
        error = p.fitted_s / p.measured_s - 1
        cliff = "cliff: not scored" if p.is_cliff else ""
        zero = p.zero_shot_s / p.measured_s - 1
        rows.append(
            (
                p.table,
                p.batch,
                p.measured_s * 1e3,
                p.fitted_s * 1e3,
                _percent(zero),
                _percent(error),
                cliff,
            )
        )
        errors += [] if p.is_cliff else [error]
    columns = ("table", "batch", "measured ms", "fitted ms", "zero-shot", "fitted", "")
    notes = ("fitted: one constant from the other table's rows",)
    bar = Bar("vllm", "median error, fitted, without cliffs", _median(errors), 0.15)
    ratios = tuple((f"{p.table}, {p.batch}", p.fitted_s / p.measured_s) for p in vllm.points())
    pairs = tuple((p.measured_s, p.fitted_s) for p in vllm.points())
    table = Table("vLLM 0.22.1, decode step (own runs)", columns, rows, notes)
    return Score(table, (bar,), ratios, pairs)


def _published() -> Score:
    rows, errors = [], []
    for row, predicted in published.deployment_rows():
        error = predicted / row["measured"] - 1
        errors.append(error)
        rows.append(
            (row["name"], row["measured"], round(predicted), _percent(error), row.get("note", ""))
        )
    for row in published.pangu_rows():
        if not row.is_fitted:
            predicted = published.predict_row(row)
            errors.append(row.measured_s / predicted - 1)
            shown = (f"V1 {row.name}", row.measured_s * 1e3, predicted * 1e3)
            rows.append((*shown, _percent(errors[-1]), "ms; the error is of the speed"))
    unscored = []
    for row in published.load("deployments")["no_batch"]:
        batch, speed = published.batch_behind(row)
        unscored.append(
            f"{row['name']} prints {row['measured']} tokens/s a device and no batch; here "
            f"{batch} requests a device give {speed:,.0f}"
        )
    columns = ("row", "measured", "predicted", "error", "note")
    notes = (
        "tokens/s a device where nothing else is said",
        *unscored,
    )
    bar = Bar("published", "median error, zero-shot", _median(errors), 0.20)
    ratios = tuple((str(row[0]), 1 + error) for row, error in zip(rows, errors, strict=True))
    pairs = tuple((float(row[1]), float(row[2])) for row in rows)
    table = Table("Published serving numbers (V1-V6)", columns, rows, notes)
    return Score(table, (bar,), ratios, pairs)


def _pangu() -> Score:
    rows = []
    for row in published.pangu_rows():
        predicted = published.predict_row(row)
        kind = "fitted" if row.is_fitted else "blind"
        rows.append(
            (
                row.name,
                row.measured_s * 1e3,
                predicted * 1e3,
                _percent(predicted / row.measured_s - 1),
                kind,
            )
        )
    ratios = published.dense_ratios()
    notes = [
        f"decode rate over {name}: paper {paper:.2f}, predicted {mine:.2f}"
        for name, (paper, mine) in ratios.items()
    ]
    for rates, drafts in published.implied_acceptance().items():
        notes.append(
            f"{rates} tokens/s a card implies {drafts['tokens_per_step']:.2f} tokens a step, "
            f"that is an acceptance of {drafts['acceptance']:.2f} with one draft token "
            f"(verify step {1e3 * drafts['verify_step_s']:.0f} ms)"
        )
    columns = ("row", "measured ms", "predicted ms", "error", "kind")
    return Score(Table("Pangu Pro MoE on Ascend: fitted", columns, rows, notes))


def _training() -> Score:
    found, scales = training.training_rows()
    rows, zero = [], []
    for one in found:
        plain, fitted = one.zero_shot / one.measured - 1, one.fitted / one.measured - 1
        zero.append(plain)
        kind = "fitted" if one.is_for_fitting else one.note
        rows.append(
            (one.name, one.measured, round(one.zero_shot), _percent(plain), _percent(fitted), kind)
        )
    held = [one.fitted / one.measured - 1 for one in found if not one.is_for_fitting]
    told = ", ".join(f"{name} x {value:.2f}" for name, value in sorted(scales.items()))
    notes = (f"one constant a framework on its arithmetic: {told}",)
    columns = ("row", "measured", "zero-shot", "error", "fitted", "note")
    bars = (
        Bar("training", "median error, zero-shot", _median(zero), 0.15),
        Bar("training", "median error, fitted, other rows", _median(held), 0.15),
    )
    ratios = tuple((one.name, one.zero_shot / one.measured) for one in found)
    pairs = tuple((one.measured, one.zero_shot) for one in found)
    table = Table("Published training speeds (T2-T5)", columns, rows, notes)
    return Score(table, bars, ratios, pairs)


def _balance() -> Score:
    rows, errors = [], []
    cases: list[tuple[str, float, float, bool]] = [
        (f"T3 Qwen3-235B training, {tokens} tokens", paper, mine, fitted)
        for tokens, paper, mine, fitted in training.balance_ratios()
    ]
    cases += published.perfect_balance()
    for name, paper, mine, fitted in cases:
        rows.append(
            (name, paper, round(mine, 3), round(mine - paper, 3), "fitted" if fitted else "")
        )
        errors += [] if fitted else [abs(mine - paper)]
    columns = ("case", "published", "predicted", "difference", "")
    bar = Bar("balance", "largest difference of a ratio", max(errors), 0.06)
    return Score(Table("What imbalance costs: even over uneven", columns, rows), (bar,))


def _kernels() -> Score:
    rows, bars = [], []
    for one in kernels.scored_tables():
        rows.append(
            (
                one.device,
                one.dtype,
                one.rows,
                one.models,
                _share(one.median),
                _share(one.p90),
                _share(one.curve_median),
            )
        )
        bars.append(Bar("kernels", f"median error, {one.dtype}", one.median, one.bar))
    columns = ("device", "format", "rows", "models", "median", "p90", "median of the curve alone")
    return Score(
        Table("Fused-MoE kernels, one model left out at a time", columns, rows), tuple(bars)
    )


def _silicon(limit: int | None) -> Score:
    scored = [silicon.score(row) for row in silicon.rows()[:limit]]
    scales = silicon.fit_scales(scored)
    test = [one for one in scored if not one.is_for_fitting]
    rows: list[tuple[Any, ...]] = []
    stats: dict[str, dict[str, float]] = {}
    for name, chosen, factor in (
        ("zero-shot, all rows", scored, {}),
        ("fitted, the other 80 %", test, scales),
    ):
        one = statistics(chosen, factor)
        stats[name] = one
        shown = (_share(one[key]) for key in ("coverage", "median", "mean", "p90"))
        rows.append((name, int(one["rows"]), *shown, round(one["spearman"], 3)))
    fitted = stats["fitted, the other 80 %"]
    priced = [one for one in test if one.predicted_s]
    inside = sum(one.is_in_band for one in priced) / len(priced)
    columns = ("score", "rows", "priced", "median", "mean", "p90", "Spearman")
    notes = (
        "constants: " + ", ".join(f"{name} {value:.3f}" for name, value in sorted(scales.items())),
        f"{100 * inside:.0f} % of the other 80 % lie within p10 and p90, zero-shot",
        "AIConfigurator on the same rows: benchmarks/sim/compare_aiconfigurator.py",
    )
    bars = (
        Bar("silicon", "median TPOT error, fitted", fitted["median"], 0.15),
        Bar("silicon", "coverage", stats["zero-shot, all rows"]["coverage"], 0.95, is_upper=False),
        Bar("silicon", "Spearman, fitted", fitted["spearman"], 0.93, is_upper=False),
        Bar("silicon", "within p10 and p90, zero-shot", inside, 0.75, is_upper=False),
    )
    pairs = tuple(
        (one.measured_s, one.predicted_s * scales.get(one.backend, 1.0))
        for one in test
        if one.predicted_s
    )
    table = Table("Measured deployments (AIConfigurator's sample), TPOT", columns, rows, notes)
    return Score(table, bars, pairs=pairs)


def statistics(scored: list[silicon.Scored], scales: Mapping[str, float]) -> dict[str, float]:
    """Coverage, errors and rank correlation of predictions times their backend's constant."""
    priced = [
        (one.predicted_s * scales.get(one.backend, 1.0), one.measured_s)
        for one in scored
        if one.predicted_s
    ]
    if not priced:
        raise ArtifactError("no row could be priced", fix="score more rows")
    predicted, measured = np.array(priced).T
    error = np.abs(predicted / measured - 1)
    return {
        "rows": len(scored),
        "coverage": len(priced) / len(scored),
        "median": float(np.median(error)),
        "mean": float(np.mean(error)),
        "p90": float(np.quantile(error, 0.9)),
        "spearman": float(np.corrcoef(_ranks(predicted), _ranks(measured))[0, 1]),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties shared."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
