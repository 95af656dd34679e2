"""What the first page promises exists: make targets, verbs and their flags."""

import re
import shlex
from pathlib import Path

import pytest

from mogul.cli.main import VERBS, main

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^mogul .*?(?=\s+#|$)", text, re.MULTILINE)


@pytest.mark.parametrize("command", commands())
def test_every_flag_of_a_command_is_in_its_help(command, capsys):
    verb, *words = shlex.split(command)[1:]
    assert verb in VERBS
    assert main([verb, *words, "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in (word for word in words if word.startswith("--")):
        assert flag in shown


def test_the_first_command_runs(capsys):
    command = next(line for line in commands() if " info " in line)
    assert main(shlex.split(command)[1:]) == 0
    assert "71,988,781,056" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_commands_run_as_they_stand_one_after_the_other(tmp_path, monkeypatch):
    """In an empty folder, up to the sentence that says so."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("Those run as they stand")[0]
    monkeypatch.chdir(tmp_path)
    shown = re.findall(r"^mogul .*?(?=\s+#|$)", text, re.MULTILINE)
    assert len(shown) == 8
    for command in shown:
        assert main(shlex.split(command)[1:]) == 0, command
    for name in ("trace/report.html", "trace/placement.json", "runs/tiny/report.html"):
        assert (tmp_path / name).is_file()
