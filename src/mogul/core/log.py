"""Talk to the person at the terminal: everything here goes to standard error.

`say` prints a visible line; `log` is the library's logger; `progress` shows a bar on a terminal
and plain lines elsewhere, and stays silent while the work takes less than two seconds. A thread
tells of a step that takes longer while it runs, so a note is best given before what it names.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mogul.core.units import show_s

if TYPE_CHECKING:
    from rich.progress import Progress

SILENT_S = 2.0
PLAIN_EVERY_S = 5.0

log = logging.getLogger("mogul")


def say(text: str) -> None:
    """Print one visible line to standard error."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class ProgressBar:
    """What `progress` yields; call `advance` as work gets done."""

    def __init__(self, description: str, total: float | None) -> None:
        self.description = description
        self.total = total
        self.done = 0.0
        self.note = ""
        self._start_s = time.monotonic()
        self._last_plain_s = self._start_s
        self._rich: Progress | None = None
        self._shown = False
        self._told = (0.0, "")
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="progress", daemon=True).start()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units as done and show `note` beside them."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str = "") -> None:
        """Set the units done so far, or say what comes next."""
        with self._lock:
            self.done, self.note = done, note or self.note
            now_s = time.monotonic()
            if now_s - self._start_s >= SILENT_S:
                self._show(now_s)

    def _watch(self) -> None:
        """Tell of a step that is still running: after two seconds, then whatever is new."""
        wait_s = SILENT_S
        while not self._ended.wait(wait_s):
            wait_s = PLAIN_EVERY_S
            with self._lock:
                is_new = not self._shown or self._told != (self.done, self.note)
                if is_new and not self._ended.is_set():
                    self._show(time.monotonic())

    def _show(self, now_s: float) -> None:
        if sys.stderr.isatty():
            self._show_rich()
        elif not self._shown or now_s - self._last_plain_s >= PLAIN_EVERY_S:
            self._last_plain_s = now_s
            self._shown, self._told = True, (self.done, self.note)
            say(self._plain_line(now_s))

    def _plain_line(self, now_s: float) -> str:
        share = f"{100 * self.done / self.total:3.0f} %" if self.total else f"{self.done:g}"
        elapsed = show_s(now_s - self._start_s, 0)
        return f"{self.description}: {share}, {elapsed}" + (f", {self.note}" if self.note else "")

    def _show_rich(self) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %" if self.total else "{task.completed:g}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._rich.add_task(self.description, total=self.total, note="")
            self._rich.start()
        self._rich.update(self._rich.task_ids[0], completed=self.done, note=self.note)
        self._shown = True

    def close(self) -> None:
        """Leave the last state on screen."""
        with self._lock:
            self._ended.set()
        if self._rich is not None:
            self._rich.stop()
        elif self._shown and self._told[0] != self.done:
            say(self._plain_line(time.monotonic()))


@contextmanager
def progress(description: str, total: float | None = None) -> Iterator[ProgressBar]:
    """Show how far a piece of work is; silent when it ends within two seconds."""
    bar = ProgressBar(description, total)
    try:
        yield bar
    finally:
        bar.close()
