"""Ranks end together: with the reason of the one that failed, or because one is gone."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import ranks
from torch.distributed import HashStore, PrefixStore, TCPStore

from mogul.core.errors import ConfigError, MogulError
from mogul.parallel import launch, start
from mogul.parallel.process import _common_store
from mogul.parallel.watch import BEATS_A_PATIENCE, EXIT_CODE, Watch, is_left


def test_the_message_of_the_failed_rank_is_told():
    with pytest.raises(MogulError, match=r"rank 1 of 2 failed(.|\n)*the data of this rank are br"):
        launch(ranks.raise_error, 2, 1, on_cpu=True, threads=1, timeout_s=60)


def test_a_killed_rank_ends_the_launch():
    start_s = time.monotonic()
    with pytest.raises(MogulError, match="rank 1 of 2 failed"):
        launch(ranks.die_silently, 2, 1, on_cpu=True, threads=1, timeout_s=60)
    assert time.monotonic() - start_s < 60


def test_a_rank_that_aborts_is_named_with_where_it_stood():
    """Others only miss it: their words come after."""
    with pytest.raises(MogulError, match=r"rank 0 of 2 failed \(exit code -6\)") as caught:
        launch(ranks.abort, 2, 0, on_cpu=True, threads=1, timeout_s=60)
    stack, _, missed = str(caught.value).partition("Traceback")
    assert "Fatal Python error: Aborted" in stack
    assert "in abort" in stack
    assert "barrier" in missed


ALONE = """
import os, signal, time
import torch.distributed as dist
from mogul.parallel import start
if {joining} and os.environ["RANK"] == "{victim}":
    dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
world = start(patience_s=2.0)
if world.rank == {victim}:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""


@pytest.mark.parametrize(
    ("victim", "joining"),
    [
        (1, False),
        pytest.param(1, True, marks=pytest.mark.full),
        pytest.param(0, False, marks=pytest.mark.full),
    ],
)
def test_ranks_without_a_launcher_see_that_one_is_gone(victim, joining):
    """Nobody watches from outside: the other rank ends by itself, with a message."""
    started = _ranks_alone(ALONE.format(victim=victim, joining=joining))
    other = started[1 - victim]
    _, told = other.communicate(timeout=60)
    started[victim].communicate(timeout=60)
    if victim == 0 and other.returncode == 1:  # was still joining: torch itself misses the store
        assert "Error" in told
        return
    assert other.returncode == EXIT_CODE
    assert f"mogul: rank {1 - victim} ends: " in told


STILL = """
import os, signal
from mogul.parallel import start
from mogul.parallel.process import stop
world = start(patience_s=2.0)
if world.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
stop(world)
"""


def test_a_rank_that_is_done_sees_that_another_is_gone():
    """No connection breaks, so only the watch can tell."""
    started = _ranks_alone(STILL)
    try:
        _, told = started[0].communicate(timeout=60)
        assert started[0].returncode == EXIT_CODE
        assert "mogul: rank 0 ends: rank 1 shows no sign of life" in told
    finally:
        started[1].kill()
        started[1].communicate()


def _ranks_alone(script: str) -> list[subprocess.Popen[str]]:
    """Two ranks that nobody watches from outside."""
    common = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()),
        "MOGUL_CPU_RANKS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_the_default_patience_ends_all_within_a_minute():
    patience_s = inspect.signature(start).parameters["patience_s"].default
    beat_s = patience_s / BEATS_A_PATIENCE
    assert patience_s + 3 * beat_s < 60  # the last beat, the look that starts the count, the last


def test_the_rank_that_keeps_the_store_parts_last_and_does_not_wait_for_ever():
    common = HashStore()
    first, second = (Watch(rank, 2, 8.0, common) for rank in range(2))
    for watch in (first, second):
        watch.leave()
    parting = threading.Thread(target=first.part)
    parting.start()
    parting.join(0.2)
    assert parting.is_alive(), "another may still ask the store"
    second.part()
    parting.join(4)
    assert not parting.is_alive()
    alone = Watch(0, 2, 0.3, HashStore())
    alone.leave()
    alone.part()  # the other never does


def test_the_store_ends_where_its_rank_parts():
    """Whoever starts again at this port must not read what was said before."""
    port = ranks.free_port()
    watch = Watch(0, 2, 0.3, TCPStore("127.0.0.1", port, None, True, wait_for_workers=False))
    socket.create_connection(("127.0.0.1", port)).close()
    watch.leave()
    watch.part()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


AGAIN = """
import time
from mogul.parallel import process, start
for run in range(3):
    world = start(patience_s=20.0)
    if world.rank == 0 and run:
        part = world.watch.part
        world.watch.part = lambda: (time.sleep(1.0), part())  # the others start again before it
    process.stop(world)
"""


def test_ranks_start_again_at_the_same_port():
    """One that is early must not join the store that the last run is about to end."""
    for process in _ranks_alone(AGAIN):
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told


@pytest.fixture
def keeper(monkeypatch):
    """A store that ranks find by their environment."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_a_late_rank_does_not_wait_for_ever(keeper, monkeypatch):
    """Another has failed before it came: the watch, which it then gets, says so and ends it."""
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    PrefixStore("mogul_watch", keeper).set("failed", "rank 0: broken")
    found = []
    args = (1, 2, timedelta(seconds=5), 0.3)
    late = threading.Thread(target=lambda: found.append(_common_store(*args)), daemon=True)
    late.start()
    late.join(5)
    monkeypatch.setattr("mogul.parallel.process.is_left", lambda *_: False)  # ends one that waits
    assert found
    assert is_left(found[0], 2)


def test_a_store_outside_the_ranks_has_a_part_for_each_start(keeper, monkeypatch):
    """It stays when they stop, with what they said and where they listened."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    first, second = (_common_store(1, 2, timedelta(seconds=5), 40.0) for _ in range(2))
    PrefixStore("mogul_watch", first).set("left0", "1")
    assert is_left(first, 2)
    assert not is_left(second, 2)


def test_a_process_that_is_no_rank_says_how_to_start(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="this process is no rank") as caught:
        start()
    assert "torchrun" in caught.value.__notes__[0]
