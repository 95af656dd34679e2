"""Ideas against exposed communication on two GPUs, in turns in one run (docs/devices.md).

python benchmarks/gpu/devices_ideas.py --out FOLDER --cells qwen3-30b-a3b:16384,pangu-pro:4096

Static dispatch of a grouped router, uniform routing, each way in a graph of its own. Writes
ledger.jsonl; `exposed` is the share of the layer that is not the slowest rank's experts alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mogul.bench import ledger
from mogul.bench.devices_cases import Inputs, Way, dispatcher_of, local_weights, make_inputs
from mogul.bench.devices_clock import Clock
from mogul.bench.kernels import LayerShape, device_name
from mogul.parallel import World, launch, static
from mogul.parallel import window as windows
from mogul.parallel.local import LocalExperts

SHAPES = {"pangu-pro": (64, 8, 5120, 1344, 8), "qwen3-30b-a3b": (128, 8, 2048, 768, 8)}
NEVER = 1 << 60
Call = Callable[[], Tensor]


def with_limits(call: Call, early: int, copied: int) -> Call:
    """The call with other limits of picks that go first and of moves by copy engine."""

    def run() -> Tensor:
        old = static.EARLY_BYTES, windows.COPIED_BYTES
        static.EARLY_BYTES, windows.COPIED_BYTES = early, copied
        try:
            return call()
        finally:
            static.EARLY_BYTES, windows.COPIED_BYTES = old

    return run


def gathered_by_engine(call: Call) -> Call:
    """The call with its tokens sent by the copy engine."""
    push = windows.Window._push

    def other(
        self: Any, region: Any, words: Any, starts: Any, *, apart: bool, engine: bool
    ) -> None:
        push(self, region, words, starts, apart=apart, engine=engine or not apart)

    def run() -> Tensor:
        windows.Window._push = other  # type: ignore[method-assign]
        try:
            return with_limits(call, NEVER, 1 << 22)()
        finally:
            windows.Window._push = push  # type: ignore[method-assign]

    return run


@dataclass
class Halves:
    """Two ranks: own tokens go up first, the other's down first; sums travel beside the rest."""

    dispatcher: Any
    experts: LocalExperts
    inputs: Inputs

    def __call__(self) -> Tensor:
        """The layer."""
        x, ids, weights = self.inputs.x, self.inputs.ids, self.inputs.weights
        window, tokens = self.dispatcher.window, x.shape[0]
        rank, other = window.rank, 1 - window.rank
        rows = window.gather((x,), "rows", aside=True)
        every = window.gather((ids, weights.float()), "picks").end()
        own, his = (self._picks(every, r * tokens, tokens) for r in (rank, other))
        own_act = self._up(own, x)
        (x_RD,) = rows.end()
        sums = self._down(his, self._up(his, x_RD[other * tokens : (other + 1) * tokens]))
        words = windows._words(sums)
        region = window._region("sums 0", 2 * words.numel(), x.device)
        main = torch.accelerator.current_stream()
        window.beside.wait_stream(main)
        with window.beside:
            region.peers[other][rank * words.numel() : (rank + 1) * words.numel()].copy_(words)
            region.barrier()
            event = window.beside.record_event()
        mine = self._down(own, own_act)
        main.wait_event(event)
        arrived = region.own[: 2 * words.numel()].view(x.dtype).view(2, tokens, -1)
        return window._sum(region, mine, arrived)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        found = self.experts.matrices()
        assert found is not None
        return found

    def _picks(self, every: list[Tensor], first: int, tokens: int) -> Any:
        from mogul.kernels.triton import steps

        part = [one[first : first + tokens] for one in every]
        columns, begin = self.dispatcher.picks, self.dispatcher.first
        return steps.take(part[0], part[1], columns, begin, self._matrices()[0])

    def _up(self, picks: Any, rows: Tensor) -> Tensor:
        act = rows.new_empty((picks.ids.numel(), picks.layer.shape.inner))
        gate_up = self._matrices()[0]
        picks.layer.up(picks.plan, rows, gate_up, act, act, picks.sort, save=False)
        return act

    def _down(self, picks: Any, act: Tensor) -> Tensor:
        y = act.new_empty((picks.ids.numel(), picks.layer.shape.width))
        down, plan = self._matrices()[1], picks.plan
        picks.layer.product(plan, plan.down, act, down, y, picks.sort, transposed=False)
        return picks.layer.sum(plan, y, picks.ids, picks.weights, weighted=True)


