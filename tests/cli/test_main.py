"""The command line finds its verb, ends cleanly, and imports no more than it needs."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mogul import __version__
from mogul.cli import main as cli
from mogul.core.errors import ArtifactError, BackendError, ConfigError

HEAVY = ("torch", "transformers", "numpy", "pydantic", "tyro", "rich", "plotly", "matplotlib")


def imported_by(*args: str) -> set[str]:
    """Run one command line in a fresh interpreter; return the heavy modules it imported."""
    code = (
        "import sys, json; from mogul.cli.main import main; code = main(sys.argv[1:]);"
        f"json.dump([code, [m for m in {HEAVY} if m in sys.modules]], sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    status, modules = json.loads(done.stderr)
    assert status == 0, done.stderr
    return set(modules)


def cpu_s(*args: str, runs: int = 3) -> float:
    """Least user and system time of some runs of the interpreter."""
    least = float("inf")
    for _ in range(runs):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *args], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least = min(least, spent)
    return least


def raising(error: BaseException):
    def run(_options):
        raise error

    return SimpleNamespace(run=run)


@pytest.fixture
def verb(monkeypatch):
    """Replace what the verb `info` runs."""

    def install(module):
        monkeypatch.setattr(cli, "import_module", lambda _name: module)
        monkeypatch.setattr(cli, "_parse", lambda *_: None)

    return install


def test_help_lists_every_verb_and_teaches(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in cli.VERBS.items():
        assert f"{name} " in out
        assert text in out
    assert "mogul info preset:pangu-pro-moe-72b" in out


def test_no_verb_is_wrong_usage(capsys):
    assert cli.main([]) == 2
    shown = capsys.readouterr()
    assert "usage:" in shown.err
    assert shown.out == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mogul {__version__}\n"


@pytest.mark.parametrize(
    ("word", "told"),
    [("inof", "unknown verb 'inof'\nfix: did you mean 'info'?"), ("--verson", "'--version'")],
)
def test_an_unknown_word_names_the_nearest(capsys, word, told):
    assert cli.main([word]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself(capsys, name):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: mogul {name}" in out
    assert "{None}" not in out  # a value that may be absent is shown as what it is
    assert ", --no-" not in out  # nor a flag twice
    assert "examples:" in out
    assert f"mogul {name}" in out.split("examples:")[1]


def test_wrong_usage_exits_2(capsys):
    assert cli.main(["info", "preset:", "--formt", "json"]) == 2
    assert "--formt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no", fix="do"), 2),
        (ArtifactError("no", fix="do"), 1),
        (BackendError("no", fix="do"), 1),
    ],
)
def test_errors_end_with_their_fix_and_without_traceback(verb, capsys, error, code):
    verb(raising(error))
    assert cli.main(["info", "x"]) == code
    assert capsys.readouterr().err == "mogul info: no\nfix: do\n"


def test_debug_shows_the_traceback(verb):
    verb(raising(ArtifactError("no")))
    with pytest.raises(ArtifactError):
        cli.main(["info", "x", "--debug"])
    with pytest.raises(ArtifactError):
        cli.main(["--debug", "info", "x"])


@pytest.mark.parametrize(
    "error", [MemoryError("7 TiB"), RuntimeError("CPUAllocator: can't allocate memory: 9 bytes")]
)
def test_too_little_memory_says_what_would_fit(error, verb, capsys):
    verb(raising(error))
    assert cli.main(["info", "x"]) == 1
    assert "fix: it takes more memory than there is: smaller batches" in capsys.readouterr().err


@pytest.mark.parametrize(("load", "policy"), [(0.1, None), (1e6, "passive")])
def test_threads_sleep_where_they_wait_on_a_busy_machine(verb, monkeypatch, load, policy):
    seen = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "x")  # put back at the end
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(cli.os, "getloadavg", lambda: (load, 0.0, 0.0))

    def run(_options):
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
        return 0

    verb(SimpleNamespace(run=run))
    assert cli.main(["info", "x"]) == 0
    assert seen == [policy]


def test_an_unexpected_error_is_short_too(verb, capsys):
    verb(raising(RuntimeError("odd")))
    assert cli.main(["info", "x"]) == 1
    assert "mogul info: RuntimeError: odd\nfix: this is unexpected" in capsys.readouterr().err


def test_a_path_that_cannot_be_used_is_named(verb, capsys):
    verb(raising(PermissionError(13, "Permission denied", "/root/x")))
    assert cli.main(["info", "x"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("mogul info: /root/x: Permission denied\nfix: check that the path")


def test_a_missing_library_names_its_extra(verb, capsys):
    verb(raising(ModuleNotFoundError("No module named 'torch'", name="torch")))
    assert cli.main(["info", "x"]) == 1
    assert "fix: pip install 'mogul[models]'\n" in capsys.readouterr().err


def test_ctrl_c_exits_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["info", "x"]) == 130
    assert capsys.readouterr().err == "\nmogul: interrupted\n"


def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-m", "mogul.cli.main", "info", "preset:", "--format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_what_each_command_line_imports():
    assert imported_by("--help") == set()
    assert imported_by("--version") == set()
    assert imported_by("info", "preset:pangu-pro-moe-72b") <= {"numpy", "pydantic", "tyro", "rich"}


@pytest.mark.parametrize("name", cli.VERBS)
def test_a_verbs_help_waits_for_no_heavy_library(name):
    assert imported_by(name, "--help") <= {"tyro", "rich"}


def test_help_and_info_start_nearly_as_fast_as_the_interpreter():
    bare_s = cpu_s("-c", "pass")
    assert cpu_s("-c", "import mogul") < 3 * bare_s + 0.02
    assert cpu_s("-m", "mogul.cli.main", "--help") < 10 * bare_s
    assert cpu_s("-m", "mogul.cli.main", "info", "preset:pangu-pro-moe-72b") < 100 * bare_s


@pytest.mark.parametrize(
    "args",
    [
        ("generate", "absent", "--prompt", "x"),
        ("trace", "absent", "--out", "t"),
        ("upcycle", "absent", "--experts", "4", "--groups", "2", "--out", "m"),
        ("regroup", "absent", "--trace", "t", "--devices", "2", "--out", "m"),
        ("calibrate", "absent"),
        ("quantise", "absent", "--to", "fp8", "--out", "m"),
        ("bench", "serve", "absent"),
        ("train", "absent", "--out", "r"),
    ],
)
def test_verbs_that_load_torch_say_what_they_do_first(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(list(args)) != 0
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("loading ")
    assert "absent" in told[0]
    assert told[-1].startswith("fix: ")
