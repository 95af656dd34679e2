"""A checkpoint of sharded training continues on another number of ranks, as if on the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

from mogul.core.errors import ArtifactError
from mogul.parallel import launch, load_sharded


def continue_on(folder: Path, sizes: list[tuple[int, int]]) -> list[float]:
    """Losses of two steps on each (ranks, ep) in turn, each from the checkpoint before it."""
    losses, source = [], None
    for number, (size, ep) in enumerate(sizes):
        target = str(folder / str(number))
        *new, step = launch(
            ranks.train_and_save, size, source, target, ep, on_cpu=True, threads=1, timeout_s=200
        )[0]
        assert step == 2 * number
        losses += new
        source = target
    return losses


def test_two_ranks_continue_what_one_began(tmp_path):
    moved = continue_on(tmp_path / "moved", [(1, 1), (2, 2)])
    assert moved == pytest.approx(continue_on(tmp_path / "same", [(1, 1), (1, 1)]), abs=1e-9)


@pytest.mark.full
def test_1_to_2_to_4_to_1_ranks_make_the_losses_of_one(tmp_path):
    moved = continue_on(tmp_path / "moved", [(1, 1), (2, 2), (4, 2), (4, 4), (1, 1)])
    assert moved == pytest.approx(continue_on(tmp_path / "same", [(1, 1)] * 5), abs=1e-9)


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no sharded checkpoint"):
        load_sharded(tmp_path, None, None)  # type: ignore[arg-type]
