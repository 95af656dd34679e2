import errno
from types import SimpleNamespace

import pytest

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import (
    atomic_folder,
    atomic_write,
    check_space,
    check_writable,
    read_json,
    read_json_line,
    read_object,
)


def test_a_folder_appears_only_when_whole(tmp_path):
    target = tmp_path / "out"
    with atomic_folder(target) as work:
        (work / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "out") as work:
            (work / "a").write_text("1")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_refused_and_replaced_only_by_force(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ConfigError, match="exists and is not empty"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, force=True):
        raise RuntimeError
    assert (target / "old").exists()
    with atomic_folder(target, force=True) as work:
        (work / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named_and_nothing_stays(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out") as work:
            (work / "a").write_text("1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArtifactError, match="no space left to write") as caught:
        write()
    assert "free some space" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_number_is_told_by_its_words(tmp_path):
    with (
        pytest.raises(ArtifactError, match="8 requested and 0 written"),
        atomic_folder(  # numpy's
            tmp_path / "out"
        ),
    ):
        raise OSError("8 requested and 0 written")


def test_a_full_disk_is_named_whoever_met_it(tmp_path):
    told = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(ArtifactError, match="no space left to write"),
        atomic_folder(tmp_path / "out"),
    ):
        raise RuntimeError(told)  # safetensors'
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_is_not_taken_for_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "out"):
        (tmp_path / "out-of-another").read_text()
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*out"),
        atomic_folder(tmp_path / "out") as work,
    ):
        (work / "not" / "there").write_text("")


def test_what_a_killed_run_left_is_named(tmp_path, capsys):
    left = tmp_path / ".out-abc"
    left.mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert f"{left} is left of a run that was killed" in capsys.readouterr().err


def test_a_place_is_tried_before_the_work(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"cannot write .*file/inside: Not a directory"):
        check_writable(tmp_path / "file" / "inside")


def test_a_file_that_holds_no_object_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"a\.json holds no JSON object"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "{"]
)
def test_a_line_that_is_no_json_is_named(line):
    with pytest.raises(ArtifactError, match=r"^a\.jsonl, line 7 is no JSON") as caught:
        read_json_line(line, "a.jsonl", 7, fix="mend it")
    assert caught.value.__notes__ == ["fix: mend it"]
    assert read_json_line('{"a": "\\ud83d\\ude00"}', "a", 1, fix="") == {"a": "\N{GRINNING FACE}"}


def test_check_space_says_what_is_needed(tmp_path):
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ArtifactError, match=r"needs 1048576\.00 TiB but only .* are free"):
        check_space(tmp_path / "not" / "yet", 2**60)


@pytest.mark.parametrize("free", [0, OSError(errno.ESTALE, "stale")])
def test_a_file_system_that_does_not_count_is_not_full(tmp_path, monkeypatch, free):
    """Some network file systems give their size as 0."""

    def usage(_path):
        if isinstance(free, OSError):
            raise free
        return SimpleNamespace(total=0, free=0)

    monkeypatch.setattr("shutil.disk_usage", usage)
    check_space(tmp_path, 2**60)
    with pytest.raises(ArtifactError, match="0 written"), atomic_folder(tmp_path / "out"):
        raise OSError("8 requested and 0 written")


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "deep" / "a.json"
    atomic_write(path, '{"a": 1}')
    assert read_json(path) == {"a": 1}
    atomic_write(path, b"[]")
    assert read_json(path) == []
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_atomic_write_names_a_place_it_cannot_use(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        atomic_write(tmp_path / "file" / "a", "x")


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(ArtifactError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"bad\.json is not valid JSON"):
        read_json(tmp_path / "bad.json")
