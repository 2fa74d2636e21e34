"""What crosses a pipe: a small fixed header and two opaque byte strings, the second of which may be a descriptor.

Owns the layout of a frame, the incremental reader and the outbox that never blocks. Never looks inside a payload.
"""

from __future__ import annotations

import errno
import os
import socket as sockets
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum
from socket import socket
from typing import NamedTuple
from zlib import crc32

from mpworker.errors import ProtocolError
from mpworker.pool import bulk
from mpworker.pool.bulk import TICKET_SIZE, Bulk

# magic, kind, flag, extra length, job, a, b, body length; then the checksum of these bytes.
_HEADER = struct.Struct("<HBBIQddQ")
_CHECKED = struct.Struct("<HBBIQddQI")
HEADER_SIZE = _CHECKED.size
_UNCHECKED = _HEADER.size
_START = struct.Struct("<dd")
_MAGIC = 0x6D77
#: Of a frame whose body is the ticket of a descriptor.
_MAGIC_BULK = 0x6D62
#: A body is never larger than this; a larger length is corruption.
MAX_BODY = 1 << 40
#: Seconds that one wait may take: the kernel's own limit is 24 days, and whoever waits looks again.
LONGEST_WAIT = 3600.0
#: What one ``recv`` may bring. From 128 KB on, the buffer that ``recv`` makes would be mapped and unmapped each time,
#: which costs more than the system call.
CHUNK = 1 << 16
_JOIN_BELOW = 1 << 16
#: Room for the descriptors that one message may bring.
_FD_SPACE = sockets.CMSG_SPACE(256 * array("i").itemsize)
# As plain numbers: flags that are enums take longer to combine than the system call does.
_CLOSE_ON_EXEC, _TRUNCATED = int(getattr(sockets, "MSG_CMSG_CLOEXEC", 0)), int(sockets.MSG_CTRUNC)


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
    GOT = 15  # the next descriptor has arrived here, flag: 1 if it got lost
    STOP = 7  # end now
    RESTART = 16  # replace all workers; body: what children need from now on, or empty: as before
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
    RETURNED = 35  # job: one that was not started, flag: 1 if its descriptor got lost
    RESULTS = 38  # of several jobs: see mpworker.pool.page
    PROGRESS = 36  # job, a: done, b: total, body: message (text); may be left out at any time
    CUT = 39  # job, body: what is known of it, for the parent; it will not begin the rest of its items
    KEPT = 37  # a: bytes that jobs have left in this process, until it says otherwise
    WORN = 29  # it had better not run another job
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
#: Those whose body may be a descriptor.
_MAY_BE_BULK = frozenset((Kind.SUBMIT, Kind.JOB, Kind.DONE, Kind.CALL, Kind.HOOK_QUEUED))


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


class Carrier(bytes):
    """A frame that is sent together with its body's descriptor. See :meth:`Outbox.flush`."""

    frame: Frame

    def in_bytes(self) -> tuple[bytes, bytes]:
        """The same, the body included."""
        kind, job, flag, a, b, extra, bulk_body = self.frame
        body = bulk_body.read() if type(bulk_body) is Bulk else bulk_body
        return header(kind, job, flag, a, b, len(extra), len(body)) + extra, body


