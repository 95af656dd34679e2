"""Values that may be absent are read as what they are; flags have one name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mogul.cli.flags import parse


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
