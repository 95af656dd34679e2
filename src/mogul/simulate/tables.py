"""Predictions as tables for the terminal, JSON and reports."""

from __future__ import annotations

from typing import Any

from mogul.core.table import Table
from mogul.core.units import show_bytes, show_s
from mogul.simulate.compare import Compared
from mogul.simulate.run import Prediction
from mogul.simulate.step import StepTime
from mogul.simulate.sweep import Searched
from mogul.simulate.train import TrainPrediction


def as_data(p: Prediction) -> dict[str, Any]:
    """A prediction in base units."""
    low, middle, high = p.tpot_band()
    return {
        "family": p.setting.model.family,
        "device": p.setting.device.name,
        "layout": p.setting.parallel.model_dump(),
        "quant": p.setting.quant.model_dump(),
        "workload": p.workload.model_dump(),
        "ttft_s": p.ttft_s,
        "tpot_s": {"p10": low, "p50": middle, "p90": high},
        "step_s": p.decode.seconds,
        "prefill_s": p.prefill.seconds,
        "tokens_per_s": p.tokens_per_s,
        "tokens_per_s_per_device": p.tokens_per_s_per_device,
        "dollars_per_million_tokens": p.dollars_per_million,
        "binding": {"decode": p.decode.binding, "prefill": p.prefill.binding},
        "known_by": p.tier,
        "sources": sorted({s for o in p.decode.operators for s in o.estimate.sources}),
        "decode_parts_s": p.decode.parts(),
        "prefill_parts_s": p.prefill.parts(),
        "memory_bytes": p.memory.parts,
        "capacity_bytes": p.memory.capacity_bytes,
        "expert_load": load_data(p.decode),
    }


def load_data(step: StepTime) -> list[dict[str, Any]]:
    """Rows and distinct experts by rank, with rho and delta, for each kind of layer."""
    return [
        {
            "layers": count,
            "rows": load.rows_D.tolist(),
            "distinct": load.distinct_D.tolist(),
            "rho": load.rho,
            "delta": load.delta,
            "is_exact": load.is_exact,
        }
        for count, load in step.loads
    ]


def point_tables(p: Prediction) -> list[Table]:
    """What `simulate run` prints."""
    low, middle, high = p.tpot_band()
    rows = [
        ("TTFT", show_s(p.ttft_s)),
        ("TPOT, p10 / p50 / p90", " / ".join(show_s(x) for x in (low, middle, high))),
        ("output tokens/s", f"{p.tokens_per_s:,.0f}"),
        ("a device / a user", f"{p.tokens_per_s_per_device:,.0f} / {p.tokens_per_s_per_user:.1f}"),
        ("decode is bound by", p.decode.binding),
        ("prompts are bound by", p.prefill.binding),
        ("memory", f"{show_bytes(p.memory.total_bytes)} of {show_bytes(p.memory.capacity_bytes)}"),
        ("known by", p.tier),
    ]
    if p.dollars_per_million is not None:
        rows.append(("$ a million output tokens", f"{p.dollars_per_million:.3f}"))
    for count, load in p.decode.loads[:1]:
        name = f"rho / delta of {count} layers" + (" (exact)" if load.is_exact else "")
        rows.append((name, f"{load.rho:.2f} / {load.delta:.2f}"))
    title = f"{p.setting.title} on {p.setting.parallel.devices} x {p.setting.device.title}"
    summary = Table(f"{title}, {p.setting.parallel.describe()}", ("", ""), rows)
    return [summary, breakdown(p), memory_table(p)]


