"""The last of what a job has said, in memory that outlives its process: a ring behind the rest of a worker's page.

Owns the ring's layout. The worker writes; who reads may be the parent, while the job runs or after its process was
killed, at whatever instant. Knows nothing of what is written.
"""

from __future__ import annotations

import mmap

# Cells of 8 bytes: whose job, and how much of it has been written.
_JOB, _WRITTEN = range(2)
_HEAD = 16
#: Bytes that are written at once: so much of what is oldest may be damaged if that is cut short, and is never read.
_PIECE = 4096


def size_for(kept: int) -> int:
    """Bytes of memory that it takes to keep so many; 0 for 0."""
    return _HEAD + kept + _PIECE if kept else 0


class Tail:
    """One worker's ring.

    Args:
        memory: the page; the ring is all that begins at ``start``.
    """

    def __init__(self, memory: mmap.mmap, start: int) -> None:
        self._memory, self._start, self._size = memory, start + _HEAD, len(memory) - start - _HEAD
        #: bytes that can be read again
        self.kept = self._size - _PIECE
        self._cells = memoryview(memory)[start : start + _HEAD].cast("Q")

    def begin(self, job: int) -> None:
        """What is written from here on is this job's."""
        cells = self._cells
        cells[_JOB] = cells[_WRITTEN] = 0
        cells[_JOB] = job

    def write(self, data: bytes) -> None:
        """Adds to what the job has said."""
        memory, start, size, written = self._memory, self._start, self._size, self._cells[_WRITTEN]
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            place = written % size
            first = piece[: size - place]
            memory[start + place : start + place + len(first)] = first
            memory[start : start + len(piece) - len(first)] = piece[len(first) :]
            self._cells[_WRITTEN] = written = written + len(piece)  # from here on it counts

    def read(self, job: int) -> bytes:
        """The last bytes of what this job has said; none if another one has begun since."""
        if not job or self._cells[_JOB] != job:
            return b""
        memory, start, size, written = self._memory, self._start, self._size, self._cells[_WRITTEN]
        length = min(written, self.kept)
        place = (written - length) % size
        first = memory[start + place : start + min(place + length, size)]
        data = first + memory[start : start + length - len(first)]
        while data and written > length and data[0] & 0xC0 == 0x80:  # UTF-8: the rest of a character
            data = data[1:]
        return data if self._cells[_JOB] == job else b""

    def close(self) -> None:
        self._cells.release()
