"""The readers of `tools/debian_text.py`: formats to paragraphs, and what is dropped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tool():
    file = Path(__file__).parents[3] / "tools" / "debian_text.py"
    spec = importlib.util.spec_from_file_location("debian_text", file)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["debian_text"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("reader", "given", "expected"),
    [
        (
            "from_rst",
            "Title\n=====\n\nSee :ref:`the guide <x>` and ``code``.\n",
            "See the guide and code.",
        ),
        ("from_rst", ".. note::\n\nText of a `link <http://a.b>`_ here.", "Text of a link here."),
        (
            "from_pod",
            "=head1 NAME\n\nUse B<C<this>> or L<that|perlre> now.\n\n=cut",
            "Use this or that now.",
        ),
        (
            "from_html",
            "<head><title>x</title></head><p>One &amp; <b>two</b> words</p>",
            "One & two words",
        ),
        (
            "from_markdown",
            "# Head\n\nSome *words* with [a link](x.html).",
            "Some words with a link.",
        ),
        (
            "from_roff",
            '.\\" no\n.SH X\nread words \\- from a\n.BR file (2)\nof\n.I that very kind',
            "read words - from a file(2) of that very kind",
        ),
        (
            "from_gcide",
            "To infatuate. [Obs.] --Milton.\n[1913 Webster]",
            "To infatuate. [Obs.] --Milton.",
        ),
        (
            "from_wordnet",
            '1 03 n 02 big_thing 0 entity 0 000 | that which is; "x"\n',
            'big thing, entity: that which is; "x"',
        ),
    ],
)
def test_readers_keep_the_words(tool, reader, given, expected):
    assert expected in list(tool.paragraphs(getattr(tool, reader)(given)))


def test_what_is_no_prose_is_dropped(tool):
    text = "A sentence of\nplain words.\n\n0x1f 0x2e 3 4 {};\n\nNext: Other, Up: Top\n\n---\n"
    assert list(tool.paragraphs(text)) == ["A sentence of plain words."]


def test_long_paragraphs_are_kept_once(tool):
    seen = tool.Remembered()
    long = "word " * 20
    assert seen.is_new(long)
    assert not seen.is_new("  " + long.upper())
    assert seen.dropped_bytes > 0
    assert seen.is_new("short")
    assert seen.is_new("short")


def test_samples_are_nested(tool):
    names = [f"/usr/share/doc/{i}" for i in range(500)]
    small, large = ({n for n in names if tool.is_chosen(n, s)} for s in (0.2, 0.5))
    assert small < large
    assert 60 < len(small) < 140
