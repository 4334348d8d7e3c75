"""Signals that ask a program to stop: noted, so that the work in hand is finished first."""

from __future__ import annotations

import signal
import threading
from typing import Any

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """The program was asked to stop and has kept its work.

    Attributes:
        code: 128 + the number of the signal, as shells have it.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered; a hangup that is ignored (nohup) stays ignored.

    Attributes:
        received: the first of them, also of those that one entered before this has noted; None before.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                before = signal.getsignal(number)
                self.received = self.received or getattr(getattr(before, "__self__", None), "received", None)
                if not (number == getattr(signal, "SIGHUP", None) and before == signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, _: Any) -> None:
        self.received = self.received or number
