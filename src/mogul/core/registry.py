"""Implementations of one operation by name, each with the reason why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mogul.core.errors import BackendError, nearest

F = TypeVar("F", bound=Callable[..., Any])
WhyNot = Callable[..., str | None]


def always(**_facts: object) -> str | None:
    """A `why_not` that never objects."""
    return None


@dataclass(frozen=True)
class _Entry(Generic[F]):
    function: F
    why_not: WhyNot


class Registry(Generic[F]):
    """The implementations of one operation.

    `why_not(**facts)` gets the facts of a call (device, dtype, shapes: whatever the operation
    passes) and returns None, or the reason why this implementation cannot serve it. Order of
    registration is the order of preference for `choose`.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self._entries: dict[str, _Entry[F]] = {}

    def add(self, name: str, function: F, *, why_not: WhyNot = always, first: bool = False) -> F:
        """Register `function`; `first=True` puts it before all others in preference."""
        entry = _Entry(function, why_not)
        if first:
            self._entries = {name: entry, **self._entries}
        else:
            self._entries[name] = entry
        return function

    def names(self) -> list[str]:
        """Every registered name, most preferred first."""
        return list(self._entries)

    def reasons(self, **facts: object) -> dict[str, str | None]:
        """Why each implementation refuses these facts; None where it does not."""
        return {name: entry.why_not(**facts) for name, entry in self._entries.items()}

    def get(self, name: str, **facts: object) -> F:
        """Return one implementation, or raise BackendError saying why it cannot run."""
        if name not in self._entries:
            raise BackendError(
                f"{self.operation} has no backend {name!r}", fix=nearest(name, self._entries)
            )
        entry = self._entries[name]
        if reason := entry.why_not(**facts):
            usable = [other for other, why in self.reasons(**facts).items() if why is None]
            raise BackendError(
                f"{self.operation}: backend {name!r} cannot run here: {reason}",
                fix=f"use {' or '.join(map(repr, usable))}" if usable else "",
            )
        return entry.function

    def __getitem__(self, name: str) -> F:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def choose(self, **facts: object) -> tuple[str, F]:
        """Return the most preferred implementation that accepts these facts, with its name."""
        reasons = self.reasons(**facts)
        for name, reason in reasons.items():
            if reason is None:
                return name, self._entries[name].function
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise BackendError(f"{self.operation} has no backend that can run here ({told})")
