"""Stop politely: SIGTERM and the first Ctrl-C end the training after the step that runs."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from mogul.core.log import say


class StopFlag:
    """Set by SIGTERM or SIGINT inside the `with` block; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True
        say(f"{signal.Signals(number).name}: saving after this step")
