"""End with a message when another rank has failed or vanished, even inside a stuck collective.

Every rank beats its heart in the ranks' common store from a thread of its own, and looks at the
others' hearts. Collectives of a GPU wait in the driver for minutes when a peer is gone, so the
thread ends the process itself, without tearing down what would hang.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store

EXIT_CODE = 70
WAIT_LIMIT_S = 600.0
"""How long ranks wait in one collective, or at one barrier, for a rank that shows signs of life."""
BEATS_A_PATIENCE = 8

_PREFIX = "mogul_watch"


def is_left(common: Store, size: int) -> bool:
    """Whether a rank of the run that this store served has left it or failed."""
    store = PrefixStore(_PREFIX, common)
    return any(store.check([key]) for key in ("failed", *(f"left{rank}" for rank in range(size))))


class Watch:
    """The heartbeat of one rank and its eye on the others."""

    def __init__(self, rank: int, size: int, patience_s: float, common: Store) -> None:
        self.rank, self.size, self.patience_s = rank, size, patience_s
        self._common: Store | None = common
        """Rank 0's is the store itself, which must outlive what others ask it."""
        store: Any = PrefixStore(_PREFIX, common)
        # A connection of its own where torch can make one: a thread may wait in the other.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._stopped = threading.Event()
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._run, name="mogul-watch", daemon=True)
        self._thread.start()

    def tell(self, reason: str) -> None:
        """Tell the others that this rank fails."""
        self._stopped.set()
        try:
            self._store.set("failed", f"rank {self.rank}: {reason[:500]}")
        except RuntimeError:  # the rank that keeps the store is gone: it told them, or they see it
            return

    def leave(self) -> None:
        """Stop watching and being watched."""
        self._stopped.set()
        self._store.set(f"left{self.rank}", "1")
        self._thread.join()

    def part(self) -> None:
        """Say that this rank asks nothing more; the one that keeps the store waits for all.

        The store ends here, not with the watch: whoever starts again must find a fresh one.
        """
        with suppress(RuntimeError):  # one that was slow, or is gone, does not matter any more
            self._store.set(f"parted{self.rank}", "1")
            if self.rank == 0:
                every = [f"parted{rank}" for rank in range(self.size)]
                self._store.wait(every, timedelta(seconds=self.patience_s))
        self._common = None

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat{self.rank}", str(self._beats))

    def _run(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._stopped.wait(self.patience_s / BEATS_A_PATIENCE):
            try:
                self._beat()
                problem = self._look(seen)
            except RuntimeError as error:
                problem = f"the common store is gone ({str(error).splitlines()[0][:80]})"
            if problem and not self._stopped.is_set():
                self._end(problem)

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        """What is wrong with the others, if anything."""
        if self._store.check(["failed"]):
            return "another rank failed: " + self._store.get("failed").decode()
        now_s = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank or not self._store.check([f"beat{rank}"]):
                continue
            beat = self._store.get(f"beat{rank}")
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now_s)
            elif now_s - seen[rank][1] > self.patience_s and not self._store.check([f"left{rank}"]):
                return f"rank {rank} shows no sign of life since {self.patience_s:.0f} s"
        return None

    def _end(self, problem: str) -> None:
        sys.stderr.write(f"mogul: rank {self.rank} ends: {problem}\n")
        sys.stderr.flush()
        os._exit(EXIT_CODE)
