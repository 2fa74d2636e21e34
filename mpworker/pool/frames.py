"""What crosses a pipe: a small fixed header and two opaque byte strings.

Owns the layout of a frame, the incremental reader and the outbox that never blocks. Never looks inside a payload.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from socket import recv_fds, socket
from typing import NamedTuple
from zlib import crc32

from mpworker.errors import ProtocolError

# magic, kind, flag, extra length, job, a, b, body length; then the checksum of these bytes.
_HEADER = struct.Struct("<HBBIQddQ")
_CHECKED = struct.Struct("<HBBIQddQI")
HEADER_SIZE = _CHECKED.size
_UNCHECKED = _HEADER.size
_START = struct.Struct("<dd")
_MAGIC = 0x6D77
#: A body is never larger than this; a larger length is corruption.
MAX_BODY = 1 << 40
#: Seconds that one wait may take: the kernel's own limit is 24 days, and whoever waits looks again.
LONGEST_WAIT = 3600.0
#: What one ``recv`` may bring. From 128 KB on, the buffer that ``recv`` makes would be mapped and unmapped each time,
#: which costs more than the system call.
CHUNK = 1 << 16
_JOIN_BELOW = 1 << 16


class Kind(IntEnum):
    """What a frame says. The comment names the meaning of its fields where it uses them."""

    # parent → dispatcher
    # BOOT's flag tells a dispatcher whether one before it had ready workers, and a template whether to preload.
    BOOT = 1  # flag, extra: dispatcher options (JSON), body: what children need (opaque)
    SUBMIT = 2  # job, flag: lane and outcome kind, a: soft limit, b: hard limit, extra: hooks, body: call or outcome
    CANCEL = 3  # job, flag: signal, a: seconds until SIGKILL follows (0: never)
    RESIZE = 4  # job: number of workers
    FLUSH = 5  # job: token; take back what has not started
    DRAIN = 6  # nothing more will be submitted: finish all, then end
    STOP = 7  # end now
    MEMORY = 8  # job that is submitted next, a: memory limit in bytes
    BUNDLE = (
        9  # job: the first of several, a: soft limit, b: hard limit, extra: lengths, body: calls; goes to a worker, too
    )
    # dispatcher → worker
    JOB = 10  # job, flag: BATCHED or not, and for a callback the outcome kind, a: soft limit, b: hard limit
    LEAVE = 11
    TURN = 14  # job: the slot of a worker that was started without one
    # dispatcher → watchdog
    SIGNAL = 12  # job, flag: signal
    SHRINK = 13  # job, a: memory limit in bytes, b: how much it has been seen to use
    # template and worker → dispatcher
    HELLO = 19  # job: pid; the very first word
    READY = 20  # a: number of native threads
    UNREADY = 21  # body: why (text)
    # worker → dispatcher → parent
    STARTED = 30  # job, flag: -, a: time.monotonic() of the start, b: pid
    SOFT = 31  # job, a: soft limit
    EXPIRED = 32  # job, a: hard limit, body: where the task was (text)
    CALL = 33  # job, flag: outcome kind, extra: hooks, body: outcome; runs when the job is done
    DONE = (
        34  # job, flag: outcome kind, a: run time, b: peak memory in bytes, body: outcome; extra: its start, if untold
    )
    RETURNED = 35  # job: one that was not started
    RESULTS = 38  # of several jobs: see mpworker.pool.page
    PROGRESS = 36  # job, a: done, b: total, body: message (text); may be left out at any time
    CUT = 39  # job, body: what is known of it, for the parent; it will not begin the rest of its items
    KEPT = 37  # a: bytes that jobs have left in this process, until it says otherwise
    # dispatcher → template
    FORK = 40  # job: worker id; two descriptors travel along
    # dispatcher → parent
    ENDED = 50  # job, body: verdict (JSON): killed at a limit, lost, cancelled
    HOOK_ENDED = 51  # job it belongs to, flag: outcome kind, body: outcome of the callback
    WORKERS = 52  # body: JSON of the processes
    LOG = 53  # flag: logging level, body: text
    BROKEN = 54  # body: why the pool cannot go on (text)
    FLUSHED = 55  # job: token
    HOOK_QUEUED = 57  # job it belongs to, flag: outcome kind, extra: hooks, body: outcome
    HOOK_STARTED = 58  # job it belongs to
    BYE = 56  # all is done, nothing follows


#: In the flag of a JOB: it is, or may be, one of several on their way to the same worker.
BATCHED = 0x80
#: Likewise: it has a memory limit.
RATIONED = 0x40

_KINDS = {int(kind): kind for kind in Kind}


class Frame(NamedTuple):
    """One message. What ``flag``, ``job``, ``a`` and ``b`` mean depends on :class:`Kind`."""

    kind: Kind
    job: int = 0
    flag: int = 0
    a: float = 0.0
    b: float = 0.0
    extra: bytes = b""
    body: bytes = b""


def header(kind: Kind, job: int, flag: int, a: float, b: float, extra: int, body: int) -> bytes:
    """The first :data:`HEADER_SIZE` bytes of a frame, for payloads of the given lengths."""
    head = _HEADER.pack(_MAGIC, kind, flag, extra, job, a, b, body)
    return head + crc32(head).to_bytes(4, "little")


def encode(
    kind: Kind, job: int = 0, flag: int = 0, a: float = 0.0, b: float = 0.0, extra: bytes = b"", body: bytes = b""
) -> bytes:
    """A whole frame as one byte string."""
    return header(kind, job, flag, a, b, len(extra), len(body)) + extra + body


def pack_start(at: float, pid: float) -> bytes:
    """What a STARTED frame would say, as the ``extra`` of the DONE of the same job, which spares a frame."""
    return _START.pack(at, pid)


def unpack_start(done: Frame) -> Frame | None:
    """The STARTED frame that travelled in this DONE, if it has one."""
    return Frame(Kind.STARTED, done.job, 0, *_START.unpack(done.extra)) if done.extra else None


class FrameReader:
    """Turns a stream of bytes into frames.

    Memory grows only with bytes that have arrived, never by what a length field claims.

    Args:
        peer: who writes the stream; named in every error.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._pieces: list[bytes] = []  # of a frame that is not complete
        self._have, self._need = 0, HEADER_SIZE

    def feed(self, data: bytes) -> list[Frame]:
        """Takes the next bytes and returns the frames they complete.

        Raises:
            ProtocolError: the bytes are no frame. The stream cannot be read any further. The error
                has the frames that came before them.
        """
        if self._have:
            self._pieces.append(data)
            self._have += len(data)
            if self._have < self._need:
                return []
            data = b"".join(self._pieces)
            self._pieces.clear()
        frames: list[Frame] = []
        position, size, need = 0, len(data), HEADER_SIZE
        while (start := position + HEADER_SIZE) <= size:
            magic, kind, flag, extra, job, a, b, body, checksum = _CHECKED.unpack_from(data, position)
            sound = magic == _MAGIC and kind in _KINDS and body <= MAX_BODY
            if not sound or checksum != crc32(data[position : position + _UNCHECKED]):
                self._pieces, self._have, self._need = [data[position:]], size - position, 0  # it stays broken
                raise ProtocolError(f"{self.peer} sent bytes that are no frame", frames)
            middle = start + extra
            end = middle + body
            if end > size:
                need = end - position
                break
            frames.append(Frame(_KINDS[kind], job, flag, a, b, data[start:middle], data[middle:end]))
            position = end
        self._have, self._need = size - position, need
        if self._have:
            self._pieces.append(data[position:])
        return frames

    @property
    def missing(self) -> int:
        """Bytes that the current frame still lacks, as far as its header tells."""
        return self._need - self._have


