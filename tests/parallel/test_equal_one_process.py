"""Ranks that share a model compute what one process computes, and so do their gradients."""

from __future__ import annotations

import pytest
import ranks


@pytest.mark.parametrize("name", [n for n in ranks.CASES if not n.startswith("4: ")])
def test_two_ranks(failures_of_2, name):
    assert name not in failures_of_2, failures_of_2[name]


@pytest.mark.parametrize("name", [n for n in ranks.CASES if not n.startswith("2: ")])
def test_four_ranks(failures_of_4, name):
    assert name not in failures_of_4, failures_of_4[name]
