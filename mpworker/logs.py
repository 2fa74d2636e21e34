"""Log records that stay whole when many processes write to one file, terminal or pipe.

Owns the last step: one record, one write. Never shares a lock that a dying process could keep: where the kernel does
not keep a write together (a pipe, beyond 4 KiB), a POSIX record lock on the pipe itself does, and the kernel frees
it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import logging.handlers
import os
import select
import stat
import time
from collections.abc import Iterable
from typing import IO

#: Seconds to wait for a writer that may be stopped; after that a torn line is better than a stuck task.
_PATIENCE = 0.2
_BETWEEN_TRIES = 0.001
#: Seconds to wait for the reader of a full, non-blocking pipe.
_READER_PATIENCE = 10.0


class WholeRecordHandler(logging.Handler):
    """Writes each record with one ``write()``.

    Args:
        fd: an open descriptor such as that of stderr.
        keep: the stream that owns it, so that it stays open.
        path: instead, a file that is appended to, private to the user, and opened anew when it has been rotated.
    """

    def __init__(self, fd: int | None = None, path: str | None = None, keep: IO[str] | None = None) -> None:
        super().__init__()
        self._fd, self._path, self._keep = fd, path, keep
        self._identity: tuple[int, int] | None = None
        self._lockable: bool | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)

    def _write(self, data: bytes) -> None:
        fd = self._descriptor()
        if self._lockable is None:
            mode = os.fstat(fd).st_mode
            self._lockable = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
        locked = self._lockable and _lock(fd)
        try:
            while data:  # once, but for a full disk or a pipe
                try:
                    data = data[os.write(fd, data) :]
                except BlockingIOError:  # whoever shares the pipe may have made it non-blocking
                    if not _writable(fd):
                        raise
        finally:
            if locked:
                fcntl.lockf(fd, fcntl.LOCK_UN)

    def _descriptor(self) -> int:
        if self._path is None:
            assert self._fd is not None
            return self._fd
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self._path)
            if self._fd is not None and self._identity == (found.st_dev, found.st_ino):
                return self._fd
        if self._fd is not None:
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        opened = os.fstat(self._fd)
        self._identity = opened.st_dev, opened.st_ino
        return self._fd

    def close(self) -> None:
        if self._path is not None and self._fd is not None:
            os.close(self._fd)
            self._fd = None
        super().close()


def _writable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(_READER_PATIENCE * 1000))


def _lock(fd: int) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_BETWEEN_TRIES)
        except OSError:  # this kind of file knows no locks
            return False


def make_whole(loggers: Iterable[logging.Logger]) -> None:
    """Replaces the plain stream and file handlers of these loggers by handlers that keep records whole.

    Handlers of other kinds, and streams without a descriptor, stay as they are.
    """
    for logger in loggers:
        for handler in list(logger.handlers):
            whole = _whole(handler)
            if whole is not None:
                whole.setLevel(handler.level)
                whole.setFormatter(handler.formatter)
                whole.filters = list(handler.filters)
                logger.handlers[logger.handlers.index(handler)] = whole


def _whole(handler: logging.Handler) -> WholeRecordHandler | None:
    if type(handler) in (logging.FileHandler, logging.handlers.WatchedFileHandler):
        assert isinstance(handler, logging.FileHandler)
        handler.close()
        if os.path.getsize(handler.baseFilename) == 0:  # just created, by a handler that does not care for whom
            os.chmod(handler.baseFilename, 0o600)
        return WholeRecordHandler(path=handler.baseFilename)
    if type(handler) is logging.StreamHandler:
        try:
            return WholeRecordHandler(handler.stream.fileno(), keep=handler.stream)
        except (AttributeError, OSError, ValueError):  # a stream in memory
            return None
    return None
