"""The operators under torch's tools on the CPU: checkpointing, compile, export, fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def held() -> dict[str, bool]:
    script = Path(__file__).with_name("run_ops.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "what", ["checkpoint", "compile", "export", "export_one_node", "residual", "moe", "moe_train"]
)
def test_the_operators_hold_under(held: dict[str, bool], what: str) -> None:
    assert held[what]
