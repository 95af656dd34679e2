"""Implementations of one operation by name, each with the reason why it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from mogul.core.errors import BackendError, nearest
from mogul.core.log import log

F = TypeVar("F", bound=Callable[..., Any])
WhyNot = Callable[..., str | None]
OnChoice = Callable[["Registry[Any]", str, Any], None]


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

    def __init__(self, operation: str, *, on_choice: OnChoice | None = None) -> None:
        """Name the operation; `on_choice(registry, name, facts)` hears of new automatic choices."""
        self.operation = operation
        self._entries: dict[str, _Entry[F]] = {}
        self._on_choice = on_choice
        self.changes = 0
        """How often something was registered: who keeps a choice must look."""
        # torch.compile warns of functools.lru_cache, so the cache is a plain one.
        self._resolved: dict[tuple[Any, ...], tuple[str, F]] = {}

    def add(self, name: str, function: F, *, why_not: WhyNot = always, first: bool = False) -> F:
        """Register `function`; `first=True` puts it before all others in preference."""
        entry = _Entry(function, why_not)
        self.changes += 1
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

    def resolve(self, backend: str, facts: NamedTuple) -> tuple[str, F]:
        """`get` a backend by its name, or `choose` for "auto": asked once for each kind of call."""
        key = (tuple(self._entries), backend, facts)
        if (known := self._resolved.get(key)) is None:
            known = self._resolved[key] = self._ask(backend, facts)
        return known

    def _ask(self, backend: str, facts: NamedTuple) -> tuple[str, F]:
        told = facts._asdict()
        if backend != "auto":
            return backend, self.get(backend, **told)
        found = self.choose(**told)
        if self._on_choice is not None:
            self._on_choice(self, found[0], facts)
        return found


def warn_of_reference(registry: Registry[Any], name: str, facts: Any) -> None:
    """An `on_choice` that says why the slow reference runs; `facts` names the device."""
    if name == "reference":
        reasons = registry.reasons(**facts._asdict())
        others = "; ".join(f"{other}: {why}" for other, why in reasons.items() if why)
        operation, device = registry.operation, facts.device
        log.warning(f"{operation} runs the slow reference backend on {device} ({others})")
