"""The result store: adds results to journal files, and filters, pages and counts what they hold.

Owns the question "what is this task's state now". Keeps a small tuple per task in memory and reads a record from its
file when it is asked for; what a filter finds in large files, it searches there. Never imports Celery, never asks
Redis, never changes a line.

A task's state is its latest record by timestamp, with two exceptions: what is not terminal never displaces what is, and
a SUCCESS that Celery stored is never displaced (Celery's own rule; Redis keeps it too).
"""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO, NamedTuple

from msgspec import structs

from mpworker.results.glance import read_glances
from mpworker.results.journal import SUFFIX, Journal
from mpworker.results.reader import Tally, read_at
from mpworker.results.record import TERMINAL, Glance, Record, canonical
from mpworker.results.scan import MOST, Order, Wanted, candidates, mapping, parts_of, records_of

_FAILED = frozenset({"FAILURE", "TIMEOUT", "TIMED_OUT", "LOST", "CRASHED"})
_PENDING = frozenset({"PENDING", "RECEIVED", "RETRY"})
#: How the message of a task begins whose process died; Celery's name for it, and the pool's.
_LOST = ("WorkerLostError", "WorkerLost", "PoisonMessage")
#: Bytes not yet read from where on a filter searches the files and notes nothing.
_LARGE = 32 << 20
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)


class _Seen(NamedTuple):
    """All that is kept of a task."""

    stamp: float
    status: str
    name: str | None
    runtime: float | None
    queued: float | None
    path: Path
    offset: int
    #: a SUCCESS that Celery stored
    fixed: bool
    retried: bool
    #: the node
    worker: str
    #: its process had died
    lost: bool


class _Place(NamedTuple):
    """How far a file has been read, and which file that was."""

    inode: int
    end: int


