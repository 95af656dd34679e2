"""The operators under torch's tools on the CPU: checkpointing, compile, export, fake tensors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from mogul.kernels.triton import ops


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


def test_each_thread_is_given_a_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: asked.append(threading.get_ident())
    )
    monkeypatch.setattr(ops, "_thread", threading.local())
    here = threading.get_ident()
    for _ in range(2):
        ops._bind_context()
    other = threading.Thread(target=lambda: [ops._bind_context() for _ in range(2)])
    other.start()
    ident = other.ident
    other.join()
    assert asked == [here, ident]
