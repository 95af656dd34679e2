"""Measure this machine for the simulator: products, experts, attention, launches, links.

Writes one table a kind, engine and format in the form `mogul.simulate.measurements.read_table`
reads, and `machine.json` (`mogul.simulate.machine`) with what is not a kernel: copy bandwidth,
launches, collectives, versions. Under torchrun it measures the collectives between the processes
and adds them to the machine.json of the folder.
"""

from __future__ import annotations

import csv
import io
import random
import time
from pathlib import Path
from typing import Any

import torch

from mogul.bench import calibrate_links, ledger
from mogul.bench import calibrate_timing as timing
from mogul.bench.calibrate_cases import SMALL, Grid, builders
from mogul.core.files import atomic_write
from mogul.core.log import progress, say
from mogul.simulate.machine import Machine, read_machine

__all__ = ["SMALL", "Grid", "calibrate", "calibrate_links_of"]

REFERENCE = {("gemm", "torch", "fp8"), ("attention_decode", "torch", "bf16")}
"""Tables of calls no server makes so: operands quantised beforehand, a cache in one piece."""

Rows = dict[tuple[str, str, str], list[dict[str, float]]]
"""By kind, engine and format."""


def calibrate(folder: Path, device_name: str, grid: Grid, dtype: str = "bf16") -> list[Path]:
    """Measure and write the tables; returns their paths.

    `device_name` is the simulator's name of this machine (`mogul simulate hw`).
    """
    device = calibrate_links.local_device()
    start_s = time.monotonic()
    rows, skipped = _measured(grid, device, dtype, start_s)
    source = source_of(device)
    paths = [_write(folder, device_name, *key, table, source) for key, table in rows.items()]
    machine = Machine(
        device=device_name,
        source=source,
        versions=timing.versions(device),
        copy_bytes_per_s=timing.copy_bandwidth(device),
        launch_s=timing.launch_s(device),
        graph_launch_s=timing.graph_launch_s(device),
        eager_kernel_s=timing.eager_kernel_s(device),
        skipped=skipped,
    )
    path = folder / "machine.json"
    atomic_write(path, machine.model_dump_json(indent=1) + "\n")
    return [*paths, path]


def calibrate_links_of(folder: Path, device_name: str) -> list[Path]:
    """Measure the collectives between this job's processes; the first writes them down."""
    device = calibrate_links.local_device()
    found = calibrate_links.collectives(device)
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    if rank:
        return []
    path = folder / "machine.json"
    if path.exists():
        machine = read_machine(path)
        if machine.device != device_name:
            say(f"{path} is of {machine.device}, not {device_name}: it is replaced")
            machine = Machine(device=device_name, source=source_of(device))
    else:
        machine = Machine(device=device_name, source=source_of(device))
    update = {"collectives": found, "versions": timing.versions(device)}
    update["collective_source"] = source_of(device)
    atomic_write(path, machine.replace(**update).model_dump_json(indent=1) + "\n")
    return [path]


def _measured(
    grid: Grid, device: torch.device, dtype: str, start_s: float
) -> tuple[Rows, list[str]]:
    """Rows of every table, and what could not be measured and why."""
    rows: Rows = {}
    skipped: list[str] = []
    cases = list(builders(grid, device, dtype))
    random.Random(0).shuffle(cases)  # a budget that runs out leaves some of everything
    with progress("measuring", len(cases)) as bar:
        for index, build in enumerate(cases):
            if time.monotonic() - start_s > grid.budget_s:
                skipped.append(f"{len(cases) - index} calls: {grid.budget_s:.0f} s were over")
                break
            try:
                case = build()
                seconds = timing.seconds_of(case.call, case.copies, device)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                skipped.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                continue
            key = (case.kind, case.engine, case.dtype)
            rows.setdefault(key, []).append({**case.dims, "seconds": seconds})
            bar.advance(1, case.kind)
    return {key: _in_order(table) for key, table in sorted(rows.items())}, sorted(set(skipped))


def _in_order(table: list[dict[str, float]]) -> list[dict[str, float]]:
    names = [name for name in table[0] if name != "seconds"]
    return sorted(table, key=lambda row: [row[name] for name in reversed(names)])


def source_of(device: torch.device) -> str:
    """Who measured what with what, in one line."""
    found = ledger.row(bench="calibrate", case="", metric="", unit="", value=0, runs=1)
    told = ", ".join(f"{name} {value}" for name, value in timing.versions(device).items())
    name = timing.device_name(device)
    return f"mogul's own run, {found['date']}, {name}, {told}, commit {found['commit']}"


def _write(
    folder: Path,
    device_name: str,
    kind: str,
    engine: str,
    dtype: str,
    rows: list[dict[str, float]],
    source: str,
) -> Path:
    text = io.StringIO()
    head: dict[str, Any] = {
        "kind": kind,
        "device": device_name,
        "engine": engine,
        "dtype": dtype,
        "source": source,
    }
    if (kind, engine, dtype) in REFERENCE:
        head |= {"role": "reference"}
    text.writelines(f"# {key} = {value}\n" for key, value in head.items())
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" for name, value in row.items()})
    path = folder / f"{device_name}-{kind}-{dtype}-{engine}.csv"
    atomic_write(path, text.getvalue())
    return path
