"""Which decode steps are captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mogul.serve.graphs import LADDER, MOST_GUESSING, Ladder, guessing_rungs, rungs_up_to
from mogul.serve.inputs import Layout


@pytest.mark.parametrize("most", [1, 3, 16, 64, 100, 300])
def test_steps_with_guesses_are_captured_for_every_batch_at_most_twice_too_wide(most: int) -> None:
    few = guessing_rungs(rungs_up_to(most))
    assert len(few) <= 7
    for batch in range(1, min(most, MOST_GUESSING) + 1):
        assert any(batch <= rung <= max(2 * batch, 1) for rung in few), batch


def test_sizes_that_were_asked_for_are_kept() -> None:
    assert guessing_rungs((24,)) == [24]
    assert guessing_rungs((1, 4, 16, 64, 96)) == [1, 4, 16, 64]
    assert guessing_rungs(LADDER) == [1, 2, 4, 8, 16, 32, 64]


def test_no_captured_step_is_larger_than_the_largest() -> None:
    runner: Any = SimpleNamespace()
    limits = Layout(tokens=70, sequences=64, rows=70, pages=9, max_query_len=70)
    ladder = Ladder(runner, (1, 16, 64), limits, guesses=4)
    assert max(sequences * width for sequences, width in ladder.rungs) <= 70
    assert {(1, 5), (16, 4), (64, 1)} <= set(ladder.rungs)
    assert ladder.layout((16, 4)) == Layout(64, 16, 64, 9, 4)
