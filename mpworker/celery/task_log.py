"""``mpworker_task_log``: the last of what a task prints and logs is part of its result record.

Owns how it is overheard in a worker process: whatever is written to ``sys.stdout`` and ``sys.stderr``, and each log
record, before any level or filter of a handler. It goes to memory that outlives the process, so that whoever writes the
record finds it there: the task's own process, or, for one that was killed, the main process. What subprocesses of the
task say is theirs. Without the setting nothing of this is in place.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from mpworker.pool import worker as pool_worker

_FORMAT = logging.Formatter("[%(asctime)s: %(levelname)s/%(name)s] %(message)s")
#: The logger to which Celery redirects what is printed: that has been overheard before.
_REDIRECTED = "celery.redirected"

#: Finds what a task has said; set where results are stored.
source: Callable[[str], bytes] | None = None


def tail_of(task_id: str) -> str | None:
    """What a task has said so far, or had said when its process was killed; ``None`` for nothing."""
    said = source(task_id) if source is not None else b""
    return said.decode(errors="replace") or None


# -- in a worker process -----------------------------------------------------------------------------------------------

_task_id: str | None = None
_lock = threading.RLock()


def listen_in_worker() -> None:
    """From here on what the tasks of this process say is kept. To be called when logging has been set up."""
    global source
    worker = pool_worker.task_worker()
    if worker is None or worker.page.tail is None:
        return
    source = _own
    sys.stdout, sys.stderr = _Overheard(sys.stdout), _Overheard(sys.stderr)
    logging.setLogRecordFactory(_Factory(logging.getLogRecordFactory()))
    os.register_at_fork(after_in_child=follow)


def follow(task_id: str | None = None) -> None:
    """Says which task this process runs now; ``None``: none, so that nothing is kept."""
    global _task_id
    if source is not _own:
        return
    worker = pool_worker.this_worker
    if task_id is not None and worker is not None and worker.current is not None:
        assert worker.page.tail is not None
        worker.page.tail.begin(worker.current.job)
        _task_id = task_id
    else:
        _task_id = None


def attach(exc: BaseException) -> None:
    """An exception leaves this process, so that the main one writes the record: it takes along what was said."""
    if _task_id is not None:
        with contextlib.suppress(AttributeError):  # an exception may refuse it: there is the ring, for a while
            exc.mpworker_log = _own(_task_id)  # type: ignore[attr-defined]


def attached(exc: BaseException) -> bytes:
    """What :func:`attach` has attached."""
    return getattr(exc, "mpworker_log", b"")


def _own(task_id: str) -> bytes:
    worker = pool_worker.task_worker()
    if task_id != _task_id or worker is None or worker.current is None or worker.page.tail is None:
        return b""
    return worker.page.tail.read(worker.current.job)


def _keep(text: str | bytes) -> None:
    worker = pool_worker.this_worker
    if _task_id is None or worker is None or worker.page.tail is None:
        return
    tail = worker.page.tail
    text = text[-tail.kept :]
    data = text.encode(errors="replace") if isinstance(text, str) else bytes(text)
    with worker.uninterrupted(), _lock:
        tail.write(data[-tail.kept :])


class _Factory:
    """Makes log records as before, and keeps what they say."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        worker = pool_worker.this_worker
        if _task_id is not None and worker is not None and record.name not in (None, _REDIRECTED):
            with worker.uninterrupted():  # what is suppressed here is not the soft limit
                try:
                    text = _FORMAT.format(copy.copy(record))  # a handler may format its exception otherwise
                except Exception:  # arguments that do not fit: handlers will complain
                    text = f"{record.levelname} {record.name}: {record.msg!s:.1000}" if type(record.msg) is str else ""
                _keep(text + "\n")
        return record


class _Overheard:
    """A stream of which is kept what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") != "logging":  # a handler: its record has been kept
            _keep(text)
        return self._stream.write(text)

    def writelines(self, lines: Iterable[Any]) -> None:
        for line in lines:
            self.write(line)

    @property
    def buffer(self) -> Any:
        return _Overheard(self._stream.buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
