"""Pages of the KV cache: who owns which, what may be reused, what is forgotten first.

A page is free (nothing worth keeping), owned (a running request reads it) or cached (nobody reads
it, but its tokens are known). A full page is known by a hash of its tokens, of everything before
them and of a salt; on a hit the tokens themselves and the hash before are compared too, page after
page, so two texts with one hash never mix. Cached pages are forgotten least recently used first,
the last pages of a text before its first ones. No tensor here: pages are numbers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """What a full page holds."""

    digest: bytes
    before: bytes
    """Digest of the page before it, or the salt."""

    tokens: tuple[int, ...]


def root_digest(*parts: str) -> bytes:
    """Salt of a chain: everything that decides what a token's keys and values are."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def next_digest(digest: bytes, tokens: Sequence[int]) -> bytes:
    """Digest of a page from the one before it and its tokens."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=digest, digest_size=16).digest()


class BlockPool:
    """All pages of one cache."""

    def __init__(self, num_pages: int, page_size: int, *, reuse: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.reuse = reuse
        self.readers = [0] * num_pages
        self.known: list[Known | None] = [None] * num_pages
        self._free: dict[int, None] = dict.fromkeys(range(num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._by_digest: dict[bytes, int] = {}
        self.hit_tokens = 0

    @property
    def num_available(self) -> int:
        """Pages that can be given out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody reads but whose tokens are kept."""
        return len(self._cached)

    def take(self, wish: int | None = None) -> int:
        """Give out a page with nothing in it, the wished one where it is free.

        When none is free, the oldest cached one is forgotten.
        """
        if self._free:
            page = wish if wish is not None and wish in self._free else next(iter(self._free))
            del self._free[page]
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self.readers[page] = 1
        return page

    def match(self, root: bytes, tokens: Sequence[int]) -> list[int]:
        """Pages that hold the longest known beginning of `tokens`; nothing is taken yet."""
        found: list[int] = []
        if not self.reuse:
            return found
        before = root
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            part = tuple(tokens[start : start + self.page_size])
            digest = next_digest(before, part)
            if (page := self._by_digest.get(digest)) is None:
                break
            if self.known[page] != Known(digest, before, part):
                break
            found.append(page)
            before = digest
        return found

    def digest_of(self, page: int) -> bytes:
        """Digest of a known page."""
        known = self.known[page]
        assert known is not None
        return known.digest

    def count_hits(self, hit_tokens: int) -> None:
        """Note what a request found."""
        self.hit_tokens += hit_tokens

    def share(self, pages: Iterable[int]) -> None:
        """Become a reader of known pages."""
        for page in pages:
            self.readers[page] += 1
            self._cached.pop(page, None)

    def learn(self, page: int, before: bytes, tokens: tuple[int, ...]) -> bytes:
        """Note what a page that was filled holds, and return its digest.

        Where two pages were filled with the same text, the first one is known.
        """
        digest = next_digest(before, tokens)
        if self.reuse and self.known[page] is None and digest not in self._by_digest:
            self.known[page] = Known(digest, before, tokens)
            self._by_digest[digest] = page
        return digest

    def give_back(self, pages: Sequence[int]) -> None:
        """Stop reading pages; known ones stay cached, the last of a text forgotten first."""
        for page in reversed(pages):
            self.readers[page] -= 1
            if self.readers[page]:
                continue
            if self.known[page] is None:
                self._free[page] = None
            else:
                self._cached[page] = None

    def _forget(self, page: int) -> None:
        known = self.known[page]
        if known is not None:
            del self._by_digest[known.digest]
            self.known[page] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare the books with the tables of all running requests.

        Raises:
            AssertionError: a page is lost, given out twice, or counted wrongly.
        """
        readers = [0] * self.num_pages
        for table in tables:
            assert len(set(table)) == len(table), "a table names a page twice"
            for page in table:
                readers[page] += 1
        assert readers == self.readers, "readers are miscounted"
        owned = sum(1 for count in readers if count)
        assert len(self._free) + len(self._cached) + owned == self.num_pages, "a page is lost"
        assert not any(readers[page] for page in (*self._free, *self._cached)), "owned and free"
        assert all(self.known[page] is None for page in self._free), "a free page is known"
        assert all(self.known[page] is not None for page in self._cached), "a cached page is not"
        digests = {known.digest: page for page, known in enumerate(self.known) if known}
        assert digests == self._by_digest, "digests and pages differ"
