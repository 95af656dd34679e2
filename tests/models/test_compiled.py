"""A whole model with experts_implementation="mogul" is one graph, its experts one operator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_a_model_compiles_to_one_graph_with_our_operator() -> None:
    script = Path(__file__).with_name("run_compiled.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"Qwen3Moe": [1, 1, True], "Moge": [1, 1, True]}
