"""The dispatcher's care for the template: whether there is one, whether it is ready, what follows when it dies.

Owns the choice of the start method as it turns out. Never forks: the template does. Never starts a process: the fleet
does.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import time
from math import inf
from typing import Any, Protocol

from mpworker.errors import ProtocolError
from mpworker.pool.fleet import Fleet
from mpworker.pool.frames import Frame, FrameReader, Kind, encode
from mpworker.pool.wire import Wire

#: Seconds that a fork may take until its first word, which comes before any user code; half the ready timeout at most.
FORK_TIMEOUT = 4.0
#: Templates that may die while they load, without a word, before that counts as the application's doing.
_MAX_LOADING_DEATHS = 3


class Owner(Protocol):
    """Who wants to know."""

    def begin(self) -> None: ...

    def template_failed(self, why: str) -> None: ...

    def log(self, level: int, text: str) -> None: ...


class Nursery:
    """One pool's template.

    Args:
        options: the dispatcher's; ``start_method`` and ``ready_timeout`` (seconds) are read.
        boot: what children need, packed.
        owner: told when workers can be started, and when the application cannot be loaded.
    """

    def __init__(
        self, selector: selectors.BaseSelector, fleet: Fleet, options: dict[str, Any], boot: bytes, owner: Owner
    ) -> None:
        self._selector, self._fleet, self._boot, self._owner = selector, fleet, boot, owner
        self._method: str = options["start_method"]
        self._ready_timeout: float = options["ready_timeout"]
        self._wire: Wire | None = None
        self._reader = FrameReader("the template")
        self._loading_until = inf
        self._loading_deaths = 0
        self._ready = False

    def open(self) -> None:
        """Starts a template, or takes the one that the parent has forked; without one workers are spawned."""
        line = self._fleet.template
        if line is None and self._method != "spawn":
            line = self._fleet.start_template()
        if line is None:
            self._owner.begin()
            return
        with contextlib.suppress(OSError):  # if it died already, its line says so below
            line.sendall(encode(Kind.BOOT, flag=int(self._method == "auto"), body=self._boot))
        self._reader = FrameReader("the template")
        self._wire = Wire(self._selector, line, self._read)
        self._loading_until, self._ready = time.monotonic() + self._ready_timeout, False

    def reload(self, boot: bytes) -> None:
        """Has the application loaded anew, in another template: what forks ask for meanwhile waits for it."""
        self._boot = boot
        if self._method != "spawn":
            self._drop()
            self._reopen()

    @property
    def deadline(self) -> float:
        """When :meth:`tick` is due, by ``time.monotonic()``."""
        if self._ready:
            return self._fleet.unborn_since() + min(FORK_TIMEOUT, self._ready_timeout / 2)
        return self._loading_until

    def tick(self, now: float) -> None:
        """Gives up on a template that takes too long to load, or to fork."""
        if now < self.deadline:
            return
        if self._ready:
            self._owner.log(logging.ERROR, "the template does not react; it is killed")
            self._ready = False
            self._fleet.kill_template()
            self._fleet.disown_unborn()  # or the next template would be held to account for them
        else:
            self._fail("the application was not loaded in time (mpworker_ready_timeout)")

    def give_up(self) -> None:
        """No template any more: workers are spawned from now on."""
        self._method = "spawn"
        self._drop()

    def _read(self) -> None:
        line = self._fleet.template
        try:
            data = line.recv(1 << 16, socket.MSG_DONTWAIT) if line else b""
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        try:
            for frame in self._reader.feed(data):
                self._heard(frame)
        except ProtocolError as exc:
            self._owner.log(logging.ERROR, f"{exc}; it is killed")
            self._fleet.kill_template()
            data = b""
        if not data and self._wire is not None:
            self._on_end()

    def _heard(self, frame: Frame) -> None:
        if frame.kind is Kind.UNREADY:
            self._fail(frame.body.decode(errors="replace"))
        elif frame.kind is Kind.READY:
            self._loading_until, self._ready, self._loading_deaths = inf, True, 0
            if frame.body and self._method == "auto":
                risk = frame.body.decode(errors="replace")
                self._owner.log(logging.INFO, f"start method spawn: with the application loaded, the template {risk}")
                self.give_up()
            self._owner.begin()
        else:
            raise ProtocolError(f"the template sent a {frame.kind.name} frame, which is not its to send")

    def _on_end(self) -> None:
        loading = self._loading_until < inf
        self._drop()
        if loading:
            self._loading_deaths += 1
            if self._loading_deaths == _MAX_LOADING_DEATHS:
                self._loading_deaths = 0
                self._fail(f"the process that loads the application died while it did so, {_MAX_LOADING_DEATHS} times")
                return
        self._owner.log(logging.WARNING, "the template died; a new one is started")
        self._reopen()

    def _reopen(self) -> None:
        if self._method == "fork":
            self._method = "auto"
            self._owner.log(
                logging.WARNING,
                "new workers load the application by themselves: the memory that the first ones were forked with, and "
                "what worker_init had opened there, cannot be had again",
            )
        self.open()

    def _fail(self, why: str) -> None:
        self._drop()
        self._owner.template_failed(why)

    def _drop(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        self._loading_until, self._ready = inf, False
        self._fleet.end_template()
