"""Units for the test of units; importable, so that started processes find them."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from mogul.bench.devices_units import Bench


def count(bench: Bench) -> None:
    """How many ranks there are, by asking all."""
    one = torch.ones(1)
    dist.all_reduce(one)
    bench.put("counted", {"ranks": int(one), "lost": sorted(bench.lost)})


def hang(bench: Bench) -> None:
    """Rank 1 never comes."""
    if bench.world.rank == 1:
        time.sleep(600)
    dist.barrier()


def fail(bench: Bench) -> None:
    """An error on all ranks costs its part only."""

    def broken() -> None:
        raise ValueError("broken")

    bench.attempt("broken", broken)
