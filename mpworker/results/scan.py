"""A filter over journals that are too large to be kept in mind: two looks at the files, by as many processes as help.

Owns the search. The first look finds the lines that fit, the second all that is said of their tasks, so that only what
is true now is told; what stays in memory is bounded by :data:`MOST`, however large the files are. Judges no record:
which of a task's counts, :mod:`mpworker.results.query` says.
"""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mpworker.results.glance import Piece, glance_at, glances_of, pieces
from mpworker.results.reader import Tally
from mpworker.results.record import OPENING_LINE, Glance, aliases, canonical
from mpworker.results.tasks import iso

#: Lines that fit, kept in one round at most; a second round finds the next ones.
MOST = 50_000
#: Bytes of a file that one process looks through at a time, and from where on more processes are worth their start.
_PART, _MANY = 16 << 20, 64 << 20
_STRING = rb'"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"'
_TASK_ID = re.compile(rb'"task_id' + _STRING)
_TIMESTAMP = re.compile(rb'"timestamp":"([^"]*)"')
_WILD = re.compile(r"[*?\[]")

#: When, in which file, and where in it: the order in which records are told.
Key = tuple[float, str, int]
Map = Callable[[Callable[["Part"], Any], Iterable["Part"]], Iterable[Any]]


class Part(NamedTuple):
    """Lines of a file that begin between two offsets."""

    path: Path
    start: int
    end: int


class Wanted(NamedTuple):
    """What a record must be. Names are patterns; a state is canonical; times are seconds since the epoch."""

    status: str | None
    name: str | None
    task_id: str | None
    worker: str | None
    after: float
    before: float

    def fits(self, task_id: str, status: str, name: str | None, worker: str, stamp: float) -> bool:
        """Whether this is such a task; its name may be known to another of its records only."""
        return (
            (self.status is None or canonical(status) == self.status)
            and self.after <= stamp <= self.before
            and (self.task_id is None or fnmatchcase(task_id, self.task_id))
            and (self.worker is None or fnmatchcase(worker, self.worker))
            and (self.name is None or name is None or fnmatchcase(name, self.name))
        )

    def needle(self) -> re.Pattern[bytes] | None:
        """What each line that fits holds, if that is rare: lines without it need not be decoded."""
        if self.status is not None:
            words = "|".join(re.escape(json.dumps(word)[1:-1]) for word in aliases(self.status))
            return re.compile(rb'"status"\s*:\s*"\s*(?i:' + words.encode() + rb')\s*"')
        for field, pattern in (("task_id", self.task_id), ("name", self.name)):
            literal = json.dumps(_WILD.split(pattern)[0])[1:-1] if pattern else ""
            if literal:
                nothing = rb"|null" if field == "name" else b""
                return re.compile(rb'"%s"\s*:\s*(?:"%s%s)' % (field.encode(), re.escape(literal.encode()), nothing))
        return None


def parts_of(paths: Iterable[Path]) -> list[Part]:
    """The files in parts of some megabytes, each from one line's beginning to another's."""
    found = []
    for path in paths:
        try:
            with path.open("rb") as file:
                size, start = os.fstat(file.fileno()).st_size, 0
                while start < size:
                    file.seek(min(start + _PART, size))
                    file.readline()
                    found.append(Part(path, start, start := file.tell()))
        except FileNotFoundError:
            continue  # rotated away meanwhile
    return found


@contextmanager
def mapping(parts: list[Part]) -> Iterator[Map]:
    """What applies a function to all parts, in their order: with more processes where that helps and is safe."""
    if sum(part.end - part.start for part in parts) > _MANY:
        from mpworker.pool.cpus import pool_size
        from mpworker.pool.executor import ProcessPool
        from mpworker.pool.forking import risk_of_forking

        if (size := min(pool_size(), len(parts))) > 1 and not risk_of_forking():
            with ProcessPool(size, start_method="fork") as pool:
                yield partial(pool.map, chunksize=1, buffersize=2 * size)
                return
    yield map


