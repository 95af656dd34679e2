"""What the pages point at exists: links, headings, files and tests; no page stands alone."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks")
    for page in folder.glob("*.md")
)
ROOMS = ("src/mogul", "tests", "benchmarks", "tools")


@cache
def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@cache
def files() -> tuple[str, ...]:
    found = (file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
    return tuple(f"/{file.relative_to(ROOT).as_posix()}" for file in found)


@cache
def names_of_tests() -> frozenset[str]:
    every = (ROOT / name[1:] for name in files() if name.startswith("/tests/"))
    names = [
        re.findall(r"^ *(?:async )?def (test_\w+)", text(file), re.MULTILINE) for file in every
    ]
    return frozenset(name for found in names for name in found)


def anchors(page: Path) -> set[str]:
    """The names that a hub gives the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def links(page: str) -> list[tuple[Path, str]]:
    """(file, heading) of every link to a file."""
    found = re.findall(r"\]\(([^)\s]+)\)", text(ROOT / page))
    inside = (link.partition("#") for link in found if not link.startswith("https://"))
    return [
        ((ROOT / page).parent / path if path else ROOT / page, head) for path, _, head in inside
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page):
    for target, heading in links(page):
        assert target.exists(), target
        assert not heading or heading in anchors(target), f"{target}#{heading}"


def test_every_page_is_linked_from_another():
    linked = {target.resolve() for page in PAGES for target, _ in links(page)}
    assert not [page for page in PAGES if page != "README.md" and ROOT / page not in linked]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_tests_that_are_named_exist(page):
    for quoted in re.findall(r"`([^`\n]+)`", text(ROOT / page)):
        for name in re.findall(r"(?<![\w*.])[\w/.-]+\.py\b", quoted):
            path = f"/{name.lstrip('./')}"
            package = f"{path.removesuffix('.py')}/__init__.py"
            assert any(one.endswith((path, package)) for one in files()), f"{page}: {name}"
        for name in re.findall(r"\btest_\w+\b(?!\.py)", quoted):
            known = name in names_of_tests() or any(one.endswith(f"/{name}.py") for one in files())
            assert known, f"{page}: {name}"
