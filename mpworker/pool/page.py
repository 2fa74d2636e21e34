"""A page of memory that a worker shares with the dispatcher: what it runs, and results that are not on their way yet.

Owns the layout, and how results of tiny jobs travel together. The worker writes, at the cost of a few stores where a
frame would be a system call and a wake-up; the dispatcher reads when the worker is silent or dead. So whatever instant
a process is killed at, it is known which job it ran, and nothing that it had finished is lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from mpworker.errors import ProtocolError
from mpworker.pool.frames import Frame, Kind, encode

#: Results that may wait for company, and the bytes of all of them.
MOST = 128
_ROOM = 32 << 10
_RECORD = struct.Struct("=QIIdd")
_WHO = struct.Struct("=Qd")
# Cells of 8 bytes at the start of the page.
_JOB, _STARTED, _COUNT, _USED = 0, 1, 2, 3
_RECORDS = 64
_BODIES = _RECORDS + MOST * _RECORD.size
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since 5.1
SIZE = mmap.PAGESIZE * -(-(_BODIES + _ROOM) // mmap.PAGESIZE)


class Ran(NamedTuple):
    """One job of a RESULTS frame. ``started`` is ``time.monotonic()``, ``runtime`` seconds."""

    job: int
    flag: int
    started: float
    runtime: float
    body: bytes


def create() -> int:
    """A descriptor of an empty page, which nobody can make smaller.

    Raises:
        OSError: there is no memory or no descriptor.
    """
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), SIZE)
            return os.dup(file.fileno())
    fd = os.memfd_create("mpworker-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        # A page that shrinks under its reader would end it with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(fd)
        raise
    return fd


class Page:
    """One worker's page.

    Args:
        fd: from :func:`create`; closed here.
        last: nobody else needs to map it. What is written to descriptors at random then cannot reach it.
    """

    def __init__(self, fd: int, *, last: bool = False) -> None:
        try:
            self._memory = mmap.mmap(fd, SIZE)
            if last and hasattr(fcntl, "F_ADD_SEALS"):
                with contextlib.suppress(OSError):  # a kernel that is too old
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        finally:
            os.close(fd)
        view = memoryview(self._memory)[:_RECORDS]
        self._cells, self._times = view.cast("Q"), view.cast("d")

    # -- the worker ----------------------------------------------------------------------------------------------

    def begin(self, job: int, started: float) -> None:
        """A job starts now."""
        self._times[_STARTED] = started
        self._cells[_JOB] = job

    def end(self) -> None:
        """It is over and its result has been written, or is about to be sent."""
        self._cells[_JOB] = 0

    def add(self, job: int, flag: int, started: float, runtime: float, body: bytes) -> int:
        """Keeps a result until it is sent.

        Returns:
            how many wait now; 0 if there is no room for this one.
        """
        cells = self._cells
        count, used = cells[_COUNT], cells[_USED]
        if count == MOST or used + len(body) > _ROOM:
            return 0
        at = _BODIES + used
        self._memory[at : at + len(body)] = body
        _RECORD.pack_into(self._memory, _RECORDS + count * _RECORD.size, job, len(body), flag, started, runtime)
        cells[_USED] = used + len(body)
        cells[_COUNT] = count + 1  # from here on it counts
        return count + 1

    @property
    def waiting(self) -> bool:
        return self._cells[_COUNT] > 0

    def forget(self) -> None:
        """What waited has been sent."""
        self._cells[_COUNT] = self._cells[_USED] = 0

    def pack(self, pid: int, max_rss: float) -> bytes:
        """The RESULTS frame of what waits."""
        records, bodies = self._contents(self._cells[_COUNT], self._cells[_USED])
        return encode(Kind.RESULTS, extra=_WHO.pack(pid, max_rss) + records, body=bodies)

    # -- the dispatcher ------------------------------------------------------------------------------------------

    def running(self) -> tuple[int, float]:
        """The job that runs, or 0, and when it started."""
        return self._cells[_JOB], self._times[_STARTED]

    def left(self, pid: int) -> Frame | None:
        """What a dead worker had not sent, or had sent and not forgotten yet."""
        count = self._cells[_COUNT]
        if not 0 < count <= MOST:
            return None
        records, bodies = self._contents(count, _ROOM)
        used = sum(length for _, length, *_ in _RECORD.iter_unpack(records))
        return Frame(Kind.RESULTS, extra=_WHO.pack(pid, 0.0) + records, body=bodies[:used])

    def close(self) -> None:
        for view in (self._cells, self._times):
            view.release()
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _contents(self, count: int, used: int) -> tuple[bytes, bytes]:
        return self._memory[_RECORDS : _RECORDS + count * _RECORD.size], self._memory[_BODIES : _BODIES + used]


def who_ran(frame: Frame) -> tuple[int, float]:
    """The pid of a RESULTS frame's worker, and its peak memory in bytes."""
    pid, max_rss = _WHO.unpack_from(frame.extra)
    return pid, max_rss


def check(frame: Frame, peer: str) -> tuple[tuple[int, ...], float]:
    """Looks a RESULTS frame over.

    Returns:
        its jobs, and the seconds that all of them together ran.

    Raises:
        ProtocolError: it is damaged.
    """
    size = len(frame.extra) - _WHO.size
    if size <= 0 or size % _RECORD.size:
        raise ProtocolError(f"{peer} sent damaged results")
    jobs, lengths, _, _, runtimes = zip(*_RECORD.iter_unpack(memoryview(frame.extra)[_WHO.size :]), strict=True)
    if sum(lengths) != len(frame.body):
        raise ProtocolError(f"{peer} sent damaged results")
    return jobs, sum(runtimes)


def results(frame: Frame) -> Iterator[Ran]:
    """The jobs of a RESULTS frame, in order."""
    body, end = frame.body, 0
    for job, length, flag, started, runtime in _RECORD.iter_unpack(memoryview(frame.extra)[_WHO.size :]):
        start, end = end, end + length
        yield Ran(job, flag, started, runtime, body[start:end])
