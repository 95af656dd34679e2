"""The direct entry into Triton's compiled launcher tells the driver what Triton's own path does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from scripts import lines_of

pytest.importorskip("triton")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for a launcher")
@pytest.mark.parametrize(("kind", "arguments"), [("plain", 3), ("descriptor", 11)])
def test_the_driver_is_told_the_same(tmp_path: Path, kind: str, arguments: int) -> None:
    folders = {"LD_LIBRARY_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    (line,) = lines_of("run_entry.py", kind, str(tmp_path), **folders)
    told = json.loads(line)
    assert told["same"]
    assert len(told["arguments"]) == 1 + arguments
    assert told["arguments"][0] == 0xABC
    assert told["arguments"][3] == (5 if kind == "plain" else 128)
