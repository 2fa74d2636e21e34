"""The parent's side of a map that travels in chunks: what is known of each, in order, and what is cut off from it.

Owns the order of the results, and what becomes of items that a worker has not begun. Holds no reference to the pool.
What is cut off is sent again by the thread that reads results, which never waits for room.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from itertools import chain
from time import monotonic
from typing import Any, cast

from mpworker.pool.chunks import Entry, Report, most_items, pack_chunk
from mpworker.pool.futures import Results, TaskFuture
from mpworker.pool.parcel import Outcome, open_call, open_outcome, unpack_error

#: Seconds that the items of a chunk which is sent again shall take.
_WORTH = 0.02
_REPORTED = 6  # words of a report


class Course:
    """What the chunks of one map have in common.

    Args:
        workers: of the pool.
        soft, hard: limits of each item in seconds, 0 for none.
    """

    def __init__(self, workers: int, soft: float, hard: float) -> None:
        self.workers, self.soft, self.hard = workers, soft, hard
        #: guards all that a chunk knows, and the order; something was told or has ended
        self.changed = threading.Condition()
        #: nothing more is sent
        self.stopped = False
        self._last: Chunk | None = None

    def append(self, chunk: Chunk) -> None:
        """Behind all others."""
        with self.changed:
            if self._last is not None:
                self._last.next = chunk
            while chunk.next is not None:  # it has been sent, and perhaps cut, before it got here
                chunk = chunk.next
            self._last = chunk

    def insert(self, before: Chunk, chunk: Chunk) -> None:
        """Right behind ``before``. The caller holds :attr:`changed`."""
        chunk.next, before.next = before.next, chunk
        if self._last is before:
            self._last = chunk

    def complete(self) -> None:
        """All has been sent once."""
        with self.changed:
            self._last = None

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class Chunk(TaskFuture[None]):
    """One chunk: the task that runs it, what is known of its results, and the chunk behind it.

    Args:
        body: its call, to take out what is cut off.
        size: its items.
    """

    def __init__(self, core: Results, job: int, course: Course, body: bytes, size: int) -> None:
        super().__init__(core, job)
        self.next: Chunk | None = None
        self.course, self._size = course, size
        self._body = body if size > 1 else b""
        self._entries: list[Entry] = []  # told and not taken
        self._told = 0  # in all
        self._has_parcels = self._divided = self._over = self._curtailed = False
        self._error: BaseException | bytes = b""
        core.begin_chunk()

    # -- who takes the results -----------------------------------------------------------------------------------

    def take(self, end: float | None) -> tuple[list[Entry], bool]:
        """Results, and whether there may be parcels among them. Blocks until some are known; none if no more will be.

        Raises:
            TimeoutError: it is later than ``end``.
        """
        with self.course.changed:
            timeout = None if end is None else end - monotonic()
            if not self.course.changed.wait_for(self._has_news, timeout):
                raise TimeoutError
            entries, self._entries = self._entries, []
            return entries, self._has_parcels

    def _has_news(self) -> bool:
        return bool(self._entries or self._over or self._error or self._state.startswith("CANCELLED"))

    def error(self) -> BaseException | None:
        """Of the item behind the last result."""
        with self.course.changed:
            if self._error:
                return unpack_error(self._error) if isinstance(self._error, bytes) else self._error
            return CancelledError() if self._curtailed or self.cancelled() else None

    def following(self) -> Chunk | None:
        with self.course.changed:
            return self.next

    def cancel(self) -> bool:
        """As in the base class; what may be cut off elsewhere is not sent again."""
        self.course.stop()
        cancelled = super().cancel()
        with self.course.changed:
            self.course.changed.notify_all()
        return cancelled

    # -- the thread that reads results ---------------------------------------------------------------------------

    def cut(self, body: bytes) -> None:
        """Its worker tells what it has done, and what it will not begin."""
        known, report = open_outcome(Outcome.VALUE, body)
        if known and len(report) == _REPORTED:
            with self.course.changed:
                self._learn(report)
                self.course.changed.notify_all()

    def settle_unwatched(self, succeeded: bool, value: Any) -> bool:
        """Never: somebody may wait, and there may be more to send."""
        return False

    def settle(self, succeeded: bool, value: Any) -> None:
        """The task has ended."""
        with self.course.changed:
            try:
                if succeeded:
                    self._learn(value)
                elif not self._error:
                    self._error = value
            finally:
                self._over, self._body = True, b""
                self.course.changed.notify_all()
                super().settle(True, None)
                self._core.end_chunk()  # last: until then the pool takes what was cut off

    def _learn(self, report: Report) -> None:
        entries, has_parcels, error, taken, done, seconds = report
        if not self._divided:
            self._divided = True
            self._send_rest(taken, done, seconds)
        fresh = entries[self._told :] if self._told else entries
        self._told += len(fresh)
        self._has_parcels |= has_parcels
        self._entries = self._entries + fresh if self._entries else fresh
        self._error = self._error or error

    def _send_rest(self, taken: int, done: int, seconds: float) -> None:
        """Sends what was cut off, in chunks of a size that fits what has been seen."""
        body, self._body = self._body, b""
        if taken >= self._size:
            return
        if self.course.stopped:
            self._curtailed = True
            return
        _, (code, shape, items), _ = open_call(body)
        items = items[taken:]
        # Of an item that takes long nobody knows what those behind it take: then they are only spread.
        size = most_items(len(items), self.course.workers)
        if seconds > 0:
            size = max(size, min(int(done * _WORTH / seconds), len(items)))
        last = self
        for start in range(0, len(items), size):
            part = items[start : start + size]
            body = pack_chunk(code, shape, part)
            chunk = Chunk(self._core, self._core.handle.next_id(), self.course, body, len(part))
            self.course.insert(last, chunk)
            self._core.send_more(chunk, body, self.course.soft, self.course.hard)
            last = chunk


class Outcomes(chain[Any]):
    """What a map returns. Its inner loop is that of the base class, which costs less than a generator's."""

    _lists: Generator[Iterable[Any], None, None]
    _current: list[list[Any]]

    def close(self) -> None:
        """Ends it; what is left of the map is cancelled."""
        self._lists.close()
        for entries in self._current:
            entries.clear()


