"""A node that shall stop notices it at once, and does not tarry when it has.

Owns one pipe, by which a signal ends the wait of the event loop. Python runs a signal's handler when it comes, and then
goes on waiting for the rest of the time: a second with Redis, which asks that often, and up to ten with others.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
from contextlib import suppress
from typing import Any


class SignalWakeup:
    """Registers with kombu's hub what the interpreter writes to when a signal comes."""

    def __init__(self) -> None:
        self._hub: Any = None
        self._reader, self._writer = -1, -1

    def connect(self, hub: Any) -> None:
        """Called at the start and after each reconnect, which has emptied the hub."""
        if self._reader < 0 and not self._begin():
            return
        self._hub = hub
        hub.add_reader(self._reader, self._drain)

    def _begin(self) -> bool:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        except ValueError:  # a worker that is embedded in another thread gets no signals
            before = None
        if before == -1:
            return True
        if before is not None:
            signal.set_wakeup_fd(before)  # somebody else's, who is here to stay
        self._end()
        return False

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)

    def disconnect(self) -> None:
        """May be called again, and by a signal handler."""
        if self._reader < 0:
            return
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
        self._hub.remove(self._reader)
        self._end()

    def _end(self) -> None:
        reader, writer = self._reader, self._writer
        self._reader = self._writer = -1
        os.close(reader)
        os.close(writer)


def hasten_exit() -> None:
    """Spares this process, when it exits, the search for garbage among all of its objects: 0.3 s of a processor."""
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
