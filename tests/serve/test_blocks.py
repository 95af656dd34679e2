"""Pages: shared by what was said, never lost, never mixed."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mogul.serve import blocks
from mogul.serve.blocks import BlockPool, root_digest

ROOT = root_digest("model", "fp32")


def fill(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> list[int]:
    """Take pages for a text and teach the pool its full ones."""
    size = pool.page_size
    pages = [pool.take() for _ in range(-(-len(tokens) // size))]
    before = root
    for i in range(len(tokens) // size):
        before = pool.learn(pages[i], before, tuple(tokens[i * size : (i + 1) * size]))
    return pages


def test_the_longest_known_beginning_is_found():
    pool = BlockPool(8, 2)
    pages = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match(ROOT, [1, 2, 3, 4, 5, 6]) == pages[:2]
    assert pool.match(ROOT, [1, 2, 3, 9]) == pages[:1]
    assert pool.match(ROOT, [3, 4]) == [], "the same tokens elsewhere are another text"
    assert pool.match(root_digest("model", "bf16"), [1, 2]) == []


def test_equal_hashes_of_two_texts_do_not_mix(monkeypatch):
    monkeypatch.setattr(blocks, "next_digest", lambda _before, _tokens: b"always the same")
    pool = BlockPool(8, 2)
    pages = fill(pool, [1, 2])
    assert pool.match(ROOT, [1, 2]) == pages
    assert pool.match(ROOT, [3, 4]) == []
    assert pool.match(root_digest("other"), [1, 2]) == []


def test_the_oldest_is_forgotten_first_and_ends_before_beginnings():
    pool = BlockPool(4, 1)
    old, new = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.give_back(old)
    pool.give_back(new)
    assert pool.take() == old[1]
    assert pool.match(ROOT, [1, 2]) == old[:1]
    assert pool.take() == old[0]
    assert pool.match(ROOT, [3, 4]) == new


def test_the_first_page_with_a_text_stays_the_known_one():
    pool = BlockPool(4, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert pool.match(ROOT, [1, 2]) == first
    pool.give_back(second)
    assert (pool.num_available, pool.num_cached) == (3, 0)


class Pages(RuleBasedStateMachine):
    """Texts come, share, grow and go; a dictionary remembers what every page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 2)
        self.content: dict[int, tuple[int, ...]] = {}
        self.texts: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=12))
    def come(self, tokens: list[int]) -> None:
        pool = self.pool
        known = pool.match(ROOT, tokens)
        for i, page in enumerate(known):
            assert self.content[page] == tuple(tokens[: 2 * i + 2]), "a page of another text"
        fresh = -(-len(tokens) // 2) - len(known)
        if fresh + sum(1 for page in known if not pool.readers[page]) > pool.num_available:
            return
        pool.share(known)
        pages = [*known, *(pool.take() for _ in range(fresh))]
        before = pool.digest_of(known[-1]) if known else ROOT
        for i in range(len(known), len(tokens) // 2):
            self.content[pages[i]] = tuple(tokens[: 2 * i + 2])
            before = pool.learn(pages[i], before, tuple(tokens[2 * i : 2 * i + 2]))
        self.texts.append((tokens, pages))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.texts) - 1))
        self.pool.give_back(self.texts.pop(index)[1])

    @invariant()
    def no_page_is_lost(self) -> None:
        self.pool.check(pages for _, pages in self.texts)


TestPages = Pages.TestCase
TestPages.settings = settings(stateful_step_count=30, deadline=None)
