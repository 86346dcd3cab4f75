"""Requests to stop a training: by a signal, or by the end of the launcher of its processes."""

from __future__ import annotations

import os
import signal
import threading
from contextvars import ContextVar

# Windows has no SIGHUP.
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

_current: ContextVar[StopSignals | None] = ContextVar("current", default=None)


class StopSignals:
    """Record SIGINT, SIGTERM and SIGHUP in a `with` block.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored. Handlers are set in the
    main thread only. A second signal raises KeyboardInterrupt, except in a process of torchrun:
    there, one Ctrl-C arrives from the terminal and again from torchrun.

    Attributes:
        received: number of the first signal, or None. SIGTERM if torchrun has ended.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> StopSignals:
        main = threading.current_thread() is threading.main_thread()
        self._handlers = {
            number: signal.signal(number, self._note)
            for number in SIGNALS
            if main and signal.getsignal(number) != signal.SIG_IGN
        }
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)
        # A signal that torchrun repeats must not interrupt the last words of a process.
        if self._launcher is not None and (self.received or os.environ["RANK"] != "0"):
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Whether the training should stop."""
        if self._launcher not in (None, os.getppid()) and self.received is None:
            self.received = signal.SIGTERM
        return self.received is not None

    def _note(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received = number
        elif self._launcher is None:
            raise KeyboardInterrupt


def requested() -> bool:
    """Whether the training of the enclosing `StopSignals` block should stop."""
    current = _current.get()
    return current is not None and current.requested()
