"""One thread at a time, and who waits is next.

A plain lock goes to whoever asks first after it is free: a thread that steps an engine in a loop
asks again at once, so one that wants to add or abort a request could wait for thousands of steps.
Here it waits for one.
"""

from __future__ import annotations

import threading


class Door:
    """A lock that its holder may take again, for `with`."""

    def __init__(self) -> None:
        self._next, self._room = threading.Lock(), threading.Lock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        """Wait behind the door, then inside; whoever leaves finds the place behind it taken."""
        me = threading.get_ident()
        if self._holder != me:
            with self._next:
                self._room.acquire()
            self._holder = me
        self._depth += 1

    def __exit__(self, *_error: object) -> None:
        """Let the next one in, unless taken more than once."""
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._room.release()
