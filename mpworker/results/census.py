"""Counts the tasks of journals that are too large to note each of them in memory.

Owns the two passes: the first sorts what is said of tasks into files beside, so that all that is said of one task is in
one of them; the second counts these, one by one. Both by as many processes as help. In memory are the tasks of one such
file for each process, and the run times. What counts of a task, :mod:`mpworker.results.tasks` says.
"""

from __future__ import annotations

import marshal
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from mpworker.errors import StoreError
from mpworker.results.glance import glances_of, pieces
from mpworker.results.reader import Tally
from mpworker.results.scan import Map, Part, mapping
from mpworker.results.tasks import Count, Seen, counted, put, seen_of

#: Bytes of journals whose tasks share a file, and how many such files there are at most.
_SHARE, _MOST = 32 << 20, 512
_LENGTH = 8

#: A task's id, and what there is of :class:`Seen` but for its place.
_Row = tuple[str, float, str, str | None, float | None, float | None, bool, bool, str, bool]
_NOWHERE = Path()


def census(parts: list[Part], by: Sequence[str], after: float, before: float) -> list[dict[str, Count]]:
    """What the tasks come to that were last told of between two times, in groups.

    Args:
        parts: all that is said of the tasks.
        by: keys of :data:`mpworker.results.tasks.GROUPS`; there is an answer for each.
        after, before: seconds since the epoch.

    Raises:
        StoreError: there is no room for what is written beside.
    """
    try:
        return _census(parts, by, after, before)
    except OSError as exc:
        raise StoreError(f"cannot sort the journal in {tempfile.gettempdir()}: {exc.strerror or exc}") from exc


def _census(parts: list[Part], by: Sequence[str], after: float, before: float) -> list[dict[str, Count]]:
    buckets = max(1, min(_MOST, sum(part.end - part.start for part in parts) // _SHARE))
    totals: list[dict[str, Count]] = [{} for _ in by]
    with tempfile.TemporaryDirectory(prefix="mpworker-") as folder, mapping(parts) as each:
        paths = [Path(folder, str(number)) for number in range(buckets)]
        _sort(each, parts, paths)
        whole = [Part(path, 0, path.stat().st_size) for path in paths]
        for groups in each(partial(_count, by=by, after=after, before=before), whole):
            for total, found in zip(totals, groups, strict=True):
                for name, count in found.items():
                    total.setdefault(name, Count()).merge(count)
    return totals


def _sort(each: Map, parts: list[Part], paths: list[Path]) -> None:
    """The parts come in their order, so what is said of a task stays in its own."""
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600) for path in paths]
    try:
        for chunks in each(partial(_split, buckets=len(paths)), parts):
            for fd, chunk in zip(fds, chunks, strict=True):
                with open(fd, "ab", closefd=False) as file:
                    file.write(len(chunk).to_bytes(_LENGTH) + chunk)
    finally:
        for fd in fds:
            os.close(fd)


def _split(part: Part, buckets: int) -> list[bytes]:
    rows: list[list[_Row]] = [[] for _ in range(buckets)]
    for piece in pieces(*part):
        for glance, _ in glances_of(piece, part.path, Tally()):
            seen = seen_of(glance, _NOWHERE, 0)
            if seen is not None:
                row = (glance.task_id, *seen[:5], *seen[7:])
                rows[zlib.crc32(glance.task_id.encode(errors="surrogatepass")) % buckets].append(row)
    return [marshal.dumps(some) for some in rows]


def _count(part: Part, by: Sequence[str], after: float, before: float) -> list[dict[str, Count]]:
    tasks: dict[str, Seen] = {}
    for rows in _rows(part.path):
        for task_id, stamp, status, name, runtime, queued, fixed, retried, worker, lost in rows:
            seen = Seen(stamp, status, name, runtime, queued, _NOWHERE, 0, fixed, retried, worker, lost)
            put(tasks, task_id, seen)
    return counted(tasks.values(), by, after, before)


def _rows(path: Path) -> Iterator[list[_Row]]:
    with path.open("rb") as file:
        while length := file.read(_LENGTH):
            yield marshal.loads(file.read(int.from_bytes(length)))  # nobody else writes into that folder
