"""Large bodies: what is laid out is read back as it was, in a descriptor or in bytes; nothing that lies is believed."""

from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import pickle
import resource
import socket
import tracemalloc
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import Buffer

from mpworker.errors import PayloadError, ProtocolError
from mpworker.pool import bulk, parcel
from mpworker.pool.bulk import LARGE, Bulk
from mpworker.pool.frames import Carrier, Frame, FrameReader, Kind, Outbox, carry, carrying, encode
from mpworker.pool.parcel import Outcome

BIG = os.urandom(LARGE)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not bulk._alive


VALUES = {
    "bytes": BIG,
    "bytearray": bytearray(BIG),
    "str": "é" * LARGE,
    "nested": {"a": [BIG, {"b": (bytearray(BIG), "x" * LARGE, 1)}], "c": BIG},
    "deep": [[[[[[BIG]]]]]],
    "many small ones": list(range(200_000)),
    "a large number": {1 << (8 * LARGE)},
    "many strings": [str(number) * 9000 for number in range(15)],
    "buffer": Buffer(bytearray(BIG)),
    "several buffers": [Buffer(bytearray(BIG)), 5, Buffer(bytearray(b"small")), Buffer(bytearray(BIG[:70_001])), BIG],
    "read-only buffer": Buffer(BIG),
    "twice the same": [BIG, BIG],
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("can", [True, False], ids=["descriptor", "bytes"])
def test_what_is_large_arrives_as_it_was(value: Any, can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_CAN", can)
    flag, body = parcel.pack_outcome(value)
    assert flag is Outcome.VALUE
    assert (type(body) is Bulk) == can
    assert parcel.open_outcome(flag, body) == (True, value)
    assert parcel.open_outcome(flag, body) == (True, value), "it can be opened again"
    if type(body) is Bulk:
        assert len(body) == os.fstat(body.fd).st_size
        assert parcel.open_sealed(body.read()) == value
    call = parcel.pack_call(print, (value,), {"sep": value})
    assert parcel.open_call(call) == (print, (value,), {"sep": value})


SIZE = st.sampled_from([0, 1, 100, bulk.APART - 1, bulk.APART, LARGE])
PART = st.builds(bytes, SIZE) | st.builds(bytearray, SIZE) | st.builds("é".__mul__, SIZE)
PART |= st.builds(lambda size: Buffer(bytearray(size)), SIZE) | st.integers()


@given(
    st.recursive(PART, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(), inner, max_size=3))
)
def test_anything_arrives_as_it_was(value: Any) -> None:
    _, body = parcel.pack_outcome(value)
    assert parcel.open_sealed(body) == value


def test_what_contains_itself_is_not_searched_for_ever() -> None:
    value: list[Any] = [BIG[:10]]
    value.append(value)
    arrived = parcel.open_sealed(parcel.pack_outcome(value)[1])
    assert arrived[1] is arrived
    value.append(BIG)
    assert parcel.open_sealed(parcel.pack_outcome(value)[1])[2] == BIG


def test_what_is_small_stays_a_plain_parcel() -> None:
    assert parcel.pack_outcome(b"x")[1] == parcel.pack(b"x", "it")


def test_large_strings_of_bytes_are_neither_copied_nor_read_before_they_are_written() -> None:
    data = bytes(64 << 20)
    tracemalloc.start()
    try:
        body = parcel.pack_outcome([data])[1]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert type(body) is Bulk


def test_a_large_buffer_is_not_copied_on_arrival_and_what_is_written_there_is_nobody_elses() -> None:
    body = parcel.pack_outcome(Buffer(bytearray(BIG)))[1]
    first, second = parcel.open_sealed(body), parcel.open_sealed(body)
    del body
    gc.collect()
    assert isinstance(first.memory.obj, mmap.mmap)
    view = memoryview(first.memory)
    view[0] = BIG[0] ^ 1
    assert bytes(second.memory) == BIG
    assert bytes(view[1:]) == BIG[1:]
    with pytest.raises((BufferError, TypeError)):
        memoryview(parcel.open_sealed(parcel.pack_outcome(Buffer(BIG))[1]).memory)[0] = 0


def test_whoever_keeps_a_small_part_keeps_only_that() -> None:
    large, small = parcel.open_sealed(
        parcel.pack_outcome([Buffer(bytearray(20 * bulk.APART)), Buffer(bytearray(bulk.APART))])[1]
    )
    assert isinstance(large.memory.obj, mmap.mmap)
    assert isinstance(small.memory, bytearray)


def test_an_object_whose_buffer_is_not_in_one_piece_says_so() -> None:
    flag, body = parcel.pack_outcome(Buffer(memoryview(bytearray(BIG))[::2]))
    assert flag is Outcome.ERROR
    assert "cannot be pickled" in str(parcel.open_outcome(flag, body)[1])


# -- when there is none to be had --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["memfd_create", "writev"])
def test_without_a_descriptor_the_bytes_travel(number: int, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    body = parcel.pack_outcome(BIG)[1]
    assert type(body) is bytes
    assert parcel.open_sealed(body) == BIG


def test_a_limit_of_the_size_of_files_is_no_limit_of_results() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE // 2, before[1]))
    try:
        body = parcel.pack_outcome(BIG)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert type(body) is bytes
    assert parcel.open_sealed(body) == BIG


@pytest.fixture
def few() -> Iterator[int]:
    """This process may have so few descriptors that half of them are taken."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 10)]
    limit = max(spare) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for fd in spare:
        os.close(fd)


def test_where_descriptors_are_few_none_is_made(few: int) -> None:
    assert type(parcel.pack_outcome(BIG)[1]) is bytes


def test_there_are_never_more_than_so_many() -> None:
    bodies = [parcel.pack_outcome(BIG)[1] for _ in range(bulk._MOST + 3)]
    assert sum(type(body) is Bulk for body in bodies) == bulk._MOST
    assert all(parcel.open_sealed(body) == BIG for body in bodies[-4:])


# -- on the way --------------------------------------------------------------------------------------------------------


class Line:
    """Both ends of a line."""

    def __init__(self, **options: Any) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.reader = FrameReader("a peer", **options)
        self.theirs.setblocking(False)

    def send_fd(self, data: bytes, *fds: int) -> None:
        self.ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])

    def read(self) -> list[Frame]:
        frames = []
        while data := self.reader.receive(self.theirs):
            frames += self.reader.feed(data)
        return frames

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.theirs.close()


def done(job: int, value: Any) -> Frame:
    flag, body = parcel.pack_outcome(value)
    return Frame(Kind.DONE, job, flag, 1.0, 2.0, b"extra", body)


FRAMES = st.lists(st.sampled_from([1, LARGE, LARGE, LARGE + 1]), min_size=1, max_size=9)


@given(FRAMES, st.lists(st.integers(1, 150), max_size=60), st.lists(st.integers(1, 150), max_size=60))
def test_each_body_arrives_with_its_frame_however_little_is_sent_or_read(
    sizes: list[int], sent: list[int], read: list[int]
) -> None:
    with Line() as line, pytest.MonkeyPatch.context() as monkeypatch:
        box, arrived = Outbox(), []
        for job, size in enumerate(sizes):
            box.put_frame(done(job, bytes([job]) * size))

        def fits(piece: Any) -> int:
            return min(len(piece), sent.pop() if sent else len(piece))

        def send(piece: bytes | memoryview) -> int:
            return line.ours.send(piece[: fits(piece)])

        def carry(piece: Carrier) -> int:
            line.send_fd(data := bytes(piece)[: fits(piece)], piece.frame.body.fd)  # type: ignore[attr-defined]
            return len(data)

        assert box.flush(send, carry)
        while True:
            monkeypatch.setattr("mpworker.pool.frames.CHUNK", read.pop() if read else 1 << 16)
            if not (data := line.reader.receive(line.theirs)):
                break
            arrived += line.reader.feed(data)
        assert [frame.job for frame in arrived] == list(range(len(sizes)))
        for frame, size in zip(arrived, sizes, strict=True):
            assert (type(frame.body) is Bulk) == (size >= LARGE)
            assert frame.extra == b"extra"
            assert parcel.open_outcome(frame.flag, frame.body) == (True, bytes([frame.job]) * size)
        assert line.reader.arrivals.claimed == [False] * sum(size >= LARGE for size in sizes)
        del arrived, frame


def test_too_many_on_their_way_is_no_reason_to_lose_one() -> None:
    with Line() as line:
        box = Outbox()
        box.unconfirmed = deque()
        for job in (1, 2, 3):
            box.put_frame(done(job, BIG))
        refused: list[Carrier] = []

        def refuse(piece: Carrier) -> int:
            if len(refused) < 2:
                refused.append(piece)
                raise OSError(errno.ETOOMANYREFS, "too many")
            return carrying(line.ours)(piece)

        line.ours.setblocking(False)
        arrived = []
        while not box.flush(line.ours.send, refuse):
            arrived += line.read()
        arrived += line.read()
        assert [type(frame.body) is Bulk for frame in arrived] == [False, False, True]
        assert [parcel.open_outcome(frame.flag, frame.body)[1] == BIG for frame in arrived] == [True] * 3
        assert [frame.job for frame in box.unconfirmed] == [3]
        assert (box.size, box.load) == (0, len(arrived[2].body))
        box.unconfirmed.clear()
        del arrived


def test_what_arrives_where_descriptors_are_few_is_turned_into_bytes(few: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (few * 4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    frame = done(1, BIG)
    assert type(frame.body) is Bulk
    resource.setrlimit(resource.RLIMIT_NOFILE, (few + 6, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with Line() as line:
        line.ours.sendmsg([carry(frame)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [frame.body.fd]))])
        (arrived,) = line.read()
        assert type(arrived.body) is bytes
        assert parcel.open_outcome(arrived.flag, arrived.body) == (True, BIG)


@pytest.mark.parametrize("forgiving", [True, False])
def test_what_found_no_free_number_is_known_to_be_lost(few: int, forgiving: bool) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (few * 4, hard))
    first, second = done(1, BIG), done(2, BIG)
    with Line(forgiving=forgiving) as line:
        line.send_fd(carry(first), first.body.fd)  # type: ignore[attr-defined]
        line.send_fd(carry(second), second.body.fd)  # type: ignore[attr-defined]
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        data = line.reader.receive(line.theirs)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few * 4, hard))
        assert data
        if not forgiving:
            with pytest.raises(ProtocolError, match="a peer sent a frame without the descriptor that belongs to it"):
                line.reader.feed(data)
            return
        frames = line.reader.feed(data) + line.read()
        succeeded, error = parcel.open_outcome(frames[0].flag, frames[0].body)
        assert not succeeded
        assert "too many open" in str(error)
        assert line.reader.arrivals.claimed == [True, False]
        assert parcel.open_outcome(frames[1].flag, frames[1].body) == (True, BIG)
        del frames


def test_a_place_is_kept_where_few_descriptors_are_left(few: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (few * 4, hard))
    frame = done(1, BIG)
    place = bulk.Place()
    with Line(place=place) as line:
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
        place.look(lowest)
        assert line.reader.receive(line.theirs) is None
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        line.send_fd(carry(frame), frame.body.fd)  # type: ignore[attr-defined]
        (arrived,) = line.read()
        assert parcel.open_outcome(arrived.flag, arrived.body) == (True, BIG)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few * 4, hard))
        assert line.reader.receive(line.theirs) is None
        assert not place.needed
        del arrived


# -- lies --------------------------------------------------------------------------------------------------------------


def memory(size: int = 2 * LARGE, seals: int = SEALS, *, hole: bool = False) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if hole:
        os.ftruncate(fd, size)
    else:
        os.write(fd, bytes(size))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def ticket(fd: int, size: int = 0) -> bytes:
    status = os.fstat(fd)
    return bulk._TICKET.pack(status.st_ino, size or status.st_size)


def lie(text: bytes) -> bytes:
    return carry(Frame(Kind.DONE, 1, body=Bulk(text, -1)))


def pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


LIES = {
    "none": None,
    "a pipe": pipe,
    "a file": lambda: os.open(__file__, os.O_RDONLY),
    "not sealed": lambda: memory(seals=0),
    "may shrink": lambda: memory(seals=SEALS & ~fcntl.F_SEAL_SHRINK),
    "may be written": lambda: memory(seals=SEALS & ~fcntl.F_SEAL_WRITE),
    "a hole": lambda: memory(1 << 40, hole=True),
}


@pytest.mark.parametrize("what", LIES.values(), ids=LIES)
def test_a_frame_whose_descriptor_is_not_what_it_says_is_refused_by_the_name_of_its_sender(what: Any) -> None:
    with Line() as line:
        if what is None:
            line.ours.send(encode(Kind.DONE, 7) + lie(bulk._TICKET.pack(5, 1 << 50)))
        else:
            fd = what()
            line.send_fd(encode(Kind.DONE, 7) + lie(ticket(fd)), fd)
            os.close(fd)
        data = line.reader.receive(line.theirs)
        assert data
        for more, before in ((data, [7]), (b"", [])):
            with pytest.raises(ProtocolError, match=r"^a peer sent a frame without the descriptor") as caught:
                line.reader.feed(more)
            assert [frame.job for frame in caught.value.before] == before


@pytest.mark.parametrize("size", [1, LARGE, 1 << 40])
def test_a_descriptor_of_another_size_is_not_the_one(size: int) -> None:
    fd = memory()
    with Line() as line:
        line.send_fd(lie(ticket(fd, size)), fd)
        os.close(fd)
        with pytest.raises(ProtocolError):
            line.read()


@pytest.mark.parametrize("kind", sorted(set(Kind) - {Kind.SUBMIT, Kind.JOB, Kind.DONE, Kind.CALL, Kind.HOOK_QUEUED}))
def test_only_calls_and_outcomes_may_have_one(kind: Kind) -> None:
    fd = memory()
    with Line() as line:
        line.send_fd(carry(Frame(kind, 1, body=Bulk(ticket(fd), -1))), fd)
        os.close(fd)
        with pytest.raises(ProtocolError, match="no frame"):
            line.read()


def test_descriptors_that_no_frame_asks_for_do_not_pile_up() -> None:
    with Line() as line:
        before = len(os.listdir("/proc/self/fd"))
        fd = memory()
        for _ in range(50):
            line.send_fd(encode(Kind.DONE, 1), *[fd] * 10)
            line.read()
        os.close(fd)
        assert len(os.listdir("/proc/self/fd")) <= before + 2
        frame = done(1, BIG)
        line.send_fd(carry(frame), frame.body.fd)  # type: ignore[attr-defined]
        (arrived,) = line.read()
        assert parcel.open_outcome(arrived.flag, arrived.body) == (True, BIG)
        del arrived


def forged(data: bytes) -> Bulk:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return Bulk(ticket(fd), fd)


@given(st.data())
def test_damage_is_noticed_before_pickle_sees_it_or_is_only_in_contents(data: st.DataObject) -> None:
    value = [b"x" * LARGE, Buffer(bytearray(b"y" * LARGE)), "text"]
    whole = bytearray(parcel.pack_outcome(value)[1].read())  # type: ignore[attr-defined]
    edge = st.integers(0, 400) | st.integers(LARGE - 100, LARGE + 400) | st.integers(0, len(whole) - 1)
    at = data.draw(edge)
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    tracemalloc.start()
    try:
        got = parcel.open_sealed(data.draw(st.sampled_from([bytes, forged]))(bytes(whole)))
        assert len(got) == 3
        assert (len(got[0]), len(got[1].memory), got[2]) == (LARGE, LARGE, "text")
    except PayloadError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * LARGE


@given(st.binary(max_size=200))
def test_what_was_never_laid_out_is_refused(noise: bytes) -> None:
    for data in (b"\0" + noise, bulk._MARK + noise):
        with pytest.raises(PayloadError):
            parcel.open_sealed(data)
        with pytest.raises(PayloadError):
            parcel.open_sealed(forged(data))


def test_a_body_that_lies_about_its_lengths_reserves_nothing() -> None:
    claim = bulk._HEAD.pack(bulk._MARK, 0, (1 << 32) - 1, (1 << 32) - 1)
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError):
            parcel.open_sealed(claim + bytes(1000))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_body_does_not_travel_inside_another_one() -> None:
    body = parcel.pack_outcome(BIG)[1]
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(body)


def test_a_fork_closes_what_belongs_to_the_process_it_was_forked_from() -> None:
    body = parcel.pack_outcome(BIG)[1]
    assert type(body) is Bulk
    fd = body.fd
    if not (pid := os.fork()):
        bulk.abandon()
        try:
            os.fstat(fd)
        except OSError:
            other = os.dup(0)  # it gets that number
            del body
            gc.collect()
            os._exit(0 if other == fd and os.fstat(other) else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.fstat(fd).st_size == len(body)
