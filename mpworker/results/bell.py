"""The bell between those who append to a node's journal and the shipper that waits for them.

Owns two descriptors that all processes of a node inherit: one to ring, one to tell whether anybody listens, which the
kernel knows even of a shipper that was killed. Never says what was written, nor where.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from contextlib import suppress
from math import inf
from typing import Any

#: struct flock of 64-bit Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")
#: What is counted, in words.
ONLY_IN_REDIS, BROKEN, UNREADABLE = "results in Redis only", "broken lines passed over", "unreadable journal files"
_COUNTED = (ONLY_IN_REDIS, BROKEN, UNREADABLE)
_CELL = struct.Struct("<Q")
#: Seconds for which a listener is believed to be there still: one that is killed has a successor soon.
_MOMENT = 0.1
_ASK = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)


class Bell:
    """Can be pickled for child processes that inherit its descriptors, as forks do.

    Raises:
        OSError: the system has no such thing, or no descriptors left.
    """

    def __init__(self, rope: int = -1, seat: int = -1) -> None:
        if not (sys.platform.startswith("linux") and _FLOCK.size == 32):
            raise OSError("only Linux has event descriptors")
        self._rope = rope if rope >= 0 else os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        #: its first byte is locked by who listens; behind it is what is counted
        self._seat = seat if seat >= 0 else os.memfd_create("mpworker-bell")
        status = os.fstat(self._rope)
        self._kind = status.st_dev, status.st_ino
        self._ask_at = -inf

    def __reduce__(self) -> Any:
        return Bell, self.fds

    @property
    def fds(self) -> tuple[int, int]:
        """What a child has to inherit, under the same numbers, to which a bell is handed."""
        return self._rope, self._seat

    def fileno(self) -> int:
        """Readable once it has been rung."""
        return self._rope

    def listen(self) -> bool:
        """From here until this process ends somebody listens: this process; ``False``: another one does already."""
        try:
            fcntl.lockf(self._seat, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError:
            return False
        return True

    def has_listener(self) -> bool:
        """Whether somebody listens, or did a moment ago."""
        now = time.monotonic()
        if now >= self._ask_at:
            try:
                taken, *_ = _FLOCK.unpack(fcntl.fcntl(self._seat, fcntl.F_GETLK, _ASK))
            except OSError:
                taken = fcntl.F_UNLCK
            if taken == fcntl.F_UNLCK:
                return False
            self._ask_at = now + _MOMENT
        return True

    def ring(self) -> bool:
        """Wakes who listens; ``False``: it cannot be rung."""
        try:
            status = os.fstat(self._rope)
            if (status.st_dev, status.st_ino) != self._kind:
                return False  # user code has closed it, and opened something else
            os.eventfd_write(self._rope, 1)
        except OSError:
            return False
        return True

    def quiet(self) -> None:
        """Forgets that it has been rung."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._rope)

    def count(self, what: str, number: int = 1) -> None:
        """Adds to what is counted for the whole node. Never raises."""
        at = _CELL.size * (1 + _COUNTED.index(what))
        with suppress(OSError, struct.error):
            fcntl.lockf(self._seat, fcntl.LOCK_EX, _CELL.size, at)
            try:
                (before,) = _CELL.unpack(os.pread(self._seat, _CELL.size, at) or bytes(_CELL.size))
                os.pwrite(self._seat, _CELL.pack(before + number), at)
            finally:
                fcntl.lockf(self._seat, fcntl.LOCK_UN, _CELL.size, at)

    def counts(self) -> dict[str, int]:
        """What has been counted, by any process of the node."""
        cells = os.pread(self._seat, _CELL.size * len(_COUNTED), _CELL.size).ljust(_CELL.size * len(_COUNTED), b"\0")
        return dict(zip(_COUNTED, (cell for (cell,) in _CELL.iter_unpack(cells)), strict=True))

    def close(self) -> None:
        os.close(self._rope)
        os.close(self._seat)