def carry(frame: Frame) -> Carrier:
    """A frame whose body is a :class:`~mpworker.pool.bulk.Bulk`."""
    kind, job, flag, a, b, extra, body = frame
    head = _HEADER.pack(_MAGIC_BULK, kind, flag, len(extra), job, a, b, TICKET_SIZE)
    carrier = Carrier(b"".join((head, crc32(head).to_bytes(4, "little"), extra, body)))
    carrier.frame = frame
    return carrier


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
        place: to be given up for a descriptor that arrives.
        forgiving: one that this process had no room for may be missing; else that is the peer's fault.
        others: gets descriptors that belong to no frame; without it they are closed.
    """

    def __init__(
        self,
        peer: str,
        *,
        place: bulk.Place | None = None,
        forgiving: bool = False,
        others: list[int] | None = None,
    ) -> None:
        self.peer, self.others = peer, others
        self.arrivals = bulk.Arrivals()
        self._place, self._forgiving = place, forgiving
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
            carried = not sound and magic == _MAGIC_BULK and kind in _MAY_BE_BULK and body == TICKET_SIZE
            if not (sound or carried) or checksum != crc32(data[position : position + _UNCHECKED]):
                self._pieces, self._have, self._need = [data[position:]], size - position, 0  # it stays broken
                raise ProtocolError(f"{self.peer} sent bytes that are no frame", frames)
            middle = start + extra
            end = middle + body
            if end > size:
                need = end - position
                break
            payload = data[middle:end]
            if carried:
                if (claimed := self.arrivals.claim(payload)) is None:
                    self._pieces, self._have, self._need = [data[position:]], size - position, 0
                    raise ProtocolError(f"{self.peer} sent a frame without the descriptor that belongs to it", frames)
                payload = claimed
            frames.append(Frame(_KINDS[kind], job, flag, a, b, data[start:middle], payload))
            position = end
        self._have, self._need = size - position, need
        if self._have:
            self._pieces.append(data[position:])
        return frames

    def receive(self, sock: socket, flags: int = 0) -> bytes | None:
        """As :func:`receive`, for :meth:`feed`; keeps the descriptors that belong to frames."""
        data: bytes | None
        place = self._place
        if place is not None and place.needed:
            place.give_up()
        try:
            data, ancillary, told, _ = sock.recvmsg(CHUNK, _FD_SPACE, flags | _CLOSE_ON_EXEC)
            if ancillary or told & _TRUNCATED:
                self._keep(ancillary, told)
        except (BlockingIOError, InterruptedError):
            data = None
        except ConnectionError:
            data = b""
        if place is not None and place.needed:
            place.take()
        return data

    def _keep(self, ancillary: Iterable[tuple[int, int, bytes]], told: int) -> None:
        if told & _TRUNCATED and self._forgiving:
            self.arrivals.lost += 1
        fds = array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (sockets.SOL_SOCKET, sockets.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if self._place is not None:
            self._place.look(max(fds, default=0))
        for fd in fds:
            if self.arrivals.keep(fd):
                continue
            if self.others is not None:
                self.others.append(fd)
            else:
                os.close(fd)

    @property
    def missing(self) -> int:
        """Bytes that the current frame still lacks, as far as its header tells."""
        return self._need - self._have


class Outbox:
    """Frames on their way to a peer that may be slow: an append never blocks, a flush sends what fits."""

    def __init__(self) -> None:
        self._pieces: deque[bytes | memoryview] = deque()
        self.size = 0
        #: frames with descriptors, if somebody confirms their arrival and takes them out here
        self.unconfirmed: deque[Frame] | None = None

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def load(self) -> int:
        """Bytes that wait here for the peer, and those of descriptors that it has not confirmed."""
        return self.size + sum(len(frame.body) for frame in self.unconfirmed) if self.unconfirmed else self.size

    def put(self, *pieces: bytes) -> None:
        """Appends a frame, in one or several pieces. Safe against other threads and signal handlers."""
        self._pieces.extend(pieces)
        self.size += sum(map(len, pieces))

    def put_frame(self, frame: Frame) -> None:
        """Appends a frame; a large body is not copied."""
        kind, job, flag, a, b, extra, body = frame
        if type(body) is Bulk:
            if self.unconfirmed is not None:
                self.unconfirmed.append(frame)
            self.put(carry(frame))
            return
        head = header(kind, job, flag, a, b, len(extra), len(body))
        if len(body) < _JOIN_BELOW:
            piece = head + extra + body
            self._pieces.append(piece)
            self.size += len(piece)
        else:
            self.put(head + extra, body)

    def flush(self, send: Callable[[bytes | memoryview], int], carry: Callable[[Carrier], int]) -> bool:
        """Sends until all is gone or ``send`` would block. Only one caller at a time.

        Args:
            send: like ``socket.send`` on a non-blocking socket; its errors, but for "would block", pass through.
            carry: the same for a :class:`Carrier`, which has to leave with its descriptor.

        Returns:
            ``True`` when nothing is left.
        """
        pieces = self._pieces
        while pieces:
            piece = self._gather()
            try:
                sent = send(piece) if type(piece) is not Carrier else carry(piece)
            except (BlockingIOError, InterruptedError):
                pieces.appendleft(piece)
                return False
            except OSError as exc:
                if type(piece) is not Carrier or exc.errno != errno.ETOOMANYREFS:
                    raise
                self._unload(piece)  # too many descriptors of this user are on their way
                continue
            self.size -= sent
            if sent < len(piece):
                pieces.appendleft(memoryview(piece)[sent:])
        return True

    def _unload(self, carrier: Carrier) -> None:
        """Its body leaves in bytes."""
        self._pieces.appendleft(carrier)
        pieces = carrier.in_bytes()  # there may be no memory for that
        self._pieces.popleft()
        self._pieces.extendleft(reversed(pieces))
        self.size += sum(map(len, pieces)) - len(carrier)
        if self.unconfirmed is not None:
            self.unconfirmed = deque(frame for frame in self.unconfirmed if frame is not carrier.frame)

    def _gather(self) -> bytes | memoryview:
        # Many small frames go out in one system call.
        pieces = self._pieces
        first = pieces.popleft()
        if not pieces or len(first) >= _JOIN_BELOW or type(first) is Carrier:
            return first
        batch, size = [first], len(first)
        while pieces and size + len(pieces[0]) <= _JOIN_BELOW and type(pieces[0]) is not Carrier:
            piece = pieces.popleft()
            batch.append(piece)
            size += len(piece)
        return b"".join(batch)


def carrying(sock: socket) -> Callable[[Carrier], int]:
    """What :meth:`Outbox.flush` sends carriers with."""
    return lambda carrier: send_fds(sock, carrier)


def send_fds(sock: socket, piece: bytes | memoryview, *fds: int) -> int:
    """As ``sock.send``; descriptors travel with the first byte: that of a :class:`Carrier`, and others."""
    if type(piece) is Carrier and type(piece.frame.body) is Bulk:
        fds = *fds, piece.frame.body.fd
    return sock.sendmsg([piece], [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, array("i", fds))])


def receive(sock: socket) -> bytes | None:
    """One non-blocking read: bytes, ``b""`` at the end of the stream, ``None`` when nothing is there."""
    try:
        return sock.recv(CHUNK)
    except (BlockingIOError, InterruptedError):
        return None
    except ConnectionError:
        return b""