def hand_out(chunk: Chunk | None, end: float | None) -> Outcomes:
    """The results of a map, from its first chunk on; what is left at its end is cancelled.

    Args:
        end: by ``time.monotonic()``.
    """
    current: list[list[Any]] = []
    lists = _lists(chunk, end, current)
    outcomes = cast(Outcomes, Outcomes.from_iterable(lists))
    outcomes._lists, outcomes._current = lists, current
    return outcomes


def _lists(chunk: Chunk | None, end: float | None, current: list[list[Any]]) -> Generator[Iterable[Any], None, None]:
    try:
        while chunk is not None:
            try:
                entries, has_parcels = chunk.take(end)
            except BaseException:  # the one that was waited for goes on, as with concurrent.futures
                chunk.course.stop()
                chunk = chunk.following()
                raise
            error: BaseException | None = None
            if not entries:
                error, chunk = chunk.error(), chunk.following()
            elif has_parcels:
                entries, error = _opened(entries)
            current[:] = [entries]
            if has_parcels:
                entries.reverse()
                yield _drained(entries)
            else:
                yield entries
            if error is not None:
                try:
                    raise error
                finally:
                    del error
    finally:
        cancel_from(chunk)


def _drained(values: list[Any]) -> Iterator[Any]:
    """A result that was taken is not ours to keep."""
    while values:
        yield values.pop()


def _opened(entries: list[Entry]) -> tuple[list[Any], BaseException | None]:
    """The values, up to the first that cannot be unpacked here, and the error of that one."""
    values: list[Any] = []
    for entry in entries:
        if type(entry) is list:
            succeeded, entry = open_outcome(Outcome.VALUE, entry[0])
            if not succeeded:
                return values, entry
        values.append(entry)
    return values, None


def cancel_from(chunk: Chunk | None) -> None:
    """Cancels a chunk and all behind it."""
    if chunk is not None:
        chunk.course.stop()
    while chunk is not None:
        chunk.cancel()
        chunk = chunk.following()
