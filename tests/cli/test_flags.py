"""Values that may be absent are read as what they are; flags have one name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mogul.cli.flags import named_by_flags, parse
from mogul.cli.main import main
from mogul.core.errors import ConfigError
from mogul.spec.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is read."""

    count: int | None = None
    place: Path | None = None
    kind: Literal["x", "y"] | None = None
    is_on: bool = False
    is_off: bool = True


def read(*args):
    return parse(Options, list(args), prog="p", description="d")


def test_what_is_left_out_is_none_and_what_is_given_is_read():
    assert read() == Options()
    given = read("--count", "3", "--place", "a/b", "--kind", "y", "--is-on", "--no-is-off")
    assert given == Options(count=3, place=Path("a/b"), kind="y", is_on=True, is_off=False)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--count", "three"), "invalid literal for int"),
        (("--count", "None"), "invalid literal for int"),
        (("--kind", "z"), "invalid choice"),
        (("--no-is-on",), "Unrecognized options"),
    ],
)
def test_what_cannot_be_is_wrong_usage(args, words, capsys):
    with pytest.raises(SystemExit) as caught:
        read(*args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch": 0}, r"^--batch 7 cannot be: it should be greater than or equal to 1"),
        ({"input_tokens": -2}, r"^--count 3 cannot be: it should be greater than or equal to 1"),
        ({"prefix_hit": 2.0}, r"^Workload: prefix_hit: Input should be less than 1"),
    ],
)
def test_a_field_that_cannot_be_is_told_as_its_flag_was_typed(values, words):
    @dataclass
    class Typed:
        batch: int = 7
        count: int = 3

    flags = named_by_flags(Typed(), input_tokens="count")
    with pytest.raises(ConfigError, match=words) as caught, flags:
        Workload(**values)
    assert caught.value.__notes__[0].startswith("fix: use ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("data build shipped --held-out 2 --out x", "--held-out 2.0 cannot be: it should be less"),
        ("data build shipped --vocab-size 0 --out x", "--vocab-size 0 cannot be"),
        ("demo --seconds -1 --out x", "--seconds -1.0 cannot be"),
    ],
)
def test_verbs_tell_the_flag(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args.split()) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
