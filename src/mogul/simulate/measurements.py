"""Tables of measured kernel times, whoever measured them, in one form.

A table knows its device, engine, arithmetic and where each number comes from. `load_shipped`
reads mogul's own measurements; `aiconfigurator.py` reads that tool's tables from its installed
wheel.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mogul.core.errors import ArtifactError, nearest
from mogul.simulate import physics
from mogul.spec.quant import BITS, bytes_of

SHIPPED_DIR = Path(__file__).parent / "measured"
NEWER = "-newer"
"""Ends the name of a table that was measured after the calibration of its machine."""

SAME = 0.12
"""Distance of two calls (`Demand.features`) up to which they are one, measured twice."""


@dataclass(frozen=True)
class KernelTable:
    """Measured times of one kind of kernel on one device."""

    kind: str
    device: str
    engine: str
    dtype: str
    source: str
    """Provenance: who measured, versions, date. Two tables with one source are one."""

    dims: Mapping[str, np.ndarray]
    seconds: np.ndarray
    groups: np.ndarray | None = None
    """A label a row (the model or shape it belongs to) for leave-one-out validation."""

    is_reference: bool = False
    """Times something no server runs like this; counts only where its engine is asked for."""

    def __len__(self) -> int:
        return len(self.seconds)

    def only(self, mask: np.ndarray) -> KernelTable:
        """Return the rows where `mask` is true."""
        dims = {name: column[mask] for name, column in self.dims.items()}
        groups = None if self.groups is None else self.groups[mask]
        return KernelTable(
            self.kind, self.device, self.engine, self.dtype, self.source, dims,
            self.seconds[mask], groups, self.is_reference,
        )  # fmt: skip


@cache
def load_shipped() -> tuple[KernelTable, ...]:
    """Mogul's own measurements (`measured/*.csv`, one file a table), each call's newest."""
    paths = sorted(SHIPPED_DIR.glob("*.csv"))
    newer = [read_table(path) for path in paths if path.stem.endswith(NEWER)]
    older = (read_table(path) for path in paths if not path.stem.endswith(NEWER))
    kept = (without_repeated(table, newer) for table in older)
    return (*(table for table in kept if len(table)), *newer)


def without_repeated(table: KernelTable, newer: Iterable[KernelTable]) -> KernelTable:
    """The rows of a table that no newer one of the same kernels measured again."""
    keep = np.ones(len(table), dtype=bool)
    features = np.asarray(physics.demand(table.kind, table.dims).features)
    for other in newer:
        if _whose(other) == _whose(table):
            again = np.asarray(physics.demand(other.kind, other.dims).features)
            apart = np.sqrt(((features[:, None] - again) ** 2).sum(axis=2)).min(axis=1)
            keep &= apart > SAME
    return table.only(keep)


def _whose(table: KernelTable) -> tuple[str, str, str, str, bool]:
    return table.kind, table.device, table.engine, table.dtype, table.is_reference


def read_table(path: Path) -> KernelTable:
    """Read a table: `# key = value` lines (kind, device, engine, dtype, source), then CSV.

    `role = reference` is for calls no server makes like this.

    Columns are the dimensions of the kind (`physics.py`) and `seconds`; a column `group` labels
    rows, a column `case` says where each comes from.

    Raises:
        ArtifactError: a key or column is missing, or a value cannot be.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    head = _head(lines)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    missing = {"kind", "device", "engine", "dtype", "source"} - set(head)
    if missing or not rows or "seconds" not in rows[0]:
        raise ArtifactError(
            f"{path} lacks {', '.join(sorted(missing)) or 'rows or the column seconds'}",
            fix="write it with `mogul simulate calibrate`",
        )
    _check_head(path, head)
    dims = {
        name: np.array([_number(path, place, row, name) for place, row in enumerate(rows, 1)])
        for name in rows[0]
        if name not in ("group", "case")
    }
    seconds = dims.pop("seconds")
    width = np.full(len(rows), bytes_of(head["dtype"]))
    dims.setdefault("weight_bytes", width)
    dims.setdefault("input_bytes", width)
    groups = np.array([row["group"] for row in rows]) if "group" in rows[0] else None
    try:
        physics.demand(head["kind"], dims)
    except KeyError as lacking:
        raise ArtifactError(
            f"{path} has no column {lacking}, which {head['kind']} needs",
            fix="write it with `mogul simulate calibrate`",
        ) from None
    return KernelTable(
        head["kind"], head["device"], head["engine"], head["dtype"], head["source"], dims,
        seconds, groups, head.get("role") == "reference",
    )  # fmt: skip


def _check_head(path: Path, head: Mapping[str, str]) -> None:
    for key, known in (("kind", physics.KINDS), ("dtype", BITS)):
        if head[key] not in known:
            raise ArtifactError(
                f"{path} is of unknown {key} {head[key]!r}", fix=nearest(head[key], known)
            )


def _number(path: Path, place: int, row: Mapping[str, str | None], name: str) -> float:
    """A value of a row; nothing that is measured or measured at is 0 or below, or no number."""
    try:
        value = float(row[name] or "")
    except (TypeError, ValueError):  # also of a row with more values than names
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or name == "prior")):
        raise ArtifactError(
            f"{path}, row {place} below the names: {name} is {row[name]!r}",
            fix="give a number above 0, or leave the row out",
        )
    return value


def _head(lines: list[str]) -> dict[str, str]:
    pairs = (line[1:].split("=", 1) for line in lines if line.startswith("#") and "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}
