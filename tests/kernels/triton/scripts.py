"""Scripts beside the tests run in a process of their own: kernels are interpreted for all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def printed_by(script: str) -> str:
    """What a text of Python prints, kernels interpreted; the test fails with its errors."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines_of(name: str, *args: str, **environment: str) -> list[str]:
    """What a script of this folder prints; the test fails with its errors where it fails."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(name)), *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def rows_of(name: str, *args: str) -> list[dict[str, Any]]:
    """Its rows of JSON, among other lines."""
    return [json.loads(line) for line in lines_of(name, *args) if line.startswith("{")]
