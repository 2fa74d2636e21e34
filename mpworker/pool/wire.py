"""How the dispatcher's loop holds a line: non-blocking, with an outbox. Knows frames, not what they mean."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable

from mpworker.pool.frames import Carrier, Frame, Outbox, send_fds

#: Descriptors that one message may carry.
_MOST_FDS = 200


class Wire:
    """A non-blocking line with an outbox; registers for writing only while something waits."""

    def __init__(self, selector: selectors.BaseSelector, sock: socket.socket, on_read: Callable[[], None]) -> None:
        self.sock, self.outbox = sock, Outbox()
        self._selector, self._on_read = selector, on_read
        self._fds: list[int] = []  # they travel with the next bytes
        self._registered = selectors.EVENT_READ
        selector.register(sock, selectors.EVENT_READ, self)

    def put(self, frame: Frame) -> None:
        self.outbox.put_frame(frame)

    def put_fd(self, fd: int) -> None:
        """A copy of the descriptor travels with what is sent next."""
        self._fds.append(os.dup(fd))

    def send(self, piece: bytes | memoryview) -> int:
        """For an outbox to flush with."""
        if not self._fds and type(piece) is not Carrier:
            return self.sock.send(piece)
        some = self._fds[:_MOST_FDS]
        sent = send_fds(self.sock, piece, *some)
        del self._fds[:_MOST_FDS]
        for fd in some:
            os.close(fd)
        return sent

    def flush(self) -> None:
        """Sends what the peer takes; a peer that is gone is noticed when its line is read."""
        if not self._registered:
            return
        try:
            empty = self.outbox.flush(self.send, self.send)
        except OSError:
            empty = True
        wanted = selectors.EVENT_READ if empty else selectors.EVENT_READ | selectors.EVENT_WRITE
        if wanted != self._registered:
            self._selector.modify(self.sock, wanted, self)
            self._registered = wanted

    def handle(self, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            self._on_read()
        if mask & selectors.EVENT_WRITE:
            self.flush()

    @property
    def open(self) -> bool:
        return bool(self._registered)

    def close(self) -> None:
        if self._registered:
            self._selector.unregister(self.sock)
            self._registered = 0


class Listener:
    """A selector entry that only reads."""

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read

    def handle(self, mask: int) -> None:
        self._on_read()
