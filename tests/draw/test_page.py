"""The page stands alone, escapes what it is given, and both renderers draw every chart."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mogul.core.errors import ConfigError
from mogul.core.table import Table
from mogul.draw.chart import Chart, HeatMap, Series
from mogul.draw.interactive import plotly_fragment
from mogul.draw.page import Page, marked_up, show_cell
from mogul.draw.png import save_png

BARS = Chart(
    title="Bars <1>", x_label="model", y_label="loss, nats a token", caption="See <this>.",
    series=[Series(name="a", kind="bars", x=["u", "v"], y=[1.0, 2.0], low=[0.5, 1], high=[2, 3])],
    reference=(1.0, "ideal"), y_from_zero=True,
)  # fmt: skip
DOTS = Chart(
    title="Dots", x_label="batch", y_label="rho", caption="", y_range=(0, 3),
    series=[
        Series(name=name, kind="dots", x=["1", "8"], y=[1.0, 2.0], dashed=name == "b")
        for name in "ab"
    ],
)  # fmt: skip
POWERS = Chart(
    title="Powers", x_label="measured", y_label="predicted", caption="", is_log=True,
    series=[Series(name="rows", kind="dots", x=[0.001, 1.0], y=[0.002, 2.0])],
)  # fmt: skip
LINES = Chart(
    title="Lines", x_label="step", y_label="loss", caption="",
    series=[Series(name="a", x=[0, 1, 2], y=[3.0, 2.0, 1.0])],
)  # fmt: skip
HEAT = HeatMap(
    title="Heat", x_label="step", y_label="device", value_label="rows",
    panels=[("one", np.eye(3)), ("two", 2 * np.eye(3))], caption="",
)  # fmt: skip
FIGURES = (BARS, DOTS, LINES, POWERS, HEAT)


class Resources(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


@pytest.fixture(scope="module")
def page() -> str:
    made = Page("Title & <co>", "lead `code`")
    made.section("Part <i>one</i>")
    made.prose("text <script>alert(1)</script> **bold**")
    made.facts([("<1>", "what & what", "note")])
    made.quote("<b>said</b>\nand done", "by <me>")
    made.table(Table("T <t>", ("name", "n"), [("<u>", 1234), ("v", None)], ("a <note>",)))
    for figure in FIGURES:
        made.figure(figure)
    made.footer("end")
    return made.html()


def test_the_page_fetches_nothing(page):
    seen = Resources()
    seen.feed(page)
    assert seen.found == []
    assert "link" not in seen.tags
    assert "@import" not in page.split("</style>")[0]
    # The library itself stands on the page, once.
    assert page.count("plotly.js v") == 1


def test_text_is_escaped(page):
    body = page.split("<body>")[1]
    assert "&lt;script&gt;alert(1)&lt;/script&gt; <b>bold</b>" in body
    for raw in ("<co>", "<i>one", "<b>said", "<me>", "<u>", "<t>", "<note>", "<this>"):
        assert raw not in body
    assert "<code>code</code>" in body
    assert '<td class="n">1,234</td>' in body


def test_a_page_without_figures_carries_no_library():
    page = Page("T")
    page.prose("p")
    assert len(page.html()) < 10_000


def test_marks_do_not_open_a_hole():
    assert marked_up("`<a>`") == "<code>&lt;a&gt;</code>"
    assert marked_up('"x"') == "&quot;x&quot;"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (1.23456, "1.235"), (12345, "12,345"), (12345.6, "12,346"), (True, "True")],
)
def test_cells(value, text):
    assert show_cell(value) == text


def test_fragments_carry_labels_and_values():
    fragment = plotly_fragment(DOTS, "here")
    assert 'id="here"' in fragment
    assert re.search(r'"text":"batch"', fragment)
    assert "<script src" not in fragment
    assert plotly_fragment(POWERS, "here").count('"type":"log"') == 2


def test_a_table_without_names_of_columns_has_no_head():
    page = Page("T")
    page.table(Table("facts", ("", ""), [("step", "18 s")]))
    assert "<thead>" not in page.html()


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.title)
def test_png_is_written(figure, tmp_path):
    path = save_png(figure, tmp_path / "figure.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width = int.from_bytes(data[16:20])
    assert width > 800


def test_write_is_whole(tmp_path):
    page = Page("T")
    assert page.write(tmp_path / "sub" / "report.html").read_text() == page.html()


def test_series_must_agree_in_length():
    with pytest.raises(ConfigError, match="'odd': x, y, low and high differ"):
        Series(name="odd", x=[1, 2], y=[1.0])


def test_heat_limits_are_shared():
    assert HEAT.limits == (0.0, 2.0)
