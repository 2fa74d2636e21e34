"""What is known of each task, and what many of them come to.

Owns the question "what is this task's state now", for all who read journals. Knows no files.

A task's state is its latest record by timestamp, with two exceptions: what is not terminal never displaces what is (in
Redis it does, if the task has begun anew), and a SUCCESS that Celery stored is never displaced (Celery's own rule;
Redis keeps it too).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

from mpworker.results.record import TERMINAL, Glance, canonical

_FAILED = frozenset({"FAILURE", "TIMEOUT", "TIMED_OUT", "LOST", "CRASHED"})
_PENDING = frozenset({"PENDING", "RECEIVED", "RETRY"})
#: How the message of a task begins whose process died; Celery's name for it, and the pool's.
_LOST = ("WorkerLostError", "WorkerLost", "PoisonMessage")


class Seen(NamedTuple):
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


#: By what tasks are counted apart.
GROUPS: dict[str, Callable[[Seen], str]] = {
    "all": lambda seen: "all",
    "name": lambda seen: seen.name or "",
    "worker": lambda seen: seen.worker,
    "hour": lambda seen: f"{datetime.fromtimestamp(seen.stamp, UTC):%Y-%m-%dT%H:00Z}",
}


def seen_of(record: Glance, path: Path, offset: int) -> Seen | None:
    """What it says of its task, if that counts and has a time."""
    stamp = stamp_of(record)
    if stamp is None or record.superseded or record.chord:
        return None
    status = intern(canonical(record.status))
    name = intern(record.name) if record.name else None
    retried = record.retries > 0 or status == "RETRY"
    fixed = status == "SUCCESS" and record.key is not None
    lost = status in _FAILED and record.message.startswith(_LOST)
    worker, times = intern(record.hostname), (record.runtime, record.queued)
    return Seen(stamp, status, name, *times, path, offset, fixed, retried, worker, lost)


def put(tasks: MutableMapping[str, Seen], task_id: str, new: Seen) -> None:
    """Has it count for a task, if it is not displaced by what is known already."""
    old = tasks.get(task_id)
    if old is not None:
        # Writers that only know the id (a revoke) leave the name to those that knew it.
        winner = new if _displaces(new, old) else old
        new = winner._replace(name=winner.name or new.name or old.name, retried=new.retried or old.retried)
    tasks[task_id] = new


def stamp_of(record: Glance) -> float | None:
    """When it was written, in seconds since the epoch."""
    try:
        return datetime.fromisoformat(record.timestamp).timestamp()
    except ValueError:
        return None


def _displaces(new: Seen, old: Seen) -> bool:
    if old.fixed or new.fixed:
        return not old.fixed
    if (old.status in TERMINAL) != (new.status in TERMINAL):
        return new.status in TERMINAL
    return new.stamp >= old.stamp


class Count:
    """What many tasks come to; two of them can be added up."""

    __slots__ = ("first", "kinds", "last", "queued", "runtimes", "total")

    def __init__(self) -> None:
        self.total = 0
        self.kinds = dict.fromkeys(("completed", "failed", "lost", "revoked", "retried", "finished", "pending"), 0)
        self.runtimes, self.queued = array("d"), array("d")
        #: when the earliest and the latest of them was told of
        self.first: float | None = None
        self.last: float | None = None

    def add(self, seen: Seen) -> None:
        status, kinds = seen.status, self.kinds
        self.total += 1
        kinds["completed"] += status == "SUCCESS"
        kinds["failed"] += status in _FAILED
        kinds["lost"] += seen.lost
        kinds["revoked"] += status == "REVOKED"
        kinds["retried"] += seen.retried
        kinds["pending"] += status in _PENDING
        if status in TERMINAL:
            kinds["finished"] += 1
            if seen.runtime is not None:
                self.runtimes.append(seen.runtime)
        if seen.queued is not None:
            self.queued.append(seen.queued)
        self._span(seen.stamp, seen.stamp)

    def merge(self, other: Count) -> None:
        self.total += other.total
        for name, number in other.kinds.items():
            self.kinds[name] += number
        self.runtimes += other.runtimes
        self.queued += other.queued
        self._span(other.first, other.last)

    def _span(self, first: float | None, last: float | None) -> None:
        if first is not None and (self.first is None or first < self.first):
            self.first = first
        if last is not None and (self.last is None or last > self.last):
            self.last = last

    def figures(self) -> dict[str, Any]:
        """As ``ResultStore.get_statistics`` tells them, but for ``torn_lines``."""
        kinds, ended = self.kinds, self.kinds["completed"] + self.kinds["failed"]
        span = self.last - self.first if self.first is not None and self.last is not None else 0.0
        return {
            "total_tasks": self.total,
            "completed": kinds["completed"],
            "failed": kinds["failed"],
            "success_rate": 100.0 * kinds["completed"] / ended if ended else 0.0,
            "lost": kinds["lost"],
            "revoked": kinds["revoked"],
            "retried": kinds["retried"],
            "running": self.total - kinds["finished"] - kinds["pending"],
            "pending": kinds["pending"],
            **_times("runtime", sorted(self.runtimes)),
            **_times("queueing", sorted(self.queued)),
            "first_timestamp": None if self.first is None else iso(self.first),
            "last_timestamp": None if self.last is None else iso(self.last),
            "throughput": kinds["finished"] / span if span > 0 else 0.0,
        }


def counted(
    tasks: Iterable[Seen], by: Sequence[str], after: float = -math.inf, before: float = math.inf
) -> list[dict[str, Count]]:
    """What those come to that were last told of between two times, in groups of each kind that is asked for."""
    found: list[dict[str, Count]] = [{} for _ in by]
    kinds = [(GROUPS[name], groups) for name, groups in zip(by, found, strict=True)]
    for seen in tasks:
        if after <= seen.stamp <= before:
            for group_of, groups in kinds:
                name = group_of(seen)
                if (count := groups.get(name)) is None:
                    count = groups[name] = Count()
                count.add(seen)
    return found


def _times(what: str, ordered: list[float]) -> dict[str, float | None]:
    return {
        f"mean_{what}": sum(ordered) / len(ordered) if ordered else None,
        f"p50_{what}": _percentile(ordered, 0.50),
        f"p95_{what}": _percentile(ordered, 0.95),
        f"p99_{what}": _percentile(ordered, 0.99),
        f"max_{what}": ordered[-1] if ordered else None,
    }


def _percentile(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def iso(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="microseconds")
