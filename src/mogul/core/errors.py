"""The errors mogul raises on purpose, in one tree.

Every message says what was given and why it cannot be; the note `fix: ...` says how to mend it.
Each class also inherits the standard class it refines, so callers may catch either.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MogulError(Exception):
    """Base of every error mogul raises on purpose."""

    def __init__(self, problem: str, *, fix: str = "") -> None:
        super().__init__(problem)
        if fix:
            self.add_note(f"fix: {fix}")


class ConfigError(MogulError, ValueError):
    """A value the user gave cannot work."""


class FieldError(ConfigError):
    """A field of a record has a value that cannot be; who knows the value's origin may name it."""

    def __init__(self, problem: str, *, fix: str = "", key: str = "", reason: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.fix, self.key, self.reason = fix, key, reason


class ArtifactError(MogulError, ValueError):
    """A file or checkpoint is missing, damaged or not what it claims to be."""


class HardwareError(MogulError, RuntimeError):
    """A device or one of its features is missing."""


class BackendError(MogulError, RuntimeError):
    """An implementation refuses the call; the message holds the reason of each candidate."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "did you mean ...?" for the closest of `known`, or the list of all of them."""
    names = sorted(known)
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names)}"
