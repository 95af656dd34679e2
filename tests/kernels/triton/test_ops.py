"""The operators under torch's tools on the CPU: checkpointing, compile, export, fake tensors."""

from __future__ import annotations

import json

import pytest
from scripts import lines_of

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def held() -> dict[str, bool]:
    return json.loads(lines_of("run_ops.py")[-1])


@pytest.mark.parametrize(
    "what",
    [
        *("checkpoint", "compile", "export", "export_one_node", "residual", "moe", "moe_train"),
        *("strides", "second_derivative", "export_without_gradient"),
    ],
)
def test_the_operators_hold_under(held: dict[str, bool], what: str) -> None:
    assert held[what]
