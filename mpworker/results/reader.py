"""Reads journal files: every whole record, whatever else stands in the files.

Owns what counts as torn and how to go on behind it. Never writes, never judges what a record means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mpworker.results.record import OPENING, OPENING_LINE, SHIPPED, SHIPPED_AT, SUPERSEDED, Record

#: What reading a broken line may raise.
_BROKEN = (ValueError, TypeError, RecursionError)


class Entry(NamedTuple):
    """A record and where it stands: its file, and the offset of its first byte."""

    record: Record
    path: Path
    offset: int


@dataclass(slots=True)
class Tally:
    """What a reader passed over, and how far it came."""

    #: broken lines
    torn: int = 0
    #: broken lines without a newline at the end of a file: perhaps still being written
    unfinished: int = 0
    #: offset behind the last line of the current file that is finished
    end: int = 0


def read_entries(paths: Iterable[Path], tally: Tally | None = None, *, unshipped: bool = False) -> Iterator[Entry]:
    """Every whole record in these files, file by file; what is broken is skipped and counted.

    Args:
        unshipped: only records that Redis has not got; the others are passed over unread.
    """
    tally = Tally() if tally is None else tally
    for path in paths:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            continue  # rotated away meanwhile
        with file:
            yield from read_open(file, path, tally, unshipped=unshipped)


def read_open(file: BinaryIO, path: Path, tally: Tally, start: int = 0, *, unshipped: bool = False) -> Iterator[Entry]:
    """As :func:`read_entries`, of one open file from the start of one of its lines on."""
    file.seek(start)
    yield from read_lines(file, path, tally, start, unshipped=unshipped)


def read_lines(
    lines: Iterable[bytes], path: Path, tally: Tally, start: int, *, unshipped: bool = False
) -> Iterator[Entry]:
    """The same of lines that begin there, up to one that has no end."""
    tally.end = offset = start
    for line in lines:
        if unshipped and _is_shipped(line):
            tally.end = offset + len(line)
        else:
            yield from read_line(line, path, offset, tally)
        offset += len(line)
        if not line.endswith(b"\n"):
            # Perhaps a record that is being written at this moment: its rest, which the next read might bring, must
            # not be taken for a line of its own.
            break


def _is_shipped(line: bytes) -> bool:
    """By its digit alone. Half a line with another one glued to it, or of another version, wants a closer look."""
    known = line.startswith(OPENING_LINE) and line.endswith(b"\n") and line.rfind(OPENING) == 0
    return known and line[SHIPPED_AT : SHIPPED_AT + 1] in (SHIPPED, SUPERSEDED)


def read_line(line: bytes, path: Path, offset: int, tally: Tally) -> Iterator[Entry]:
    """The record of one line, if there is a whole one in it."""
    end = offset + len(line)
    if not line.strip():
        tally.end = end
        return
    # Half a line may have a whole one glued to it: the writer of the first was killed before its newline.
    glued = max(line.rfind(OPENING), 0)
    for at in (0, glued) if glued else (0,):
        try:
            record = Record.from_line(line[at:])
        except _BROKEN:
            continue
        tally.torn += at > 0
        tally.end = end
        yield Entry(record, path, offset + at)
        return
    if line.endswith(b"\n"):
        tally.torn += 1
        tally.end = end
    else:
        tally.unfinished += 1


def read_at(file: BinaryIO, offset: int) -> Record | None:
    """The record that begins there; ``None`` when it is gone or broken."""
    try:
        file.seek(offset)
        return Record.from_line(file.readline())
    except (OSError, *_BROKEN):
        return None