class Outbox:
    """Frames on their way to a peer that may be slow: an append never blocks, a flush sends what fits."""

    def __init__(self) -> None:
        self._pieces: deque[bytes | memoryview] = deque()
        self.size = 0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def put(self, *pieces: bytes) -> None:
        """Appends a frame, in one or several pieces. Safe against other threads and signal handlers."""
        self._pieces.extend(pieces)
        self.size += sum(map(len, pieces))

    def put_frame(self, frame: Frame) -> None:
        """Appends a frame; a large body is not copied."""
        kind, job, flag, a, b, extra, body = frame
        head = header(kind, job, flag, a, b, len(extra), len(body))
        if len(body) < _JOIN_BELOW:
            piece = head + extra + body
            self._pieces.append(piece)
            self.size += len(piece)
        else:
            self.put(head + extra, body)

    def flush(self, send: Callable[[bytes | memoryview], int]) -> bool:
        """Sends until all is gone or ``send`` would block. Only one caller at a time.

        Args:
            send: like ``socket.send`` on a non-blocking socket; its errors, but for "would block", pass through.

        Returns:
            ``True`` when nothing is left.
        """
        pieces = self._pieces
        while pieces:
            piece = self._gather()
            try:
                sent = send(piece)
            except (BlockingIOError, InterruptedError):
                pieces.appendleft(piece)
                return False
            self.size -= sent
            if sent < len(piece):
                pieces.appendleft(memoryview(piece)[sent:])
        return True

    def _gather(self) -> bytes | memoryview:
        # Many small frames go out in one system call.
        pieces = self._pieces
        first = pieces.popleft()
        if not pieces or len(first) >= _JOIN_BELOW:
            return first
        batch, size = [first], len(first)
        while pieces and size + len(pieces[0]) <= _JOIN_BELOW:
            piece = pieces.popleft()
            batch.append(piece)
            size += len(piece)
        return b"".join(batch)


def receive_fds(sock: socket) -> tuple[bytes | None, list[int]]:
    """As :func:`receive`, with the descriptors that came along."""
    try:
        data, fds, _, _ = recv_fds(sock, CHUNK, 256)
        return data, fds
    except (BlockingIOError, InterruptedError):
        return None, []
    except ConnectionError:
        return b"", []


def receive(sock: socket) -> bytes | None:
    """One non-blocking read: bytes, ``b""`` at the end of the stream, ``None`` when nothing is there."""
    try:
        return sock.recv(CHUNK)
    except (BlockingIOError, InterruptedError):
        return None
    except ConnectionError:
        return b""
