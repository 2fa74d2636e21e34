"""When the handlers of a shutdown's signals may run: never in the middle of something that they use themselves.

Owns what stands before those handlers in the main thread. A mask in their place would not do: the kernel gives a signal
to any other thread, and Python then runs the handler in the main one all the same. Decides on no shutdown.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

_Handler = Callable[[int, FrameType | None], Any]

_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGQUIT


class SignalGate:
    """``with gate:`` handlers wait until it is left. In another thread than the main one, where none runs, nothing."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: deque[tuple[_Handler, int]] = deque()
        self._main = threading.main_thread().ident
        self._open = False

    def connect(self) -> None:
        """Takes its place before the handlers that there are. A worker in another thread gets no signals."""
        self._open = threading.get_ident() == self._main
        self._guard()

    def disconnect(self) -> None:
        """May be called again, and by a handler."""
        self._open = False
        if threading.get_ident() == self._main:
            for signum in _SIGNALS:
                if isinstance(guarded := signal.getsignal(signum), _Guarded) and guarded.gate is self:
                    signal.signal(signum, guarded.handler)

    def _guard(self) -> None:
        for signum in _SIGNALS if self._open else ():
            if callable(handler := signal.getsignal(signum)) and not isinstance(handler, (_Guarded, signal.Handlers)):
                signal.signal(signum, _Guarded(self, handler))

    def handle(self, handler: _Handler, signum: int, frame: FrameType | None) -> None:
        """Runs a handler, now or later. Celery's put others in their place: the next Ctrl+C is another one."""
        if self._depth:
            self._waiting.append((handler, signum))
            return
        try:
            handler(signum, frame)
        finally:
            self._guard()

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        if threading.get_ident() != self._main:
            return
        self._depth -= 1
        while self._waiting and not self._depth:
            self.handle(*self._waiting.popleft(), None)


class _Guarded:
    def __init__(self, gate: SignalGate, handler: _Handler) -> None:
        self.gate, self.handler = gate, handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.gate.handle(self.handler, signum, frame)