def breakdown(p: Prediction) -> Table:
    """Decode and prompt step by part."""
    decode, prefill = p.decode.parts(), p.prefill.parts()
    rows = [
        (part, show_s(seconds), f"{100 * seconds / p.decode.seconds:.0f} %",
         show_s(prefill.get(part, 0.0)))
        for part, seconds in sorted(decode.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    total = (show_s(p.decode.seconds), "100 %", show_s(p.prefill.seconds))
    columns = ("part", "decode step", "share", "prompt step")
    return Table("Where the time goes", columns, [*rows, ("all, overlap taken off", *total)])


def memory_table(p: Prediction) -> Table:
    """Memory by part."""
    rows = [(name, show_bytes(size)) for name, size in p.memory.parts.items()]
    return Table("Memory of a device", ("part", "bytes"), rows)


def front_table(found: Searched, limit: int = 20) -> Table:
    """The Pareto front of a search."""
    rows = [
        (
            p.setting.parallel.devices,
            p.setting.parallel.describe(),
            p.setting.quant.weights + "/" + p.setting.quant.expert_format,
            p.workload.batch,
            round(p.tokens_per_s_per_device, 1),
            round(p.tokens_per_s_per_user, 1),
            round(1e3 * p.ttft_s, 1),
            round(1e3 * p.tpot_s, 2),
            p.decode.binding,
        )
        for p in found.front[:limit]
    ]
    columns = ("devices", "layout", "format", "batch", "tok/s/device", "tok/s/user", "TTFT ms",
               "TPOT ms", "bound by")  # fmt: skip
    counts = f"{len(found.points)} points priced, {found.num_missed} miss the targets"
    notes = [f"{counts}, {found.num_too_big} layouts do not fit"]
    notes += [
        f"apart: prompts on {d.prompt.setting.parallel.describe()}, tokens on "
        f"{d.decode.setting.parallel.describe()} at batch {d.decode.workload.batch}: "
        f"{d.tokens_per_s_per_device:.0f} tok/s/device, TTFT {show_s(d.ttft_s)}, "
        f"of it {show_s(d.transfer_s)} for the cache's way, TPOT {show_s(d.tpot_s)}, "
        f"{100 * d.prompt_devices_share:.0f} % of the devices for prompts"
        for d in found.disaggregated[:1]
    ]
    return Table("Deployments nothing beats", columns, rows, notes)


def compare_table(points: list[Compared], title: str) -> Table:
    """Models side by side, the first as the yardstick."""
    first = points[0].prediction
    rows = [
        (
            one.name,
            one.prediction.workload.batch,
            round(1e3 * one.prediction.tpot_s, 2),
            round(one.prediction.tokens_per_s_per_device, 1),
            round(one.prediction.tokens_per_s / first.tokens_per_s, 3),
            round(one.rho, 3),
            round(one.delta, 3),
            one.prediction.decode.binding,
        )
        for one in points
    ]
    columns = ("model", "batch", "TPOT ms", "tok/s/device", "x first", "rho", "delta", "bound by")
    return Table(title, columns, rows)


def train_data(p: TrainPrediction, total_tokens: float | None) -> dict[str, Any]:
    """The prediction in base units."""
    return {
        "step_s": p.step_s,
        "tokens_per_s_per_device": p.tokens_per_s_per_device,
        "flop_per_s_per_device": p.flop_per_s_per_device,
        "mfu": p.mfu,
        "bubble": p.bubble,
        "parts_s": p.parts,
        "memory_bytes": p.memory.parts,
        "fits": p.memory.fits,
        "days": total_tokens and p.days(total_tokens),
    }


def train_tables(p: TrainPrediction, total_tokens: float | None) -> list[Table]:
    """What `simulate train` prints."""
    rows = [
        ("step", show_s(p.step_s)),
        ("tokens/s a device", f"{p.tokens_per_s_per_device:,.0f}"),
        ("model TFLOP/s a device", f"{p.flop_per_s_per_device / 1e12:.0f}"),
        ("MFU", f"{100 * p.mfu:.1f} %"),
        ("pipeline bubble", f"{100 * p.bubble:.1f} %"),
        ("recomputed", p.plan.recompute),
        ("memory", f"{show_bytes(p.memory.total_bytes)} of {show_bytes(p.memory.capacity_bytes)}"
         + ("" if p.memory.fits else "  DOES NOT FIT")),
    ]  # fmt: skip
    if total_tokens:
        rows.append((f"days for {total_tokens:.3g} tokens", f"{p.days(total_tokens):.1f}"))
    parts = [
        (name, show_s(seconds), f"{100 * seconds / p.step_s:.0f} %")
        for name, seconds in sorted(p.parts.items(), key=lambda item: -item[1])
    ]
    memory = [(name, show_bytes(size)) for name, size in p.memory.parts.items()]
    return [
        Table("Training step", ("", ""), rows),
        Table("Where the time goes", ("part", "seconds", "share"), parts),
        Table("Memory of a device", ("part", "bytes"), memory),
    ]


def load_table(p: Prediction) -> Table:
    """Rows and distinct experts of every rank of the first layers."""
    rows = [
        (rank, round(float(load.rows_D[rank]), 2), round(float(load.distinct_D[rank]), 2))
        for _, load in p.decode.loads[:1]
        for rank in range(len(load.rows_D))
    ]
    notes = [
        f"{count} layers: rho {load.rho:.3f}, delta {load.delta:.3f} (busiest rank of a step over "
        f"the mean), {load.ranks_per_token:.2f} ranks a token"
        for count, load in p.decode.loads[:8]
    ]
    return Table("Expected load by rank, decode", ("rank", "rows", "distinct experts"), rows, notes)