class ResultStore:
    """Results in JSON lines; safe from any number of processes and threads at once.

    Args:
        path: a journal folder, or one ``.jsonl`` file. It is created by the first :meth:`add_result`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        single = self.path.suffix == SUFFIX or self.path.is_file()
        self._single = single
        self._journal = Journal.single(self.path) if single else Journal(self.path, socket.gethostname())
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._tasks: dict[str, _Seen] = {}
        self._read: dict[Path, _Place] = {}
        self._torn = 0
        self._first: float | None = None
        self._last: float | None = None

    def add_result(
        self,
        task_id: str,
        status: str,
        message: str,
        response_data: Any = None,
        timestamp: datetime | float | str | None = None,
    ) -> None:
        """Adds one record with a single append.

        Args:
            status: one of Celery's states, or any text such as ``completed`` or ``failed``.
            response_data: any value; what JSON cannot hold is kept as its repr.
            timestamp: a datetime (naive: local time), seconds since the epoch, or ISO 8601 text; default now.

        Raises:
            ValueError: an empty task id or status, or a timestamp that is none.
            StoreError: the file cannot be written.
        """
        if not str(task_id) or not str(status).strip():
            raise ValueError("task_id and status must not be empty")
        stamp = time.time() if timestamp is None else _epoch(timestamp, "timestamp")
        self._journal.append(
            Record(
                task_id=str(task_id),
                status=str(status),
                message=str(message),
                result=response_data,
                timestamp=_iso(stamp),
            )
        )

    def get_results_by_status(self, status: str) -> list[Record]:
        """The latest record of every task in that state, oldest first; ``failed`` and ``FAILURE`` are one state."""
        return list(self.query(status=status))

    def query(
        self,
        status: str | None = None,
        name: str | None = None,
        since: datetime | float | str | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        *,
        until: datetime | float | str | None = None,
        task_id: str | None = None,
        worker: str | None = None,
    ) -> Iterator[Record]:
        """The latest record of each task that fits, in the order of time.

        Args:
            status: a state of Celery's in any case, or a word for it: ``failed``, ``completed``, ``running``, ...
            name: a task's name, or a pattern such as ``proj.*``.
            since: a datetime (naive: local time), a number of seconds ago, ``30m``/``2h``/``1d``, or ISO 8601 text.
            limit: at most so many.
            until: as ``since``.
            task_id: of one task, or a pattern.
            worker: a node's name such as ``celery@host``, or a pattern.

        Raises:
            ValueError: ``since``, ``until`` or ``limit`` makes no sense.
        """
        if limit is not None and (isinstance(limit, bool) or limit < 0):
            raise ValueError(f"limit must be 0 or more, not {limit!r}")
        state = None if status is None else canonical(status)
        wanted = Wanted(state, name, task_id, worker, *_between(since, until))
        with self._lock:
            if self._unread() > _LARGE:
                return self._search(wanted, limit, newest_first)
            self._refresh()
            tasks = list(self._tasks.items())
        found = [seen for key, seen in tasks if _fits(wanted, key, seen)]
        # Stable: records of one instant stay in the order in which they were written.
        found.sort(key=lambda seen: seen.stamp)
        if newest_first:
            found.reverse()
        return self._records(found, limit)

    def _within(
        self, since: datetime | float | str | None, until: datetime | float | str | None
    ) -> Iterator[tuple[str, _Seen]]:
        after, before = _between(since, until)
        with self._lock:
            self._refresh()
            tasks = list(self._tasks.items())
        return ((task_id, seen) for task_id, seen in tasks if after <= seen.stamp <= before)

    def from_now(self) -> ResultStore:
        """The same files, without what is in them now: for who follows what comes."""
        store = ResultStore(self.path)
        for path in store._paths():
            with suppress(FileNotFoundError):
                status = path.stat()
                store._read[path] = _Place(status.st_ino, status.st_size)
        return store

    def _unread(self) -> int:
        """Bytes that have not been looked at yet."""
        total = 0
        for path in self._paths():
            with suppress(FileNotFoundError):
                total += path.stat().st_size - (self._read[path].end if path in self._read else 0)
        return total

    def _search(self, wanted: Wanted, limit: int | None, newest: bool) -> Iterator[Record]:
        """As :meth:`query`, of files too large to note every task in them."""
        parts = parts_of(self._paths())
        order = Order(newest, MOST if limit is None else min(MOST, 2 * limit + 1000))
        while limit is None or limit > 0:
            tasks: dict[str, _Seen] = {}
            with mapping(parts) as each:
                lines = candidates(each, parts, wanted, order)
                for entry in records_of(each, parts, frozenset(task_id for _, task_id in lines)):
                    _note(tasks, *entry)
            found = []
            for key, task_id in lines:
                seen = tasks.get(task_id)
                if seen and (seen.stamp, str(seen.path), seen.offset) == key and _fits(wanted, task_id, seen):
                    found.append(seen)
            for record in self._records(found, limit):
                limit = None if limit is None else limit - 1
                yield record
            if len(lines) < order.most:
                return
            order = order._replace(behind=lines[-1][0])

    @staticmethod
    def _records(found: list[_Seen], limit: int | None) -> Iterator[Record]:
        given = 0
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for seen in found:
                if limit is not None and given >= limit:
                    return
                with suppress(FileNotFoundError):  # rotated away meanwhile
                    file = files.get(seen.path) or stack.enter_context(seen.path.open("rb"))
                    files[seen.path] = file
                    if (record := read_at(file, seen.offset)) is not None:
                        given += 1
                        yield record if record.name else structs.replace(record, name=seen.name)

    def get_statistics(self) -> dict[str, Any]:
        """Counts each task once, by its latest state.

        Returns:
            ``total_tasks``, ``completed``, ``failed``, ``lost`` (failed because their process died), ``revoked``,
            ``running``, ``pending`` (waits, also for a retry), ``retried`` (at least once; counted beside the others),
            ``success_rate`` (percent of completed + failed, 0.0 to 100.0; 0.0 before any is finished),
            ``mean_runtime``, ``p50_runtime``, ``p95_runtime``, ``p99_runtime``, ``max_runtime`` (seconds or ``None``),
            the same with ``queueing`` (from when the task could have begun to when it did, where that is known),
            ``first_timestamp``, ``last_timestamp`` (ISO 8601 or ``None``), ``throughput`` (finished tasks per second
            between those two), ``torn_lines``.
        """
        with self._lock:
            self._refresh()
            tasks = list(self._tasks.values())
            torn, first, last = self._torn, self._first, self._last
        return _count(tasks, first, last) | {"torn_lines": torn}

    def get_breakdown(
        self,
        by: str,
        since: datetime | float | str | None = None,
        until: datetime | float | str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """:meth:`get_statistics` of groups of tasks, without ``torn_lines``.

        Args:
            by: ``name``, ``worker``, ``hour`` (in UTC, of the latest record) or ``all``, which is one group.
            since, until: as for :meth:`query`.

        Raises:
            ValueError: ``by`` is none of them, or a time makes no sense.
        """
        if by not in _GROUPS:
            raise ValueError(f"by must be one of {', '.join(_GROUPS)}, not {by!r}")
        groups: dict[str, list[_Seen]] = {}
        for _, seen in self._within(since, until):
            groups.setdefault(_GROUPS[by](seen), []).append(seen)
        return {
            name: _count(tasks, min(seen.stamp for seen in tasks), max(seen.stamp for seen in tasks))
            for name, tasks in sorted(groups.items())
        }

    def _paths(self) -> list[Path]:
        return [self.path] if self._single else Journal.files(self.path)

    def _refresh(self) -> None:
        """Reads what was appended since the last time; everything again when a file was removed or replaced."""
        places = {}
        for path in self._paths():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            places[path] = _Place(status.st_ino, status.st_size)
        for path, known in self._read.items():
            now = places.get(path)
            if now is None or now.inode != known.inode or now.end < known.end:
                self._forget()
                break
        for path, place in places.items():
            start = self._read[path].end if path in self._read else 0
            if place.end > start:
                self._read[path] = _Place(place.inode, self._read_on(path, start))

    def _read_on(self, path: Path, start: int) -> int:
        tally = Tally(end=start)
        for found, offset in read_glances(path, tally, start):
            stamp = _note(self._tasks, found, path, offset)
            if stamp is None:
                self._torn += 1
            else:
                self._first = stamp if self._first is None else min(self._first, stamp)
                self._last = stamp if self._last is None else max(self._last, stamp)
        self._torn += tally.torn
        return tally.end


_GROUPS: dict[str, Callable[[_Seen], str]] = {
    "all": lambda seen: "all",
    "name": lambda seen: seen.name or "",
    "worker": lambda seen: seen.worker,
    "hour": lambda seen: f"{datetime.fromtimestamp(seen.stamp, UTC):%Y-%m-%dT%H:00Z}",
}


def _note(tasks: dict[str, _Seen], record: Glance, path: Path, offset: int) -> float | None:
    """Has a record count for its task; returns when it was written, or ``None`` if it does not say so."""
    try:
        stamp = datetime.fromisoformat(record.timestamp).timestamp()
    except ValueError:
        return None
    if record.superseded or record.chord:
        return stamp
    status, old = intern(canonical(record.status)), tasks.get(record.task_id)
    name = intern(record.name) if record.name else None
    retried = record.retries > 0 or status == "RETRY"
    fixed = status == "SUCCESS" and record.key is not None
    lost = status in _FAILED and record.message.startswith(_LOST)
    worker, times = intern(record.hostname), (record.runtime, record.queued)
    new = _Seen(stamp, status, name, *times, path, offset, fixed, retried, worker, lost)
    if old is not None:
        # Writers that only know the id (a revoke) leave the name to those that knew it.
        winner = new if _displaces(new, old) else old
        new = winner._replace(name=winner.name or new.name or old.name, retried=new.retried or old.retried)
    tasks[record.task_id] = new
    return stamp


def _fits(wanted: Wanted, task_id: str, seen: _Seen) -> bool:
    named = wanted.name is None or seen.name is not None
    return named and wanted.fits(task_id, seen.status, seen.name, seen.worker, seen.stamp)


def _count(tasks: Sequence[_Seen], first: float | None, last: float | None) -> dict[str, Any]:
    completed = sum(seen.status == "SUCCESS" for seen in tasks)
    failed = sum(seen.status in _FAILED for seen in tasks)
    finished = sum(seen.status in TERMINAL for seen in tasks)
    pending = sum(seen.status in _PENDING for seen in tasks)
    span = last - first if first is not None and last is not None else 0.0
    runtimes = sorted(s.runtime for s in tasks if s.runtime is not None and s.status in TERMINAL)
    return {
        "total_tasks": len(tasks),
        "completed": completed,
        "failed": failed,
        "success_rate": 100.0 * completed / (completed + failed) if completed + failed else 0.0,
        "lost": sum(seen.lost for seen in tasks),
        "revoked": sum(seen.status == "REVOKED" for seen in tasks),
        "retried": sum(seen.retried for seen in tasks),
        "running": len(tasks) - finished - pending,
        "pending": pending,
        **_times("runtime", runtimes),
        **_times("queueing", sorted(s.queued for s in tasks if s.queued is not None)),
        "first_timestamp": None if first is None else _iso(first),
        "last_timestamp": None if last is None else _iso(last),
        "throughput": finished / span if span > 0 else 0.0,
    }


def _times(what: str, ordered: list[float]) -> dict[str, float | None]:
    return {
        f"mean_{what}": sum(ordered) / len(ordered) if ordered else None,
        f"p50_{what}": _percentile(ordered, 0.50),
        f"p95_{what}": _percentile(ordered, 0.95),
        f"p99_{what}": _percentile(ordered, 0.99),
        f"max_{what}": ordered[-1] if ordered else None,
    }


def _displaces(new: _Seen, old: _Seen) -> bool:
    if old.fixed or new.fixed:
        return not old.fixed
    if (old.status in TERMINAL) != (new.status in TERMINAL):
        return new.status in TERMINAL
    return new.stamp >= old.stamp


def _percentile(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _iso(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="microseconds")


def _epoch(value: datetime | float | str, what: str) -> float:
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        epoch = value.timestamp() if isinstance(value, datetime) else float(value)
        datetime.fromtimestamp(epoch, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        raise ValueError(f"{what} must be a datetime, a number of seconds or ISO 8601 text, not {value!r}") from None
    return epoch


def _between(since: datetime | float | str | None, until: datetime | float | str | None) -> tuple[float, float]:
    after = -math.inf if since is None else _moment(since, "since")
    return after, math.inf if until is None else _moment(until, "until")


def _moment(value: datetime | float | str, what: str) -> float:
    if isinstance(value, str):
        ago = _AGO.fullmatch(value.strip())
        if ago:
            return time.time() - float(ago[1]) * _UNITS[ago[2].lower()]
        return _epoch(value.strip(), what)
    if isinstance(value, datetime):
        return _epoch(value, what)
    return time.time() - _epoch(value, what)
