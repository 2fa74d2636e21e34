"""The result store: adds results to journal files, and filters, pages and counts what they hold.

Owns what has been read so far. Keeps a small tuple per task in memory and reads a record from its file when it is asked
for; what a filter finds in large files, it searches there, and it counts them without noting all tasks. Which of a
task's records tells its state, :mod:`mpworker.results.tasks` says. Never imports Celery, never asks Redis, never
changes a line.
"""

from __future__ import annotations

import math
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from msgspec import structs

from mpworker.results.census import census
from mpworker.results.glance import read_glances
from mpworker.results.journal import SUFFIX, Journal
from mpworker.results.reader import Tally, read_at
from mpworker.results.record import Record, canonical
from mpworker.results.scan import MOST, Order, Wanted, candidates, mapping, parts_of, records_of
from mpworker.results.tasks import GROUPS, Count, Seen, counted, iso, put, seen_of, stamp_of

#: Bytes not yet read from where on a filter searches the files, and a breakdown counts them, and notes nothing.
_LARGE = 32 << 20
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE)


class _Place(NamedTuple):
    """How far a file has been read, and which file that was."""

    inode: int
    end: int


class ResultStore:
    """Results in JSON lines; safe from any number of processes and threads at once.

    Args:
        path: a journal folder, or one ``.jsonl`` file; ``~`` is the user's home. It is created by the first
            :meth:`add_result`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        single = self.path.suffix == SUFFIX or self.path.is_file()
        self._single = single
        self._journal = Journal.single(self.path) if single else Journal(self.path, socket.gethostname())
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._tasks: dict[str, Seen] = {}
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
                timestamp=iso(stamp),
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
        while parts and (limit is None or limit > 0):
            tasks: dict[str, Seen] = {}
            with mapping(parts) as each:
                lines = candidates(each, parts, wanted, order)
                for glance, path, offset in records_of(each, parts, frozenset(task_id for _, task_id in lines)):
                    if (seen := seen_of(glance, path, offset)) is not None:
                        put(tasks, glance.task_id, seen)
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
    def _records(found: list[Seen], limit: int | None) -> Iterator[Record]:
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
        """Counts each task once, by its latest state. Notes every task, so that a later call reads only what is new; of
        large journals :meth:`get_breakdown` by ``all`` tells as much in less memory.

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
        (groups,) = counted(tasks, ["all"])
        total = groups.get("all") or Count()
        total.first, total.last = first, last
        return total.figures() | {"torn_lines": torn}

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
        return self.get_breakdowns([by], since, until)[0]

    def get_breakdowns(
        self,
        by: Sequence[str],
        since: datetime | float | str | None = None,
        until: datetime | float | str | None = None,
    ) -> list[dict[str, dict[str, Any]]]:
        """:meth:`get_breakdown` by each of these, with one look at the files."""
        for name in by:
            if name not in GROUPS:
                raise ValueError(f"by must be one of {', '.join(GROUPS)}, not {name!r}")
        after, before = _between(since, until)
        with self._lock:
            is_large = self._unread() > _LARGE
            if not is_large:
                self._refresh()
                tasks = list(self._tasks.values())
        found = census(parts_of(self._paths()), by, after, before) if is_large else counted(tasks, by, after, before)
        return [{name: count.figures() for name, count in sorted(groups.items())} for groups in found]

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
            if (seen := seen_of(found, path, offset)) is not None:
                put(self._tasks, found.task_id, seen)
            if (stamp := seen.stamp if seen else stamp_of(found)) is None:
                self._torn += 1
            else:
                self._first = stamp if self._first is None else min(self._first, stamp)
                self._last = stamp if self._last is None else max(self._last, stamp)
        self._torn += tally.torn
        return tally.end


def _fits(wanted: Wanted, task_id: str, seen: Seen) -> bool:
    named = wanted.name is None or seen.name is not None
    return named and wanted.fits(task_id, seen.status, seen.name, seen.worker, seen.stamp)


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
