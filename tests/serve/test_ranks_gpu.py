"""On two GPUs: an engine over both says what one says, its decode steps captured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mogul.parallel import launch

sys.path.insert(0, str(Path(__file__).parent))  # so that the ranks find what they run

from rank_engine import alone_and_together

TIE = 0.25
"""Logprobs nearer than this may change places by rounding in bf16."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.accelerator.current_accelerator() is None or torch.accelerator.device_count() < 2,
        reason="needs two GPUs",
    ),
]


def test_an_engine_over_two_gpus_says_what_one_says():
    (alone, first), (_, second) = launch(alone_and_together, 2, timeout_s=150)
    assert first["is_captured"]
    assert alone["is_captured"]
    assert first["has_window"]
    assert first["ids"] == second["ids"], "ranks draw alike"
    same = 0
    for ids, wanted, given, expected in zip(
        first["ids"], alone["ids"], first["logprobs"], alone["logprobs"], strict=True
    ):
        pairs = list(zip(ids, wanted, strict=True))
        until = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        same += until
        assert given[:until] == pytest.approx(expected[:until], abs=TIE)
        if until < len(pairs):  # a tie, which rounding decides
            assert given[until] == pytest.approx(expected[until], abs=TIE)
    assert same > 0.5 * sum(map(len, alone["ids"]))
