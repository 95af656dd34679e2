"""Run measurements on ranks as units that survive each other: one that hangs or dies costs itself.

Every unit is noted in a file of rows before it begins. A unit that does not end in its time prints
where every thread stands and ends its rank; the others follow, and the ranks are started again with
the units that are left. Rows are on disk as soon as they are measured.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mogul.core.errors import BackendError, MogulError
from mogul.parallel import World, launch

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Unit:
    """One measurement; `function` must be importable."""

    name: str
    limit_s: float
    """It ends itself after so many seconds; none begins that has less time left than a third."""
    function: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass
class Bench:
    """What a unit gets: its world, where to write, and what earlier units left for it."""

    world: World
    folder: Path
    began_s: float
    lost: frozenset[str] = frozenset()
    """Units that took earlier ranks with them."""
    kept: dict[str, Any] = field(default_factory=dict)

    def put(self, part: str, row: dict[str, Any], text: str | None = None) -> None:
        """Write and show one row, from rank 0."""
        if self.world.rank:
            return
        with (self.folder / ROWS).open("a") as file:
            file.write(json.dumps({"part": part, **row}, default=float) + "\n")
        shown = json.dumps(row, default=float) if text is None else text
        if shown:
            _say(self.began_s, f"{part}: {shown}")

    def attempt(self, part: str, function: Callable[[], None]) -> None:
        """What fails is noted; a device that can do no more ends the rank."""
        try:
            function()
        except BackendError as refused:
            self.put(part, {"refused": str(refused).splitlines()[0]})
        except Exception as error:
            sys.stderr.write(f"rank {self.world.rank}, {part}:\n{traceback.format_exc()}")
            self.put(part, {"failed": f"{type(error).__name__}: {str(error)[:400]}"})
            if self.world.device.type != "cpu":
                torch.accelerator.synchronize()  # raises where the device is lost


def run_units(
    units: Sequence[Unit], ranks: int, folder: Path, seconds: float, *, on_cpu: bool
) -> None:
    """All units that fit into `seconds`, on fresh ranks after each loss."""
    began_s = time.time()
    end_s = began_s + seconds
    left = list(units)
    earlier = len(read_rows(folder))  # of another run in this folder
    while left and time.time() < end_s - 5:
        before = _names(folder, "begin", earlier)
        lost = frozenset(before - _names(folder, "end", earlier))
        try:
            launch(
                _run_on_rank, ranks, left, str(folder), began_s, end_s, lost,
                on_cpu=on_cpu, threads=1 if on_cpu else None, patience_s=16.0,
                timeout_s=end_s - time.time(),
            )  # fmt: skip
            return
        except MogulError as error:
            _say(began_s, str(error))
        begun = _names(folder, "begin", earlier)
        if begun == before:
            return  # not even the first unit: starting again would not help
        left = [unit for unit in left if unit.name not in begun]


def _say(began_s: float, text: str) -> None:
    sys.stdout.write(f"[{time.time() - began_s:6.1f} s] {text}\n")
    sys.stdout.flush()


def _names(folder: Path, part: str, earlier: int) -> set[str]:
    return {row["unit"] for row in read_rows(folder)[earlier:] if row["part"] == part}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows on disk."""
    file = folder / ROWS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _run_on_rank(
    world: World,
    units: Sequence[Unit],
    folder: str,
    began_s: float,
    end_s: float,
    lost: frozenset[str],
) -> None:
    bench = Bench(world, Path(folder), began_s, lost)
    for unit in units:
        left_s = torch.tensor(end_s - time.time(), device=world.device, dtype=torch.float64)
        dist.all_reduce(left_s, dist.ReduceOp.MIN)  # all ranks decide alike
        if float(left_s) < unit.limit_s / 3:
            bench.put("skip", {"unit": unit.name, "left_s": float(left_s)})
            continue
        bench.put("begin", {"unit": unit.name})
        faulthandler.dump_traceback_later(unit.limit_s, exit=True)
        try:
            unit.function(bench, *unit.args)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # the others may wait in a collective that never ends
        faulthandler.cancel_dump_traceback_later()
        bench.put("end", {"unit": unit.name})
