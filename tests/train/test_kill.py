"""kill -9 at random points loses at most the steps since the last checkpoint.

One process imports everything and forks a training for each life, so that twenty lives are cheap.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mogul.train import checkpoint

EVERY = 2
NURSERY = """
import json, os, sys
from pathlib import Path
import mogul.train.session as session
from mogul.train.recipe import Recipe
recipe, folder = Recipe.parse(json.loads(sys.argv[1])), Path(sys.argv[2])
for line in sys.stdin:  # each line asks for one life
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        with session.Session(recipe, folder, resume=True) as one:
            one.run()
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def _progress(folder: Path) -> int:
    """Steps that were finished, as the metrics tell."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def _live_and_die(nursery, folder: Path, rng: random.Random) -> tuple[bool, int, int]:
    """One life; whether it ended by itself, the steps it had told, the newest whole checkpoint."""
    start = _progress(folder)
    nursery.stdin.write("live\n")
    nursery.stdin.flush()
    child = int(nursery.stdout.readline())
    wanted, deadline = start + rng.randint(1, 5), time.monotonic() + 60
    while _progress(folder) < wanted and time.monotonic() < deadline and _is_alive(child):
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)
    if _is_alive(child):
        os.kill(child, signal.SIGKILL)
    status = int(nursery.stdout.readline())
    told = _progress(folder)
    newest = checkpoint.read_newest(folder / "checkpoints")
    return os.waitstatus_to_exitcode(status) == 0, told, newest.step if newest else 0


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _survive(recipe, tmp_path, kills: int) -> None:
    steps = 10 * kills  # a life may run on while this process waits for a processor
    part = recipe(run__steps=steps, checkpoint__every_steps=EVERY, checkpoint__asynchronous=False)
    folder, rng = tmp_path / "killed", random.Random(7)
    command = [sys.executable, "-c", NURSERY, part.model_dump_json(), str(folder)]
    nursery = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
    deaths, before = 0, 0
    try:
        for _ in range(10 * kills):
            is_done, told, saved = _live_and_die(nursery, folder, rng)
            assert saved >= before, "a checkpoint was lost"
            # A line is written before its step is saved: EVERY - 1 steps, and the one under way.
            assert told - saved <= EVERY, f"{told - saved} steps lost"
            before = saved
            if is_done:
                break
            deaths += 1
    finally:
        nursery.stdin.close()
        nursery.wait(timeout=60)
        nursery.stdout.close()
    assert is_done
    assert deaths >= kills
    from mogul.train.session import Session

    with Session(part, tmp_path / "whole") as whole:
        whole.run()
    last = f"step-{steps:08d}"
    for name in ("model", "optimizer", "more"):
        a, b = (
            tmp_path / f / "checkpoints" / last / f"{name}.safetensors" for f in ("killed", "whole")
        )
        assert a.read_bytes() == b.read_bytes(), name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_kills(recipe, tmp_path):
    _survive(recipe, tmp_path, 2)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills(recipe, tmp_path):
    _survive(recipe, tmp_path, 20)
