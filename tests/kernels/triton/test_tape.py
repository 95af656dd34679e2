"""Forwards replayed from their tape, in Triton's interpreter (no device)."""

from __future__ import annotations

import json

import pytest
from scripts import lines_of

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def held() -> dict[str, bool]:
    return json.loads(lines_of("run_tape.py")[-1])


@pytest.mark.parametrize("case", ["few", "swapped", "three_launch_sort", "descriptors"])
def test_a_replay_on_other_tensors_equals_the_forward(held: dict[str, bool], case: str) -> None:
    assert held[case]


def test_rows_that_are_their_own_residual_leave_no_tape(held: dict[str, bool]) -> None:
    assert held["own_residual"]


def test_a_forward_that_computes_beside_its_launches_has_no_tape(held: dict[str, bool]) -> None:
    assert held["refused"]
