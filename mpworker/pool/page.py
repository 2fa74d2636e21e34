"""A page of memory that a worker shares with the dispatcher and the parent: what it has started, and results that are
not on their way yet.

Owns the layout, and how results of tiny jobs travel together. The worker writes, at the cost of a few stores where a
frame would be a system call and a wake-up. The dispatcher reads when the worker is silent or dead, the parent when the
dispatcher is. So whatever instant a process is killed at, it is known what had been started, and nothing that a worker
had finished is lost with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mpworker.errors import ProtocolError
from mpworker.pool.frames import Frame, Kind, encode
from mpworker.pool.tail import Tail, size_for

#: Results that may wait for company, and the bytes of all of them.
MOST = 128
_ROOM = 16 << 10
#: So many times what waited can be sent, and still be read here, before the dispatcher must have heard the first of it.
SHEETS = 8
_RECORD = struct.Struct("=QIIdd")
_WHO = struct.Struct("=Qd")
# Cells of 8 bytes at the start of the page.
_JOB, _STARTED, _STARTS, _WORKER, _PID, _SENT, _HEARD, _MARK = range(8)
# Results are collected on one sheet while the others still hold those that were sent last: on each so many.
_COUNT, _RING = 8, 16
#: The jobs that were started last: more than can be on their way to the parent.
_LAST = 1024
_RECORDS = 8 * (_RING + _LAST)
_BODIES = MOST * _RECORD.size
_SHEET = _BODIES + _ROOM
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since 5.1
_new = tuple.__new__  # a NamedTuple's own takes three times as long
SIZE = mmap.PAGESIZE * -(-(_RECORDS + SHEETS * _SHEET) // mmap.PAGESIZE)


class Ran(NamedTuple):
    """One job of a RESULTS frame. ``started`` is ``time.monotonic()``, ``runtime`` seconds."""

    job: int
    flag: int
    started: float
    runtime: float
    body: bytes


def create(kept: int = 0) -> int:
    """A descriptor of an empty page, which nobody can make smaller.

    Args:
        kept: bytes of what a job says that shall be kept (see :mod:`mpworker.pool.tail`).

    Raises:
        OSError: there is no memory or no descriptor.
    """
    size = SIZE + size_for(kept)
    if not hasattr(os, "memfd_create"):
        import tempfile  # here: it brings compressors and random numbers with it, and each start of a pool would wait

        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), size)
            return os.dup(file.fileno())
    fd = os.memfd_create("mpworker-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
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
        worker: its number, from who makes it.
        mine: this is the worker. What is written to descriptors at random cannot reach the page afterwards.
    """

    def __init__(self, fd: int, *, worker: int | None = None, mine: bool = False) -> None:
        try:
            writable = mine or worker is not None
            if not writable and not _cannot_shrink(fd):
                raise ProtocolError("the dispatcher sent a descriptor that is no page")
            size = os.fstat(fd).st_size
            self._memory = mmap.mmap(fd, size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
            if mine and hasattr(fcntl, "F_ADD_SEALS"):
                with contextlib.suppress(OSError):  # a kernel that is too old
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        finally:
            os.close(fd)
        #: what the running job says, if that is kept
        self.tail = Tail(self._memory, SIZE) if size >= SIZE + size_for(1) else None
        view = memoryview(self._memory)[:_RECORDS]
        self._cells, self._times = view.cast("Q"), view.cast("d")
        if worker is not None:
            self._cells[_WORKER] = worker
        if mine:
            self._cells[_PID] = os.getpid()
        self._starts = self._sent = 0
        self._sheet = self._count = self._used = 0  # the one that results are collected on, as the cells say

    # -- the worker ----------------------------------------------------------------------------------------------

    def begin(self, job: int, started: float) -> None:
        """A job starts now."""
        cells, starts = self._cells, self._starts
        cells[_RING + starts % _LAST] = job
        cells[_STARTS] = self._starts = starts + 1
        self._times[_STARTED] = started
        cells[_JOB] = job

    def mark(self, number: int) -> None:
        """What the next job starts is marked with that (:func:`mpworker.pool.linux.mark`)."""
        self._cells[_MARK] = number

    def end(self) -> None:
        """It is over and its result has been written, or is about to be sent."""
        self._cells[_JOB] = 0

    def add(self, job: int, flag: int, started: float, runtime: float, body: bytes) -> int:
        """Keeps a result until it is sent.

        Returns:
            how many wait now; 0 if there is no room for this one.
        """
        count, used, sheet, size = self._count, self._used, self._sheet, len(body)
        if count == MOST or used + size > _ROOM:
            return 0
        start = _RECORDS + sheet * _SHEET
        at = start + _BODIES + used
        self._memory[at : at + size] = body
        _RECORD.pack_into(self._memory, start + count * _RECORD.size, job, size, flag, started, runtime)
        self._used = used + size
        self._count = self._cells[_COUNT + sheet] = count + 1  # from here on it counts
        return count + 1

    @property
    def waiting(self) -> bool:
        return self._count > 0

    @property
    def has_sheet(self) -> bool:
        """Whether what waits may be sent: the sheet that is used next holds only what has been heard."""
        return self._sent + 1 - self._cells[_HEARD] < SHEETS

    def forget(self) -> None:
        """What waited has been sent. It can be read for a while yet, see :attr:`has_sheet`."""
        self._sent += 1
        self._sheet = sheet = self._sent % SHEETS
        self._cells[_COUNT + sheet] = self._count = self._used = 0
        self._cells[_SENT] = self._sent

    def pack(self, max_rss: float) -> bytes:
        """The RESULTS frame of what waits."""
        records, bodies = self._contents(self._sheet, self._count, self._used)
        return encode(Kind.RESULTS, extra=_WHO.pack(self.pid, max_rss) + records, body=bodies)

    # -- the dispatcher ------------------------------------------------------------------------------------------

    def heard(self) -> None:
        """What was sent next has arrived."""
        self._cells[_HEARD] += 1

    # -- who reads -----------------------------------------------------------------------------------------------

    @property
    def worker(self) -> int:
        return self._cells[_WORKER]

    @property
    def pid(self) -> int:
        return self._cells[_PID]

    def started(self) -> list[int]:
        """The jobs that were started last, the current one included, in no order."""
        return self._cells[_RING : _RING + min(self._cells[_STARTS], _LAST)].tolist()

    def running(self) -> tuple[int, float]:
        """The job that runs, or 0, and when it started."""
        return self._cells[_JOB], self._times[_STARTED]

    def mark_of_running(self) -> int:
        """The mark of what the job that runs has started; 0 if none runs."""
        return self._cells[_MARK] if self._cells[_JOB] else 0

    def left(self) -> list[Frame]:
        """What a dead worker had sent last, and what it had not sent."""
        frames = []
        for number in range(1, SHEETS + 1):  # the oldest first
            sheet = (self._cells[_SENT] + number) % SHEETS
            if 0 < (count := self._cells[_COUNT + sheet]) <= MOST:
                records, bodies = self._contents(sheet, count, _ROOM)
                used = sum(length for _, length, *_ in _RECORD.iter_unpack(records))
                frames.append(Frame(Kind.RESULTS, extra=_WHO.pack(self.pid, 0.0) + records, body=bodies[:used]))
        return frames

    def close(self) -> None:
        for view in (self._cells, self._times):
            view.release()
        if self.tail is not None:
            self.tail.close()
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _contents(self, sheet: int, count: int, used: int) -> tuple[bytes, bytes]:
        start = _RECORDS + sheet * _SHEET
        bodies = start + _BODIES
        return self._memory[start : start + count * _RECORD.size], self._memory[bodies : bodies + used]


def _cannot_shrink(fd: int) -> bool:
    if os.fstat(fd).st_size < SIZE:
        return False
    return not hasattr(fcntl, "F_GET_SEALS") or bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)


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


def whole(frame: Frame) -> bool:
    """Whether a RESULTS frame can be read; what its jobs' bodies are worth shows when each is opened."""
    size = len(frame.extra) - _WHO.size
    return size > 0 and size % _RECORD.size == 0


def results(frame: Frame) -> Iterator[Ran]:
    """The jobs of a RESULTS frame, in order."""
    body, end = frame.body, 0
    for job, length, flag, started, runtime in _RECORD.iter_unpack(memoryview(frame.extra)[_WHO.size :]):
        start, end = end, end + length
        yield _new(Ran, (job, flag, started, runtime, body[start:end]))
