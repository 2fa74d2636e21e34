"""Large bodies as descriptors: memory that is written once and passed on, so that nobody between the ends copies it.

Owns the layout of what lies there, how it is made, passed and opened, and when the bytes travel after all: where the
system has no such descriptors, or few are left, or no memory for one. Never decides who gets a body: it goes where its
frame goes, and is closed when nobody has it any more.

A frame names the descriptor that belongs to it by a ticket, so that neither a read that brings half of something nor a
descriptor that got lost can give one job what is another's. What has arrived is believed only after a look: memory,
all of it there, of the size that was said, and sealed, so that nobody can take it away or change it any more.

    mark · checksum · two numbers of lengths · lengths · pickle stream · buffers, each at a multiple of 64 bytes

Large strings of bytes within the stream have lengths of their own. The checksum covers everything but their contents
and the buffers: :mod:`pickle` never sees a length that was not written, and 10 MB are not read twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pickle
import resource
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

from mpworker.errors import PayloadError

#: Bodies from here on travel as descriptors. Below, two more system calls and a mapping cost more than the copies.
LARGE = 1 << 17
#: What :mod:`pickle` writes in one piece from here on (its FRAME_SIZE_TARGET); smaller buffers go into the stream.
APART = 1 << 16
#: Descriptors of this process that may be bodies …
_MOST = 256
#: … and the part of all that it may have which may be taken when one is made, and when one has arrived: a number tells,
#: because the kernel always gives the lowest one that is free.
_TO_MAKE, _TO_KEEP = 0.5, 0.75
#: A buffer that is at least this part of its body stays where it is; whoever keeps a smaller one keeps a copy of it.
_WORTHY = 1 / 8
#: What is laid out begins with that, and a pickle never does.
FIRST = b"\0"
_MARK = FIRST + b"body\0\0\0"
_HEAD = struct.Struct("<8sIII4x")
_TICKET = struct.Struct("<QQ")
TICKET_SIZE = _TICKET.size
_ALIGNMENT = 64
_MOST_PIECES = 1000  # in one writev
_MOST_BYTES = 1 << 30  # in one pread
_NEEDED = ("F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")
_SEALS = sum(getattr(fcntl, name, 0) for name in _NEEDED)
_CAN = hasattr(os, "memfd_create") and all(hasattr(fcntl, name) for name in _NEEDED)
#: Descriptors that are bodies, and the object each belongs to.
_alive: dict[int, int] = {}


class Bulk(bytes):
    """A body that lies in a descriptor. As bytes it is the ticket; its length is that of the body.

    The descriptor is closed with it; -1 if it got lost on its way here.
    """

    fd: int
    size: int

    def __new__(cls, ticket: bytes, fd: int) -> Bulk:
        self = super().__new__(cls, ticket)
        self.fd, self.size = fd, _TICKET.unpack(ticket)[1]
        if fd >= 0:
            _alive[fd] = id(self)
        return self

    def __len__(self) -> int:
        return self.size

    def __reduce__(self) -> Any:
        raise TypeError("a body cannot be pickled")

    def close(self) -> None:
        """For whoever knows that nobody else has it."""
        fd, self.fd = self.fd, -1
        if fd >= 0 and _alive.get(fd) == id(self):  # else it was abandoned
            del _alive[fd]
            os.close(fd)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never made
            self.close()

    def read(self) -> bytes:
        """The body itself.

        Raises:
            PayloadError: it got lost.
        """
        if self.fd < 0:
            raise PayloadError("its descriptor could not be received, this process has too many open ones")
        pieces, at = [], 0
        while at < self.size:
            pieces.append(os.pread(self.fd, min(_MOST_BYTES, self.size - at), at))
            at += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def abandon() -> None:
    """In a fork: these belong to the process it was forked from."""
    for fd in _alive:
        os.close(fd)
    _alive.clear()


# -- making ------------------------------------------------------------------------------------------------------------


class _Chunks(list[Any]):
    """A file for :mod:`pickle`: keeps what is written. Large strings of bytes are kept as they are, not copied."""

    write = list.append


def pickled(obj: Any, large: bool) -> tuple[Sequence[bytes], list[memoryview]]:
    """Pickles ``obj``; raises whatever that raises.

    Args:
        large: something in it is, so that copying it is worth being avoided.

    Returns:
        the stream in pieces, and large buffers that do not lie in it.
    """
    buffers: list[memoryview] = []

    def into_stream(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not in one piece: pickle says so itself
            return True
        if len(view) < APART:
            return True
        buffers.append(view)
        return False

    if not large:
        return (pickle.dumps(obj, pickle.HIGHEST_PROTOCOL, buffer_callback=into_stream),), buffers
    chunks = _Chunks()
    pickle.Pickler(chunks, pickle.HIGHEST_PROTOCOL, buffer_callback=into_stream).dump(obj)
    return chunks, buffers


def lay_out(chunks: Sequence[bytes], buffers: Sequence[memoryview]) -> bytes:
    """What :func:`load` reads.

    Args:
        chunks, buffers: from :func:`pickled`.

    Returns:
        a descriptor of it; bytes if it is small, or if there is no descriptor to be had.
    """
    lengths, checked = [0], []  # of pieces of the stream: what the checksum covers and what not, in turn
    before = b""
    for chunk in chunks:
        if _announced(len(chunk), before):
            lengths += len(chunk), 0
        else:
            lengths[-1] += len(chunk)
            checked.append(chunk)
        before = chunk
    counts = len(lengths), len(buffers)
    table = struct.pack(f"<{sum(counts)}Q", *lengths, *map(len, buffers))
    at = _HEAD.size + len(table) + sum(lengths)
    pieces: list[bytes | memoryview] = [b"", table, *chunks]
    for buffer in buffers:
        pieces += bytes(-at % _ALIGNMENT), buffer
        at += -at % _ALIGNMENT + len(buffer)
    checksum = crc32(table, crc32(struct.pack("<II", *counts)))
    for chunk in checked:
        checksum = crc32(chunk, checksum)
    pieces[0] = _HEAD.pack(_MARK, checksum, *counts)
    return (_make(pieces) if at >= LARGE else None) or b"".join(pieces)


def _announced(length: int, before: bytes) -> bool:
    """Whether a piece of that length is the contents of what :mod:`pickle` has just written the head of."""
    if length < APART or type(before) is not bytes:
        return False
    return before.endswith((length.to_bytes(8, "little"), (length & 0xFFFFFFFF).to_bytes(4, "little")))


def _make(pieces: Iterable[bytes | memoryview]) -> Bulk | None:
    if not _CAN or len(_alive) >= _MOST:
        return None
    try:
        fd = os.memfd_create("mpworker-body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    try:
        if not _is_scarce(fd, _TO_MAKE):
            _write(fd, pieces)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
            status = os.fstat(fd)
            body = Bulk(_TICKET.pack(status.st_ino, status.st_size), fd)
            fd = -1
            return body
    except OSError:  # no memory, or a limit of the size of files
        pass
    finally:
        if fd >= 0:
            os.close(fd)
    return None


def _write(fd: int, pieces: Iterable[bytes | memoryview]) -> None:
    views = [memoryview(piece) for piece in pieces if len(piece)]
    at = 0
    while at < len(views):
        written = os.writev(fd, views[at : at + _MOST_PIECES])
        while at < len(views) and written >= len(views[at]):
            written -= len(views[at])
            at += 1
        if written:
            views[at] = views[at][written:]


def _is_scarce(fd: int, share: float) -> bool:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit != resource.RLIM_INFINITY and fd >= limit * share


# -- arriving ----------------------------------------------------------------------------------------------------------


class Place:
    """Where few descriptors are left, one that is kept to be given up when another may arrive, which were lost else.

    Only for a process with one thread, of which every descriptor is shown to :meth:`look`.
    """

    def __init__(self) -> None:
        #: few are left
        self.needed = False
        self._fd = -1

    def look(self, fd: int) -> None:
        """Sees by a number that the kernel has just given how many are left."""
        self.needed = self.needed or _is_scarce(fd, _TO_KEEP)

    def give_up(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def take(self) -> None:
        with contextlib.suppress(OSError):  # what has arrived has taken it, and is about to be read and closed
            self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            self.needed = _is_scarce(self._fd, _TO_KEEP)
            if not self.needed:
                self.give_up()


class Arrivals:
    """Bodies that have come on a line and wait for their frames."""

    def __init__(self) -> None:
        self._there: list[Bulk] = []
        #: descriptors that this process had no room for
        self.lost = 0
        #: of each body that a frame has asked for: whether it got lost; emptied by whoever wants to know
        self.claimed: list[bool] = []

    def keep(self, fd: int) -> bool:
        """Takes a descriptor.

        Returns:
            ``False`` if it is none of a body; then it is still the caller's.
        """
        try:
            if not _CAN or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                return False
            status = os.fstat(fd)
        except OSError:  # not even memory
            return False
        if status.st_blocks * 512 < status.st_size:  # a hole would have to be filled by whoever looks
            return False
        # One may wait for the rest of its frame while the next one comes; any other is nobody's.
        del self._there[:-1]
        self._there.append(Bulk(_TICKET.pack(status.st_ino, status.st_size), fd))
        return True

    def claim(self, ticket: bytes) -> bytes | None:
        """The body that belongs to a frame, if it is there."""
        for at, body in enumerate(self._there):
            if body == ticket:
                del self._there[: at + 1]
                self.claimed.append(False)
                return body.read() if _is_scarce(body.fd, _TO_KEEP) else body
        if not self.lost:
            return None
        self.lost -= 1
        self.claimed.append(True)
        return Bulk(ticket, -1)


# -- opening -----------------------------------------------------------------------------------------------------------


def load(body: bytes) -> Any:
    """Unpickles what :func:`lay_out` wrote; large buffers in a descriptor are not copied, and may be written to.

    Raises:
        PayloadError: it got lost on its way, or has been damaged; nothing of it was unpickled.
    """
    mapping = _mapped(body) if type(body) is Bulk else None
    view = memoryview(mapping if mapping is not None else body.read() if type(body) is Bulk else body)
    stream, buffers = _parts(view)
    least = len(view) * _WORTHY
    stay = [mapping is not None and len(buffer) >= least for buffer in buffers]
    return pickle.loads(
        stream, buffers=[buffer if stays else bytearray(buffer) for buffer, stays in zip(buffers, stay, strict=True)]
    )


def _mapped(body: Bulk) -> mmap.mmap | None:
    """A mapping of its own, so that what is written there is seen by nobody else."""
    if body.fd < 0:
        return None
    try:
        if sys.version_info >= (3, 13):
            return mmap.mmap(body.fd, body.size, access=mmap.ACCESS_COPY, trackfd=False)
        return mmap.mmap(body.fd, body.size, access=mmap.ACCESS_COPY)
    except OSError:  # it would need a descriptor, or there are too many mappings
        return None


def _parts(view: memoryview) -> tuple[memoryview, list[memoryview]]:
    """The stream and the buffers, once everything that :mod:`pickle` believes has been found sound."""
    size, buffers = len(view), []
    try:
        mark, checksum, pieces, others = _HEAD.unpack_from(view)
        start = at = _HEAD.size + 8 * (pieces + others)
        lengths = struct.unpack_from(f"<{pieces + others}Q", view, _HEAD.size) if at <= size else ()
    except struct.error:
        mark, lengths = b"", ()
    if mark != _MARK or not lengths:
        raise PayloadError(f"its {size} bytes are damaged, they are no body")
    found = crc32(view[_HEAD.size : start], crc32(struct.pack("<II", pieces, others)))
    for number, length in enumerate(lengths[:pieces]):
        if not number % 2:
            found = crc32(view[at : at + length], found)
        at += length
    stream = view[start:at]
    for length in lengths[pieces:]:
        at += -at % _ALIGNMENT
        buffers.append(view[at : at + length])
        at += length
    if at != size or found != checksum:
        raise PayloadError(f"its {size} bytes are damaged, the checksum is wrong")
    return stream, buffers
