"""Room in pages: how the policy's questions are answered from the block pool.

A running request owns the pages of its table. Who is admitted is promised pages for its whole
prompt; one page for every other request stays promised to those that decode. Pages that are full
of known tokens are taught to the pool, so that later requests share them. Every request has a home,
a run of pages it fills in order while they are free.
"""

from __future__ import annotations

import numpy as np

from mogul.schedule.policy import Request
from mogul.serve.blocks import BlockPool
from mogul.serve.requests import Live


class PageRoom:
    """The scheduler's view of a block pool."""

    def __init__(self, pool: BlockPool, pages_a_table: int, watermark: float = 0.01) -> None:
        self.pool = pool
        self.pages_a_table = pages_a_table
        self.spare = int(watermark * pool.num_pages)
        self.running: dict[int, Live] = {}
        self._next_home = 0

    def pages_of(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.pool.page_size)

    def admit(self, request: Request, *, is_alone: bool) -> bool:
        """Take in known pages when there is room for the whole goal."""
        live = _live(request)
        known = [] if live.wants_whole_prompt else self.pool.match(live.root, live.tokens)
        known = known[: (live.goal - 1) // self.pool.page_size]  # compute one token at least
        pool = self.pool
        wanted = self.pages_of(live.goal) - len(known)
        wanted += sum(1 for page in known if not pool.readers[page])  # cached ones count as free
        if not is_alone and wanted + self.spare + self._promised() > pool.num_available:
            return False
        pool.share(known)
        live.pages = list(known)
        live.table = np.zeros(self.pages_a_table, np.int32)
        live.table[: len(known)] = known
        live.digests = [pool.digest_of(page) for page in known]
        live.computed = len(known) * pool.page_size
        if live.cached_tokens is None:
            live.cached_tokens = live.computed
            pool.count_hits(live.computed)
        live.home = self._next_home
        whole = self.pages_of(live.prompt_tokens + live.output_tokens)
        self._next_home = (self._next_home + whole) % pool.num_pages
        self.running[live.id] = live
        return True

    def _promised(self) -> int:
        """Pages that running requests will need before anyone else comes in."""
        size = self.pool.page_size
        return sum(
            max(0, -(-(max(one.goal, one.computed) + 1) // size) - len(one.pages))
            for one in self.running.values()
        )

    def fit(self, request: Request, tokens: int) -> int:
        """Give pages for as many of the next tokens as the pool has."""
        live = _live(request)
        pool, pages = self.pool, live.pages
        missing = self.pages_of(live.computed + tokens) - len(pages)
        for _ in range(min(missing, pool.num_available)):
            page = pool.take(live.home + len(pages))
            live.table[len(pages)] = page
            pages.append(page)
        return min(tokens, len(pages) * pool.page_size - live.computed)

    def release(self, request: Request) -> None:
        """Give all pages back; full ones stay known."""
        live = self.running.pop(request.id)
        if not live.error:
            self.learn(live)
        self.pool.give_back(live.pages)
        live.pages, live.digests = [], []

    def learn(self, live: Live) -> None:
        """Teach the pool the pages that are full of computed, known tokens."""
        if not self.pool.reuse:
            return
        size = self.pool.page_size
        full = min(live.computed, len(live.tokens)) // size
        for index in range(len(live.digests), full):
            before = live.digests[-1] if live.digests else live.root
            part = tuple(live.tokens[index * size : (index + 1) * size])
            live.digests.append(self.pool.learn(live.pages[index], before, part))

    def check(self) -> None:
        """Assert that no page is lost; see `BlockPool.check`."""
        self.pool.check(live.pages for live in self.running.values())


def _live(request: Request) -> Live:
    assert isinstance(request, Live)
    return request
