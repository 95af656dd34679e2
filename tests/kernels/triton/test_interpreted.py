"""Every Triton kernel against the reference, in Triton's interpreter (fp32, no device)."""

from __future__ import annotations

import pytest
from scripts import rows_of

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
    rows = rows_of("run_interpreted.py", *CASES)
    return {row.pop("case"): row for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(found: dict[str, dict[str, float]], case: str) -> None:
    assert found[case]
    assert max(found[case].values()) < 2e-6, found[case]


def test_gradients_were_compared(found: dict[str, dict[str, float]]) -> None:
    assert {"dx", "dgate_up", "ddown", "dweights"} < found["small_null"].keys()
