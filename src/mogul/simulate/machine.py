"""`machine.json`: what `mogul simulate calibrate` found out about a machine beside its kernels.

Read back by `--machine`: the tables that lie beside it come before all others, its launches and
collectives replace those of the library's entry. Of the machines mogul's own tables were measured
on (`measured/*-machine.json`) the collectives count where no others are given.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from mogul.core.errors import ArtifactError
from mogul.simulate.collectives import CollectiveTables
from mogul.simulate.measurements import SHIPPED_DIR
from mogul.spec.base import Spec
from mogul.spec.hardware import Hardware


class MeasuredCollective(Spec):
    """One collective of one size."""

    name: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    ranks: int = Field(ge=2)
    bytes: int = Field(ge=1)
    """The whole buffer of one rank."""

    s: float = Field(gt=0)


class Machine(Spec):
    """A measured machine."""

    device: str
    """The simulator's name of it."""

    source: str
    versions: dict[str, str] = Field(default_factory=dict)
    copy_bytes_per_s: float | None = None
    """Read and written by a large copy."""

    launch_s: float | None = Field(default=None, ge=0)
    """Host time of a small kernel without a graph."""

    graph_launch_s: float | None = None
    """Time of a small kernel inside a graph."""

    eager_kernel_s: float | None = None
    """Host time a kernel of an eager forward and backward through modules."""

    collectives: list[MeasuredCollective] = Field(default_factory=list)
    collective_source: str = ""
    skipped: list[str] = Field(default_factory=list)
    """What could not be measured, and why."""

    def applied(self, device: Hardware) -> Hardware:
        """The library's entry with what was measured."""
        if self.launch_s is None:
            return device
        sources = device.sources | {"launch_s": self.source}
        return device.model_copy(update={"launch_s": self.launch_s, "sources": sources})

    def collective_tables(self) -> CollectiveTables | None:
        """The collectives as tables; None where none were measured."""
        if not self.collectives:
            return None
        found: defaultdict[tuple[str, str, int], list[tuple[int, float]]] = defaultdict(list)
        for one in self.collectives:
            found[self.device, one.name, one.ranks].append((one.bytes, one.s))
        curves = {key: tuple(np.array(sorted(pairs)).T) for key, pairs in found.items()}
        return CollectiveTables(curves, self.collective_source or self.source)


def read_machine(path: Path) -> Machine:
    """Read a machine.json, or the one in a folder.

    Raises:
        ArtifactError: there is none, or it is cut off.
        ConfigError: a key is wrong (which, why).
    """
    path = path / "machine.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no machine.json: {error}", fix="make it with `mogul simulate calibrate`"
        ) from None
    if not isinstance(values, dict):
        raise ArtifactError(
            f"{path} is no machine.json: it holds no object",
            fix="make it with `mogul simulate calibrate`",
        )
    return Machine.parse(values, where=path.name)


@cache
def shipped_collectives(device: str) -> CollectiveTables | None:
    """The collectives of the machine of this name that mogul was measured on."""
    path = SHIPPED_DIR / f"{device}-machine.json"
    return read_machine(path).collective_tables() if path.exists() else None
