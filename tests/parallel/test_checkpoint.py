"""A checkpoint of sharded training continues on another number of ranks, as if on the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks

from mogul.core.errors import ArtifactError
from mogul.parallel import checkpoint, launch, load_sharded


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


def _folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / ".metadata").write_text(content)
    return path


def test_the_old_checkpoint_goes_after_the_new_has_its_name(tmp_path, monkeypatch):
    target, work = _folder(tmp_path / "run", "old"), _folder(tmp_path / "run.part", "new")
    rename = Path.rename

    def fail(self, to):
        if self == work:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="Input/output"):
            checkpoint._replace(target, work)
    assert (target / ".metadata").read_text() == "old"
    checkpoint._replace(target, work)
    assert (target / ".metadata").read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_save_that_was_cut_off_leaves_the_old_one_to_be_found(tmp_path):
    _folder(tmp_path / "run.old", "old")
    with pytest.raises(ArtifactError) as caught:
        load_sharded(tmp_path / "run", None, None)  # type: ignore[arg-type]
    assert "run.old" in caught.value.__notes__[0]
    checkpoint._replace(tmp_path / "run", _folder(tmp_path / "run.part", "new"))
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
