"""The journal: appends records to one file per node and UTC day.

Owns the files' names, their descriptors and the repair of torn lines. Never encodes a result, never reads records back,
never talks to Redis.

Order: the line is written *before* Redis is asked and says ``shipped: 0``. When Redis has the result, that one digit is
overwritten in place. A crash between the two therefore leaves the record known as unshipped, and shipping it twice does
no harm. Overwriting was chosen over a second marker line because it neither doubles the lines nor makes every reader
join two of them; one byte cannot be half written. Where the line begins is known: after a write, the position of an
O_APPEND descriptor is the end of *that* write, whoever else writes, as long as the descriptor is not shared. So every
process opens its own (a forked child notices), and a line is compared with what was written before it is touched.
A file that can only be appended to (``chattr +a``) keeps its zeros; its records are then shipped once more.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from mpworker.errors import ConfigurationError, StoreError
from mpworker.results.record import OPENING_LINE, SHIPPED, SHIPPED_AT, Record

logger = logging.getLogger("mpworker.results")

SUFFIX = ".jsonl"
_DAY = 86400
#: Seconds by which the disk may be behind where records are flushed in batches.
BATCH = 0.1
#: Seconds that the end of a node may wait for the disk.
_LAST_FLUSH = 2.0
#: Seconds between two looks whether the file was deleted or moved away.
_LOOK_AGAIN = 1.0
#: Bytes of a line that are compared before its digit is overwritten: they hold the task's id and state.
_COMPARED = 240


class Place(NamedTuple):
    """Where a record was written, for :meth:`Journal.mark`."""

    path: str
    identity: tuple[int, int]
    offset: int
    head: bytes


class _File:
    """An open journal file: one descriptor to append, one to read and overwrite in place."""

    def __init__(self, path: str, day: int) -> None:
        self.path, self.day = path, day
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.inplace = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self.inplace = -1
        status = os.fstat(self.fd)
        self.identity = (status.st_dev, status.st_ino)
        self.looked = time.monotonic()
        size = status.st_size
        #: the file ends with a newline, as far as this process knows
        self.whole = size == 0 or (self.inplace >= 0 and os.pread(self.inplace, 1, size - 1) == b"\n")

    def is_ours(self, fd: int) -> bool:
        """Whether the descriptor still is this file: user code may have closed it and opened something else."""
        try:
            status = os.fstat(fd)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    def in_place(self) -> bool:
        """Whether the path still leads to this file; looks at most once per second."""
        now = time.monotonic()
        if now - self.looked < _LOOK_AGAIN:
            return True
        self.looked = now
        try:
            status = Path(self.path).stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.identity

    def close(self) -> None:
        for fd in (self.fd, self.inplace):
            if fd >= 0 and self.is_ours(fd):
                os.close(fd)


class Journal:
    """Appends records; safe from any number of threads and processes, also across a fork.

    Args:
        folder: of the files; created (0700) with the first record.
        node: name of the node, the first part of the files' names.
        fsync: ``off``: the kernel writes to disk when it likes, which survives the death of every process; ``always``:
            each record is on disk when :meth:`append` returns. ``batch`` is ``always`` here: who has a
            :class:`Flusher` says ``off``.
    """

    def __init__(
        self, folder: Path | str, node: str, fsync: str = "off", *, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self.node, self.fsync = Path(folder), node, fsync
        self._stem = re.sub(r"[^A-Za-z0-9._@-]", "_", node).lstrip(".")[:150] or "node"
        self._only: Path | None = None
        self._path, self._path_day = Path(), -1
        self._clock = clock
        self._renew()

    @classmethod
    def single(cls, path: Path | str, fsync: str = "off") -> Journal:
        """A journal of exactly one file, which has no day in its name."""
        journal = cls(Path(path).parent, Path(path).stem, fsync)
        journal._only = Path(path)
        return journal

    @staticmethod
    def files(folder: Path | str) -> list[Path]:
        """The folder's journal files, oldest day first; none when the folder is not there."""
        return sorted(Path(folder).glob(f"*{SUFFIX}"), key=lambda p: (p.stem[-10:], p.name))

    def _renew(self) -> None:
        # Re-entrant: a signal handler of the main thread may store a result while that thread is in here.
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._file: _File | None = None

    def _check_fork(self) -> None:
        if self._pid != os.getpid():
            inherited = self._file
            self._renew()
            if inherited is not None:
                inherited.close()

    def path(self) -> Path:
        """The file that a record written now goes to."""
        day = int(self._clock() // _DAY)
        if day != self._path_day:
            self._path_day = day
            self._path = self.folder / f"{self._stem}-{datetime.fromtimestamp(day * _DAY, UTC).date()}{SUFFIX}"
        return self._only or self._path

    def prepare(self) -> None:
        """Makes sure, before any task runs, that records can be written.

        Raises:
            ConfigurationError: the folder or today's file cannot be written.
        """
        self._check_fork()
        try:
            with self._lock:
                self._current()
        except OSError as exc:
            where = self._only or self.folder
            raise ConfigurationError(f"mpworker_journal: cannot write to {where}: {exc.strerror or exc}") from exc

    def _current(self) -> _File:
        day = -1 if self._only else int(self._clock() // _DAY)
        current = self._file
        if current is not None:
            if current.day == day and current.is_ours(current.fd) and current.in_place():
                return current
            self._file = None
            current.close()
        try:
            self._file = _File(str(self.path()), day)
        except FileNotFoundError:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = _File(str(self.path()), day)
        return self._file

    def append(self, record: Record) -> Place:
        """Appends one record with a single write.

        Raises:
            StoreError: it could not be written, or not wholly (disk full); readers skip what was written of it.
        """
        line = record.to_line()
        self._check_fork()
        with self._lock:
            try:
                file = self._current()
                data = line if file.whole else b"\n" + line
                written = os.write(file.fd, data)
                if written < len(data):
                    self._end_torn_line(file)
                    raise OSError(f"only {written} of {len(data)} bytes could be written; is the disk full?")
                file.whole = True
                end = os.lseek(file.fd, 0, os.SEEK_CUR)
                if self.fsync != "off":
                    os.fsync(file.fd)
            except OSError as exc:
                where = self._only or self.folder
                raise StoreError(f"mpworker_journal: cannot append to {where}: {exc.strerror or exc}") from exc
            return Place(file.path, file.identity, end - len(line), line[:_COMPARED])

    @staticmethod
    def _end_torn_line(file: _File) -> None:
        file.whole = False
        try:
            file.whole = os.write(file.fd, b"\n") == 1
        except OSError:
            return  # still full; the next record of this process begins with the newline, and readers resynchronise

    @staticmethod
    def holds(place: Place) -> bool:
        """Whether the record can be found there by others: nobody has removed or replaced the file meanwhile."""
        try:
            status = os.stat(place.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == place.identity

    def mark(self, place: Place, digit: bytes = SHIPPED) -> bool:
        """Overwrites the ``shipped`` digit of a record. False when that was not possible; never raises ``OSError``."""
        self._check_fork()
        with self._lock:
            file = self._file
            if file is not None and file.identity == place.identity and file.is_ours(file.inplace):
                return mark_at(file.inplace, place, digit)
        try:
            fd = os.open(place.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return mark_at(fd, place, digit)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Closes the descriptors; the next record opens them again."""
        self._check_fork()
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


class Flusher(threading.Thread):
    """Has what any process appends to a journal on disk within :data:`BATCH` seconds. One for a node is enough."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(name="mpworker-journal", daemon=True)
        self._journal = journal
        self._flushed: tuple[int, int, int] | None = None
        self._end = threading.Event()
        self._fd, self._path = -1, Path()
        self._failed = False

    def run(self) -> None:
        while not self._end.wait(BATCH):
            self.flush()
        self.flush()
        self._close()

    def end(self) -> None:
        """Ends the thread; what was appended before is on disk, unless that takes longer than a moment."""
        self._end.set()
        if self.ident is not None:
            self.join(_LAST_FLUSH)

    def flush(self) -> bool:
        """Writes to disk what is not there yet. ``False``: nothing was new, or that was not possible."""
        try:
            if self._fd >= 0 and self._path != self._journal.path():
                self._flush()  # what came in the last moment of its day
                self._close()
            if self._fd < 0:
                path = self._journal.path()
                self._fd, self._path = os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
            elif not _leads_to(self._path, self._fd):  # deleted or moved away: the next record makes a new one
                self._close()
                return False
            return self._flush()
        except FileNotFoundError:
            return False
        except OSError as exc:
            if not self._failed:
                logger.error("mpworker_journal: %s cannot be flushed to disk: %s", self._path, exc.strerror or exc)
            self._failed = True
            return False

    def _flush(self) -> bool:
        status = os.fstat(self._fd)
        now = status.st_ino, status.st_size, status.st_mtime_ns
        if now == self._flushed:
            return False
        os.fdatasync(self._fd)
        self._flushed, self._failed = now, False
        return True

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _leads_to(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def mark_at_offset(fd: int, offset: int, digit: bytes) -> bool:
    """Overwrites the digit of the line that begins there, if one does. ``False``: that was not possible."""
    head = OPENING_LINE
    try:
        if os.pread(fd, len(head), offset) != head:
            return False
        return os.pwrite(fd, digit, offset + SHIPPED_AT) == 1
    except OSError:
        return False


def mark_at(fd: int, place: Place, digit: bytes) -> bool:
    """Overwrites one digit, if the line at that place is the one that was written."""
    at, head = SHIPPED_AT, place.head
    try:
        found = os.pread(fd, len(head), place.offset)
        if found[:at] != head[:at] or found[at + 1 :] != head[at + 1 :]:
            return False
        return os.pwrite(fd, digit, place.offset + at) == 1
    except OSError:
        return False
