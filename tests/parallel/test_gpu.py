"""On two GPUs: every way computes the same, layers replay in a graph, the dead end the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import device_ranks
import pytest
import ranks
import torch

from mogul.core.errors import MogulError
from mogul.parallel import launch
from mogul.parallel.watch import EXIT_CODE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.accelerator.current_accelerator() is None or torch.accelerator.device_count() < 2,
        reason="needs two GPUs",
    ),
]


def test_every_way_computes_what_one_device_computes():
    for name, error in launch(device_ranks.errors_by_way, 2, timeout_s=120)[0].items():
        assert error < 1e-2, name


@pytest.mark.parametrize("wire", [None, "window"])
def test_layers_replay_in_one_graph_and_nothing_waits_for_the_host(wire):
    for found in launch(device_ranks.replay, 2, wire, timeout_s=120):
        assert found["error"] < 1e-2
        assert found["is_sync_free"], found
        assert found["host_waits"] == 0


ALONE = """
from mogul.parallel import start
import device_ranks
device_ranks.dies(start(patience_s=6.0), "{through}")
"""


@pytest.mark.parametrize("through", ["collective", "window"])
def test_a_rank_that_waits_on_its_device_ends_when_the_other_is_gone(through):
    """Nobody watches from outside."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    start_s = time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE.format(through=through)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, told = started[0].communicate(timeout=60)
    started[1].communicate(timeout=60)
    assert started[0].returncode == EXIT_CODE, told
    assert "mogul: rank 0 ends: rank 1 shows no sign of life" in told
    assert time.monotonic() - start_s < 60


def test_a_rank_that_does_not_come_to_a_barrier_is_missed():
    start_s = time.monotonic()
    with pytest.raises(MogulError, match=r"barrier of the ranks' common memory within 3 s"):
        launch(device_ranks.comes_late, 2, timeout_s=60)
    assert time.monotonic() - start_s < 60
