"""Ranks are started once for all cases of a size: starting costs more than computing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks


def _launch(size: int, names: list[str]) -> dict[str, str]:
    from mogul.parallel import launch

    results = launch(ranks.run_cases, size, names, on_cpu=True, threads=1, timeout_s=200)
    failed: dict[str, str] = {}
    for rank, result in enumerate(results):
        for name, text in result.items():
            failed[name] = failed.get(name, "") + f"rank {rank}:\n{text}"
    return failed


@pytest.fixture(scope="session")
def failures_of_2():
    return _launch(2, [name for name in ranks.CASES if not name.startswith("4: ")])


@pytest.fixture(scope="session")
def failures_of_4():
    return _launch(4, [name for name in ranks.CASES if not name.startswith("2: ")])
