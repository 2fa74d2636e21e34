"""What of each record tells what has become of its task, read as fast as that goes here.

Owns the quick way over large files: pieces of some hundred kilobytes, decoded at once by msgspec, which skips what it
is not asked for (4 us a line; regular expressions took 16 here). Whatever does not decode so is left to
:mod:`mpworker.results.reader`, line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from mpworker.results.reader import Tally, read_line
from mpworker.results.record import Glance

#: Bytes that are read at once: they stay in the processor's cache while they are searched.
_PIECE = 1 << 19

_decoder = msgspec.json.Decoder(Glance)
#: What bytes that are no such line raise.
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Piece(NamedTuple):
    """Whole lines of a file; the last one of the file may lack its newline. Valid until the next is asked for."""

    buffer: bytearray
    #: of :attr:`buffer` that are used
    size: int
    #: where in the file they begin
    offset: int


def pieces(path: Path, start: int = 0, end: int | None = None) -> Iterator[Piece]:
    """A file, or a part of it that begins with a line: the lines that begin before ``end``, piece by piece."""
    buffer, kept, offset = bytearray(_PIECE), 0, start
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return  # rotated away meanwhile
    with file:
        file.seek(start)
        while end is None or offset < end:
            if kept == len(buffer):
                buffer.extend(bytes(len(buffer)))  # a long line
            with memoryview(buffer) as view:
                got = file.readinto(view[kept:]) or 0
            last = not got
            kept += got
            size = kept if last else buffer.rfind(b"\n", 0, kept) + 1
            if end is not None and offset + size >= end:  # no further than the line that begins before the end
                size = (buffer.find(b"\n", max(0, end - offset - 1), size) + 1) or size
                last = True
            if size:
                yield Piece(buffer, size, offset)
                buffer[: kept - size] = buffer[size:kept]
                offset, kept = offset + size, kept - size
            if last:
                return


def read_glances(path: Path, tally: Tally, start: int = 0, end: int | None = None) -> Iterator[tuple[Glance, int]]:
    """Every whole record of a file, and its offset; what is broken is skipped and counted."""
    tally.end = start
    for piece in pieces(path, start, end):
        yield from glances_of(piece, path, tally)


def glances_of(piece: Piece, path: Path, tally: Tally) -> Iterator[tuple[Glance, int]]:
    """The records of one piece."""
    buffer, size, offset = piece
    lines = buffer.count(b"\n", 0, size)
    if buffer[size - 1] == 10:
        try:
            with memoryview(buffer) as view:
                found = _decoder.decode_lines(view[:size])
        except _BROKEN:
            found = []
        if len(found) == lines:
            at = 0
            for glance in found:
                start, at = at, buffer.find(b"\n", at, size) + 1
                tally.end = offset + at
                yield glance, offset + start
            return
    at = 0
    while at < size:
        after = buffer.find(b"\n", at, size) + 1 or size
        yield from glance_at(bytes(buffer[at:after]), path, offset + at, tally)
        at = after


def glance_at(line: bytes, path: Path, offset: int, tally: Tally) -> Iterator[tuple[Glance, int]]:
    """The record of one line, if there is a whole one."""
    if line.endswith(b"}\n"):
        try:
            yield _decoder.decode(line), offset
        except _BROKEN:
            pass
        else:
            tally.end = offset + len(line)
            return
    for entry in read_line(line, path, offset, tally):
        yield Glance.at(entry.record), entry.offset
