"""The service: a process beside the workers that does what the pool's user needs done for as long as the pool is there.

Owns its start, its restart when it ends, and its first words. Knows nothing of what it does: that is a call that came
with BOOT. Waits for it at the end only, for a moment: it must bear to be killed at any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import selectors
import signal
import socket
import time
from math import inf
from typing import Protocol

from mpworker.errors import ProtocolError
from mpworker.pool import boot as booting
from mpworker.pool.fleet import Crew, Fleet
from mpworker.pool.frames import FrameReader, Kind, encode
from mpworker.pool.jobs import NO_SLOT, Lane
from mpworker.pool.title import set_title
from mpworker.pool.wire import Listener

#: Its number among the workers'.
SERVICE = 1 << 60
#: Seconds before it is started again: at first, and at most where it ends again and again.
_PAUSE, _PAUSE_MAX = 0.2, 30.0
#: Seconds that it gets at the end.
_LAST_TRY = 2.0
#: Seconds after which one that ends has not failed to start.
_SETTLED = 10.0


class Owner(Protocol):
    """Who has a service."""

    def boot_frame(self) -> bytes: ...

    def show_workers(self) -> None: ...

    def log(self, level: int, text: str) -> None: ...


class Service:
    """The dispatcher's care for it.

    Args:
        owner: is asked for the BOOT frame, as it is now, and told of what happens.
    """

    def __init__(self, selector: selectors.BaseSelector, fleet: Fleet, owner: Owner) -> None:
        self._selector, self._fleet, self._owner = selector, fleet, owner
        self._crew: Crew | None = None
        self._is_ready = self._renews = False
        self._reader = FrameReader("the service")
        self._began, self._pause = 0.0, _PAUSE
        #: when :meth:`tick` is due, by ``time.monotonic()``; and the same once the one before has been reaped, whose
        #: number among the workers' it has
        self.deadline = self._next = inf

    def begin(self) -> None:
        """A worker is ready: now it is its turn."""
        if self._crew is None and self.deadline == self._next == inf:
            self.deadline = time.monotonic()

    def tick(self, now: float) -> None:
        """Starts it when it is time."""
        if now < self.deadline:
            return
        self.deadline, self._began, self._is_ready = inf, now, False
        try:
            self._crew = self._fleet.spawn(SERVICE, NO_SLOT, Lane.SERVICE, self._owner.boot_frame())
        except OSError as exc:
            self._again(f"could not be started: {exc}")
            return
        self._reader = FrameReader("the service")
        self._selector.register(self._crew.data, selectors.EVENT_READ, Listener(self._read))

    def renew(self) -> None:
        """Ends it; its successor is made as workers are now."""
        if self._crew is not None:
            self._renews = True
            self._fleet.kill(SERVICE, signal.SIGKILL)

    def finish(self) -> None:
        """Tells it that all is over, and lets it do what is left, for a moment."""
        if self._crew is not None and self._is_ready:
            with contextlib.suppress(OSError):
                self._crew.data.settimeout(_LAST_TRY)
                self._crew.data.shutdown(socket.SHUT_WR)
                while self._crew.data.recv(4096):
                    pass

    def reaped(self) -> None:
        """Its number is nobody's now; the end of its line says the rest."""
        if self._crew is not None:
            self._crew.pid = 0
        elif self._next < inf:
            self.deadline, self._next = self._next, inf

    def _read(self) -> None:
        """Hears its pid, that it has begun, and later its end."""
        crew = self._crew
        if crew is None:
            return
        try:
            data = self._reader.receive(crew.data)
            if data is None:
                return
            for frame in self._reader.feed(data):
                if frame.kind is Kind.READY and crew.pid:
                    self._is_ready = True
                elif frame.kind is not Kind.HELLO or not self._fleet.registered(crew, frame.job):
                    raise ProtocolError("the service has said what is not its to say")
            if data:
                self._owner.show_workers()
                return
        except ProtocolError as exc:
            self._owner.log(logging.ERROR, f"{exc}; it is killed")
        self._selector.unregister(crew.data)
        self._fleet.kill(SERVICE, signal.SIGKILL)
        self._fleet.forget(SERVICE)
        self._crew = None
        self._again("has ended")
        if crew.pid:
            self.deadline, self._next = inf, self.deadline

    def _again(self, why: str) -> None:
        now = time.monotonic()
        if self._renews:
            self._renews, self.deadline = False, now
            return
        self._pause = _PAUSE if now - self._began > _SETTLED else min(2 * self._pause, _PAUSE_MAX)
        self.deadline = now + self._pause
        self._owner.log(logging.WARNING, f"the service process {why}; it is started again in {self._pause:.1f} s")


def serve(line: socket.socket, boot: booting.Boot, prepared: bool) -> None:
    """What its process does.

    Args:
        line: to the dispatcher; readable when it is over.
        prepared: the application is loaded already.
    """
    line.sendall(encode(Kind.HELLO, os.getpid()))
    if not prepared:
        booting.prepare(boot)
    name, function, args = pickle.loads(boot.service)
    set_title(f"mpworker: {name}{boot.label}")
    line.sendall(encode(Kind.READY, os.getpid()))
    function(*args, line.fileno())