def ways(world: World, shape: LayerShape, experts: LocalExperts, inputs: Inputs) -> dict[str, Call]:
    """Every idea, and what was before."""
    tokens = len(inputs.all_ids)
    through = dispatcher_of(world, shape, Way("grouped", "static", wire="window"), tokens)
    collective = dispatcher_of(world, shape, Way("grouped", "static"), tokens)
    as_fp8 = static.Static(replace(collective.plan, payload="fp8"))
    x, ids, weights = inputs.x, inputs.ids, inputs.weights

    def at_once(*rows: Tensor) -> Tensor:
        return experts(*rows)

    def pushed() -> Tensor:
        return through(x, ids, weights, experts)

    return {
        "collectives": lambda: collective(x, ids, weights, experts),
        "window, sums after": lambda: through(x, ids, weights, at_once),
        "A sums pushed as made": with_limits(pushed, NEVER, NEVER),
        "B picks first, kernel": with_limits(pushed, 0, NEVER),
        "B picks first, copy engine": with_limits(pushed, 0, 1 << 22),
        "C halves by owner": Halves(through, experts, inputs),
        "D fp8 tokens by collectives": lambda: as_fp8(x, ids, weights, experts),
        "E gather by copy engine": gathered_by_engine(pushed),
    }


@torch.no_grad()
def measure(world: World, cells: list[tuple[str, int]], turns: int, file: Path) -> None:
    """Write the ledger rows of every cell."""
    for name, tokens in cells:
        for row in rows_of(world, name, tokens, turns):
            if world.rank == 0:
                ledger.append([row], file)
                print(
                    f"{row['case']}: {row['value'] * 1e6:.0f} us, {row['exposed']:.1%}", flush=True
                )


def rows_of(world: World, name: str, tokens: int, turns: int) -> list[dict[str, Any]]:
    """A row for every way of a cell, and one for the experts alone."""
    clock, shape = Clock(world.device), LayerShape(*SHAPES[name])
    experts = local_weights(world, shape, torch.bfloat16).run
    way = Way("grouped", "static")
    inputs = make_inputs(world, shape, way, "uniform", tokens, torch.bfloat16)
    calls = ways(world, shape, experts, inputs)
    seen: list[list[Tensor]] = []

    def note(*rows: Tensor) -> Tensor:
        seen.append([part.clone() for part in rows])
        return experts(*rows)

    plain = dispatcher_of(world, shape, way, tokens)
    wanted = plain(inputs.x, inputs.ids, inputs.weights, note).float()
    errors = {
        label: clock.most(float((call().float() - wanted).norm() / wanted.norm()))
        for label, call in calls.items()
    }
    calls["experts alone"] = lambda: experts(*seen[0])
    times = in_turns(clock, calls, turns)
    alone = median(times["experts alone"])
    return [
        _row(world, f"{name} x{world.size} uniform T{tokens}: {label}", spent, alone, errors)
        for label, spent in times.items()
    ]


def in_turns(clock: Clock, calls: dict[str, Call], turns: int) -> dict[str, list[float]]:
    """Seconds of the slowest rank, each call in a graph."""
    times: dict[str, list[float]] = {label: [] for label in calls}
    with ExitStack() as stack:
        replays = {
            label: stack.enter_context(clock.captured(call)) for label, call in calls.items()
        }
        for _ in range(turns):
            for label, replay in replays.items():
                times[label].append(clock.most(clock.own_s(replay, 0.04)))
    return times


def _row(
    world: World, case: str, spent: list[float], alone: float, errors: dict[str, float]
) -> dict[str, Any]:
    value = median(spent)
    return ledger.row(
        device_name(world.device),
        bench="devices_ideas",
        case=case,
        metric="layer",
        unit="s",
        value=float(f"{value:.4g}"),
        runs=len(spent),
        exposed=round((value - alone) / value, 4),
        experts_s=float(f"{alone:.4g}"),
        turns_us=[round(one * 1e6, 1) for one in spent],
        error=errors.get(case.partition(": ")[2]),
    )


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", default="qwen3-30b-a3b:4096,qwen3-30b-a3b:16384")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    cells = [
        (name, int(tokens)) for name, tokens in (c.split(":") for c in options.cells.split(","))
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    launch(measure, 2, cells, options.turns, options.out / "ledger.jsonl")


if __name__ == "__main__":
    main()
