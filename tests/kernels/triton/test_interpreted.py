"""Every Triton kernel against the reference, in Triton's interpreter (fp32, no device)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = (
    "small_random",
    "small_null",
    "small_skewed",
    "small_empty",
    "three_launch_sort",
    "swapped",
    "few",
)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    script = Path(__file__).with_name("run_interpreted.py")
    done = subprocess.run(
        [sys.executable, str(script), *CASES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("case"): row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(found: dict[str, dict[str, float]], case: str) -> None:
    assert found[case]
    assert max(found[case].values()) < 2e-6, found[case]


def test_gradients_were_compared(found: dict[str, dict[str, float]]) -> None:
    assert {"dx", "dgate_up", "ddown", "dweights"} < found["small_null"].keys()
