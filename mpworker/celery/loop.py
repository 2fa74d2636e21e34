"""The pool's line in Celery's event loop: read when there is something, written when there is room.

Owns the registration, which must survive reconnects of the broker and replacements of the dispatcher. Never reads or
writes itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from mpworker.pool.handle import Handle

logger = logging.getLogger("mpworker.pool")


class LoopLink:
    """Registers one handle with kombu's hub.

    Args:
        handle: whose line it is.
        on_readable: called in the loop when the handle has something to tell.
    """

    def __init__(self, handle: Handle, on_readable: Callable[[], None]) -> None:
        self._handle, self._on_readable = handle, on_readable
        self._hub: Any = None
        self._turns: set[Callable[[], None]] = set()
        self._reader: tuple[int, int] | None = None
        self._writer: int | None = None

    def connect(self, hub: Any) -> None:
        """Called at the start and after each reconnect, which has emptied the hub."""
        self._hub = hub
        hub.on_tick.update((self.watch_writing, *self._turns))
        self._watch()

    def each_turn(self, callback: Callable[[], None]) -> None:
        """From here on ``callback`` is called in each turn of the loop, and while it stands still as well."""
        self._turns.add(callback)
        if self._hub is not None:
            self._hub.on_tick.add(callback)

    def disconnect(self) -> None:
        """Takes the line out of the loop."""
        if self._hub is not None and self._reader is not None:
            self._hub.remove(self._reader[0])
        self._reader = None
        self._stop_writing()

    def follow(self) -> None:
        """Moves to the handle's new line if it has one."""
        if self._reader is not None and self._reader != (self._handle.fileno(), self._handle.generation):
            self._watch()

    def _watch(self) -> None:
        self.disconnect()
        fd = self._handle.fileno()
        if fd >= 0:
            self._reader = fd, self._handle.generation
            self._hub.add_reader(fd, self._on_readable)

    def watch_writing(self) -> None:
        """Has the loop flush when the dispatcher takes more. A second descriptor: the hub knows one use of each."""
        handle = self._handle
        if self._hub is None or self._writer is not None or not handle.wants_write or handle.fileno() < 0:
            return
        self._writer = os.dup(handle.fileno())
        self._hub.add_writer(self._writer, self._on_writable)

    def _on_writable(self) -> None:
        if self._handle.flush():
            self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._hub.remove(self._writer)
            os.close(self._writer)
            self._writer = None

    def keep_alive(self) -> None:
        """While the loop stands still: its timers (AMQP heartbeats), the acks of what has just finished, our turns."""
        if self._hub is None:
            return
        try:
            self._hub.fire_timers()
            run_acks(self._hub)
            for callback in tuple(self._turns):  # not all of the hub's: Redis's transport would ask for messages
                callback()
        except Exception:
            logger.exception("error in the event loop's timers during shutdown")


def run_acks(hub: Any) -> None:
    """Runs the acks and rejects that finished tasks have queued in the loop; everything else stays queued."""
    for callback in list(hub._pop_ready()):
        method = getattr(callback, "fun", None)
        if getattr(method, "__name__", "") in ("ack_log_error", "reject_log_error"):
            try:
                callback()
            except Exception as exc:
                hub.on_callback_error(callback, exc)
        else:
            hub.call_soon(callback)
