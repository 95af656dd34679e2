"""From tokens to text as it becomes certain, up to the first stop string.

Decides what may be shown already: no half character, and nothing that could still turn out to be
the beginning of a stop string. How the text was cut into tokens makes no difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mogul.serve.params import SamplingParams

HALF = "\ufffd"
"""What a decoder writes for bytes that are no character (yet)."""

MOST_HALF_TOKENS = 8
"""Tokens held back as half a character; more are bytes that never become one."""


class StopFinder:
    """Finds the stop string that ends first, in text that arrives in pieces."""

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add a piece; return what is certainly before any stop string."""
        if self.found is not None:
            return ""
        whole = self._held + text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if hits:
            end, start, self.found = min(hits)
            self._held = ""
            return whole[: end if self._include else start]
        keep = self._doubtful(whole)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def _doubtful(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

    def close(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> None:
        self._tokenizer: Any = tokenizer
        self._finder = StopFinder(params.stop, include=params.include_stop)
        self._free_tokens = params.min_tokens
        self._ids: list[int] = []
        self._start = self._shown = 0
        """Tokens decoded together, so that spaces between words come out right, and of these the
        ones whose text was given."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._finder.found is not None

    def push(self, token: int) -> str:
        """Add a token; return the text that it makes certain."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        text = self._new_text(final=False)
        if len(self._ids) <= self._free_tokens:
            return text
        return self._finder.push(text)

    def close(self) -> str:
        """What was held back, once the answer ends without a stop string."""
        if self.is_stopped:
            return ""
        text = self._new_text(final=True)
        if len(self._ids) <= self._free_tokens:
            return text
        text = self._finder.push(text)
        return text + self._finder.close()

    def _new_text(self, *, final: bool) -> str:
        text = self._decode(self._ids[self._start :])
        waiting = len(self._ids) - self._shown
        if text.endswith(HALF) and not final and waiting <= MOST_HALF_TOKENS:
            return ""
        new = text[len(self._decode(self._ids[self._start : self._shown])) :]
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