class Order(NamedTuple):
    """Which of the lines that fit a round looks for, in the order of time or against it."""

    newest: bool
    #: how many
    most: int
    #: only lines that come after this one
    behind: Key | None = None
    #: … and none that come after this time, in seconds since the epoch: enough that come before it have been found
    bound: float | None = None

    def first(self, found: list[tuple[Key, str]]) -> list[tuple[Key, str]]:
        return (heapq.nlargest if self.newest else heapq.nsmallest)(self.most, found)

    def takes(self, key: Key) -> bool:
        return self.behind is None or (key < self.behind if self.newest else key > self.behind)


def candidates(each: Map, parts: list[Part], wanted: Wanted, order: Order) -> list[tuple[Key, str]]:
    """The first lines that fit, each with its task's id."""
    first, *others = reversed(parts) if order.newest else parts
    found = _fitting(first, wanted, order)
    if len(found) == order.most:
        order = order._replace(bound=found[-1][0][0])
    for some in each(partial(_fitting, wanted=wanted, order=order), others):
        found = order.first(found + some)
    return found


def _fitting(part: Part, wanted: Wanted, order: Order) -> list[tuple[Key, str]]:
    needle, found = wanted.needle(), []
    for piece in pieces(*part):
        # A line that somebody else has written may not mention a name at all, and tells its time in its own way.
        is_ours = (wanted.name is not None or order.bound is not None) and _is_ours(piece)
        if is_ours and order.bound is not None and _is_beyond(piece, order, order.bound):
            continue
        if needle is not None and (is_ours or wanted.name is None):
            glances = _lines_of(piece, part, needle.finditer(piece.buffer, 0, piece.size))
        else:
            glances = glances_of(piece, part.path, Tally())
        for glance, offset in glances:
            if glance.superseded or glance.chord:
                continue
            try:
                stamp = datetime.fromisoformat(glance.timestamp).timestamp()
            except ValueError:
                continue
            key = stamp, str(part.path), offset
            told = glance.task_id, glance.status, glance.name, glance.hostname, stamp
            if order.takes(key) and wanted.fits(*told):
                found.append((key, glance.task_id))
        if len(found) > 2 * order.most:
            found = order.first(found)
    return order.first(found)


def _is_beyond(piece: Piece, order: Order, bound: float) -> bool:
    """Whether no line of our own is of a time that is looked for. In such lines text sorts as time does."""
    stamps = _TIMESTAMP.findall(piece.buffer, 0, piece.size)
    edge = iso(bound).encode()
    return not stamps or (max(stamps) < edge if order.newest else min(stamps) > edge)


def _is_ours(piece: Piece) -> bool:
    """Whether each line is as :class:`Record` writes it."""
    buffer, size, _ = piece
    lines = buffer.count(b"\n", 0, size) + (buffer[size - 1] != 10)
    return buffer.count(b"\n" + OPENING_LINE, 0, size) + buffer.startswith(OPENING_LINE, 0, size) == lines


def records_of(each: Map, parts: list[Part], ids: frozenset[str]) -> Iterator[tuple[Glance, Path, int]]:
    """All records of these tasks, in the order in which they were written."""
    needles = frozenset(json.dumps(task_id)[1:-1].encode() for task_id in ids)
    for some in each(partial(_about, needles=needles), parts):
        yield from some


def _about(part: Part, needles: frozenset[bytes]) -> list[tuple[Glance, Path, int]]:
    found = []
    for piece in pieces(*part):
        matches = (match for match in _TASK_ID.finditer(piece.buffer, 0, piece.size) if match[1] in needles)
        found += [(glance, part.path, offset) for glance, offset in _lines_of(piece, part, matches)]
    return found


def _lines_of(piece: Piece, part: Part, matches: Iterable[re.Match[bytes]]) -> Iterator[tuple[Glance, int]]:
    """The records of the lines in which something has been found, each once."""
    buffer, size, offset = piece
    seen = 0
    for match in matches:
        if match.start() < seen:
            continue
        start = buffer.rfind(b"\n", 0, match.start()) + 1
        seen = buffer.find(b"\n", match.end(), size) + 1 or size
        yield from glance_at(bytes(buffer[start:seen]), part.path, offset + start, Tally())
