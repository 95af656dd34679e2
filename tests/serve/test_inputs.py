"""Which kinds of sequences a step says it holds: kernels leave out what is not there."""

from __future__ import annotations

from typing import Any, cast

import pytest

from mogul.kernels.turn import CHUNKS, FEW, FEW_QUERIES, FRESH, SEVERAL
from mogul.serve.inputs import Entry, layout_of

DECODE, GUESS = (40, 1), (40, 3)
PROMPT, CHUNK, SHORT = (0, 64), (64, 64), (0, FEW_QUERIES)


@pytest.mark.parametrize(
    ("entries", "kinds"),
    [
        ([DECODE, DECODE], FEW),
        ([DECODE, PROMPT], FEW | FRESH),
        ([PROMPT, CHUNK], FRESH | CHUNKS),
        ([DECODE, GUESS], FEW | CHUNKS | SEVERAL),
        ([SHORT], FEW | FRESH | SEVERAL),
        ([(0, 1), CHUNK], FEW | CHUNKS),
    ],
)
def test_a_step_says_what_it_holds(entries: list[tuple[int, int]], kinds: int) -> None:
    nobody = cast("Any", None)
    made = [Entry(nobody, first, count, 1, 1) for first, count in entries]
    layout = layout_of(made, 16)
    assert layout.kinds == kinds
    assert layout.max_query_len == max(count for _, count in entries)
