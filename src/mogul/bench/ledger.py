"""The ledger: one JSON line a measurement, with everything needed to doubt it.

A row says what was measured (bench, case, metric, unit, value, spread, runs), against what (floor,
ratio, peers of the same run), on what (device, versions), and how to do it again (commit, command,
date). Rows are only ever added; an unfavourable one is a row like any other.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

LEDGER = Path("benchmarks") / "ledger.jsonl"
PACKAGES = ("torch", "transformers", "triton", "numpy")
REQUIRED = ("bench", "case", "metric", "unit", "value", "runs")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the working tree, with `+` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short=10", "HEAD") or os.environ.get("MOGUL_COMMIT", "unknown")
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def cpu_name() -> str:
    """The processor as the system names it, with the threads this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} threads" if sys.platform == "linux" else name


def row(device: str = "", **fields: Any) -> dict[str, Any]:
    """Complete one measurement with date, commit, versions and command."""
    missing = [key for key in REQUIRED if key not in fields]
    if missing:
        raise TypeError(f"a ledger row needs {', '.join(missing)}")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device or cpu_name(),
        "versions": versions(),
        **fields,
        "command": fields.get("command") or shlex.join(["python", *sys.argv]),
    }


def append(rows: Iterable[Mapping[str, Any]], path: Path = LEDGER) -> None:
    """Add rows at the end of the ledger."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(entry)) + "\n" for entry in rows)


def read(path: Path = LEDGER) -> list[dict[str, Any]]:
    """Every row of the ledger, oldest first."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
