"""Whoever reads frames is sent garbage: broken bytes, and whole frames that make no sense. It says who sent it, goes on
without that one, and harms nobody else."""

from __future__ import annotations

import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from math import inf, nan
from typing import Any

import pytest
import support
from hypothesis import example, given
from hypothesis import strategies as st

from mpworker.pool import dispatcher as dispatchers
from mpworker.pool import facts as f
from mpworker.pool import fleet as fleets
from mpworker.pool import page as pages
from mpworker.pool.bulk import LARGE, Bulk
from mpworker.pool.fleet import Crew, Exit
from mpworker.pool.frames import Frame, FrameReader, Kind, Outbox, carry, carrying, encode, header, unpack_start
from mpworker.pool.futures import Results, TaskFuture
from mpworker.pool.handle import Handle, PoolOptions
from mpworker.pool.jobs import Lane
from mpworker.pool.parcel import Outcome, open_outcome, open_verdict, pack, pack_call, pack_outcome
from mpworker.states import JobState

NUMBER = st.sampled_from([0.0, 1.0, nan, inf, -inf, -1.0, 5e-324, 1e300]) | st.floats()
JOB = st.integers(0, 5) | st.sampled_from([1 << 31, 1 << 62, (1 << 62) + 1, (1 << 64) - 1]) | st.integers(0, 2**64 - 1)
BODY = st.sampled_from([b"", b"{}", b"[]", b"[1]", b'{"state": "lost"}', b"\xff", pack(1, "it")]) | st.binary(
    max_size=40
)
FRAME = st.builds(encode, st.sampled_from(Kind), JOB, st.integers(0, 255), NUMBER, NUMBER, BODY, BODY)
LIE = st.builds(
    header, st.sampled_from(Kind), JOB, st.integers(0, 255), NUMBER, NUMBER, JOB.map(lambda n: n % 2**32), JOB
)
#: Says that a descriptor belongs to it.
TICKET = st.builds(
    lambda kind, job, flag, number, size: carry(
        Frame(kind, job, flag, number, number, b"", Bulk(struct.pack("<QQ", job, size), -1))
    ),
    st.sampled_from(Kind),
    JOB,
    st.integers(0, 255),
    NUMBER,
    JOB,
)
GARBAGE = st.lists(FRAME | FRAME | LIE | TICKET | st.binary(min_size=1, max_size=80), min_size=1, max_size=6).map(
    b"".join
)
FIRST_PID = 1 << 30  # of processes that there are not


def lie(kind: Kind) -> bytes:
    """A frame that says that it has a descriptor, and has none."""
    return carry(Frame(kind, 1, body=Bulk(struct.pack("<QQ", 1, 1 << 50), -1)))


def large(kind: Kind, job: int, **more: Any) -> Frame:
    """A frame that has one."""
    return Frame(kind, job, **more, body=pack_outcome(os.urandom(LARGE))[1])


class Fleet(fleets.Fleet):
    """Starts nobody: the test holds the other ends of the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs: dict[int, socket.socket] = {}
        self.kills: list[tuple[int, int]] = []

    def spawn(self, worker: int, slot: int, lane: Lane, boot: bytes) -> Crew:
        data, self.theirs[worker] = socket.socketpair()
        data.setblocking(False)
        fd = pages.create()
        page = pages.Page(os.dup(fd), worker=worker)
        control = socket.socketpair()[0]
        crew = self.crews[worker] = Crew(worker, slot, lane, data, control, page, fd, FIRST_PID + worker)
        self._by_pid[crew.pid] = crew
        return crew

    def kill(self, worker: int, signum: int) -> None:
        self.kills.append((worker, signum))


class Stage:
    """A dispatcher without processes, its loop turned by hand."""

    def __init__(self) -> None:
        line, self.parent = socket.socketpair()
        self.parent.setblocking(False)
        self.line, self.fleet, self.heard = line, Fleet(), FrameReader("the dispatcher")
        boot = Frame(Kind.BOOT, extra=PoolOptions(size=2, start_method="spawn").to_json())
        self.it = dispatchers.Dispatcher(line, boot, self.fleet, True)
        self.it.begin()
        for worker in (0, 1):
            self.say(worker, encode(Kind.READY))
        for job in (1, 2):
            body = pack_call(support.give, (job,), {})
            self.ask(encode(Kind.SUBMIT, job, body=body))
        self.has = {}
        for worker in (0, 1):
            (frame,) = FrameReader("the dispatcher").feed(self.fleet.theirs[worker].recv(1 << 16))
            assert frame.kind is Kind.JOB
            self.has[worker] = frame.job
            self.say(worker, encode(Kind.STARTED, frame.job, a=1.0))

    def turn(self, late: bool = True) -> list[Frame]:
        """One turn of the loop; what the parent gets of it.

        Args:
            late: the turn takes so long that no start waits for its end.
        """
        for key, mask in self.it._selector.select(0):
            key.data.handle(mask)
        if late:
            self.it._starts_due = -inf
        self.it._flush()
        return self.heard.feed(self.heard.receive(self.parent) or b"")

    def say(self, worker: int, data: bytes, late: bool = True) -> list[Frame]:
        self.fleet.theirs[worker].sendall(data)
        return self.turn(late)

    def say_large(self, worker: int, frame: Frame) -> list[Frame]:
        box = Outbox()
        box.put_frame(frame)
        assert box.flush(self.fleet.theirs[worker].send, carrying(self.fleet.theirs[worker]))
        return self.turn()

    def ask(self, data: bytes) -> list[Frame]:
        self.parent.sendall(data)
        return self.turn()

    def close(self) -> None:
        self.it._selector.close()
        for crew in self.fleet.crews.values():
            crew.close()
        for sock in (self.line, self.parent, *self.fleet.theirs.values()):
            sock.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@example(encode(Kind.KEPT, 0, 0, float("inf")), [])
@given(GARBAGE, st.lists(st.integers(1, 150), max_size=5))
def test_a_worker_that_says_anything_harms_only_its_own_task(garbage: bytes, cuts: list[int]) -> None:
    stage = Stage()
    try:
        told: list[Frame] = []
        for cut in [*cuts, len(garbage)]:
            told += stage.say(0, garbage[:cut])
            garbage = garbage[cut:]
        assert not stage.it._finished
        assert all(signum == 0 or worker == 0 for worker, signum in stage.fleet.kills)
        told += stage.say(1, encode(Kind.DONE, stage.has[1], Outcome.VALUE, 0.5, body=pack(7, "it")))
        ends = [frame for frame in told if frame.kind in (Kind.DONE, Kind.ENDED) and frame.job == stage.has[1]]
        assert [frame.kind for frame in ends] == [Kind.DONE]
        assert ends[0].body == pack(7, "it")
        assert sum(frame.job == stage.has[0] for frame in told if frame.kind in (Kind.DONE, Kind.ENDED)) < 2
    finally:
        stage.close()


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (b"\0" * 60, "worker 0 sent bytes that are no frame"),
        (encode(Kind.SUBMIT, 9), "worker 0 sent a SUBMIT frame, which is not its to send"),
        (lie(Kind.DONE), "worker 0 sent a frame without the descriptor that belongs to it"),
        (lie(Kind.CALL), "worker 0 sent a frame without the descriptor that belongs to it"),
        (lie(Kind.STARTED), "worker 0 sent bytes that are no frame"),
        (encode(Kind.HELLO, FIRST_PID + 1), "worker 0 is not a child of the dispatcher"),
        (encode(Kind.HELLO, 0), "worker 0 is not a child of the dispatcher"),
        (encode(Kind.HELLO, (1 << 64) - 1), "worker 0 is not a child of the dispatcher"),
        (header(Kind.DONE, 1, 0, 0.0, 0.0, 0, 1 << 50), "worker 0 sent bytes that are no frame"),
    ],
    ids=[
        "noise",
        "kind",
        "no descriptor",
        "no descriptor for a callback",
        "descriptor",
        "another's number",
        "nobody's number",
        "no number",
        "length",
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_a_worker_that_sends_garbage_is_killed_and_what_it_said_before_counts(
    stage: Stage, garbage: bytes, why: str, done: bool
) -> None:
    end = encode(Kind.DONE, stage.has[0], Outcome.VALUE, 0.5, body=pack(7, "it")) if done else b""
    told = stage.say(0, end + garbage)
    later = stage.it._ledger.next_deadline()
    for action in stage.it._ledger.apply(f.Ticked(), later):
        stage.it._actions[type(action)](action)
    assert stage.fleet.kills == [(0, signal.SIGTERM)]
    stage.it._gone(Exit(0, None, signal.SIGTERM, None))
    told += stage.turn()
    (last,) = [frame for frame in told if frame.job == stage.has[0] and frame.kind in (Kind.DONE, Kind.ENDED)]
    if done:
        assert last.body == pack(7, "it")
    else:
        state, facts = open_verdict(last.body)
        assert (state, facts["why"]) == (JobState.LOST, why)


@given(GARBAGE)
def test_a_dispatcher_takes_anything_from_its_parent_or_ends_with_a_word(garbage: bytes) -> None:
    stage = Stage()
    try:
        told = stage.ask(garbage)
        if stage.it._finished and not stage.it._ledger.finished:
            stage.it._say_goodbye()
            told += stage.heard.feed(stage.parent.recv(1 << 16))
            assert any(frame.kind is Kind.LOG and b"the parent sent" in frame.body for frame in told)
    finally:
        stage.close()


class Process:
    """A dispatcher's process that is none."""

    pid = FIRST_PID

    def __init__(self) -> None:
        self.killed = False

    def kill(self) -> None:
        self.killed = True

    def wait(self, timeout: float | None = None) -> int:
        return -signal.SIGKILL

    def poll(self) -> int | None:
        return -signal.SIGKILL if self.killed else None


class Listener:
    """A parent whose dispatchers are played by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.processes: list[Process] = []
        self.lines: list[socket.socket] = []
        monkeypatch.setattr(fleets, "launch", self.launch)
        self.handle = Handle(PoolOptions(size=1), b"")
        self.handle.start()
        self.results = Results(self.handle, None)
        self.futures = []
        for job in (1, 2):
            assert self.handle.next_id() == job
            future: TaskFuture[Any] = TaskFuture(self.results, job)
            self.results.futures[job] = future
            self.futures.append(future)
            self.handle.submit(job, b"", hooks=b"hooks" if job == 2 else b"")

    def launch(self) -> tuple[Process, socket.socket]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.lines.append(theirs)
        self.processes.append(Process())
        return self.processes[-1], ours

    def hear(self, data: bytes, starts: bool) -> list[Frame]:
        self.lines[-1].sendall(data)
        told = []
        for frame in self.handle.drain(starts):
            told.append(frame)
            self.results._on_event(frame)
        return told

    def close(self) -> None:
        for line in self.lines:
            line.close()
        if self.handle._line is not None:
            self.handle._line.close()
        for end in (self.results._wake_reader, self.results._wake_writer):
            os.close(end)


@given(garbage=GARBAGE, starts=st.booleans())
def test_a_parent_takes_anything_from_its_dispatcher_and_settles_every_job_once(garbage: bytes, starts: bool) -> None:
    logging.disable(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as monkeypatch:
        listener = Listener(monkeypatch)
        try:
            told = listener.hear(garbage, starts)
            done = [encode(Kind.DONE, job, body=pack(job, "it")) for job in (1, 2)]
            for _ in range(2):  # the garbage may be seen as such only with what follows
                if not listener.handle.finished:
                    told += listener.hear(b"".join(done), starts)
            if listener.processes[0].killed and not listener.handle.finished:
                told += listener.hear(b"".join(done), starts)
            ends = [frame.job for frame in told if frame.kind in (Kind.DONE, Kind.ENDED)]
            assert len(ends) == len(set(ends))
            if listener.processes[0].killed and not listener.handle.finished and len(listener.lines) == 2:
                assert listener.handle.generation == 1
                assert sorted(ends) == [1, 2]
                assert all(future.done() for future in listener.futures)
        finally:
            logging.disable(logging.NOTSET)
            listener.close()


@pytest.mark.parametrize(
    ("garbage", "word"),
    [
        (b"\0" * 60, "the dispatcher sent bytes that are no frame"),
        (encode(Kind.SUBMIT, 9), "the dispatcher sent a SUBMIT frame, which is not its to send"),
        (lie(Kind.DONE), "the dispatcher sent a frame without the descriptor that belongs to it"),
        (lie(Kind.ENDED), "the dispatcher sent bytes that are no frame"),
        (encode(Kind.WORKERS, body=b"["), "the dispatcher cannot be understood"),
        (encode(Kind.STARTED, 2, b=nan), "the dispatcher cannot be understood"),
        (encode(Kind.RESULTS, extra=b"x" * 30, body=b"y"), "the dispatcher sent damaged results"),
        (header(Kind.DONE, 1, 0, 0.0, 0.0, 0, 1 << 60), "the dispatcher sent bytes that are no frame"),
    ],
    ids=["noise", "kind", "no descriptor", "descriptor", "body", "number", "results", "length"],
)
def test_a_dispatcher_that_makes_no_sense_is_named_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, garbage: bytes, word: str
) -> None:
    listener = Listener(monkeypatch)
    try:
        told = listener.hear(encode(Kind.DONE, 1, body=pack(7, "it")) + garbage, False)
        assert word in caplog.text
        assert listener.processes[0].killed
        assert listener.handle.generation == 1
        assert listener.futures[0].result(0) == 7, "what came before counts"
        assert [frame.kind for frame in told] == [Kind.DONE]
        listener.hear(encode(Kind.DONE, 2, body=pack(8, "it")), False)
        assert listener.futures[1].result(0) == 8
    finally:
        listener.close()


def test_large_results_count_for_as_long_as_the_parent_has_not_got_them(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatchers, "PARENT_HIGH_WATER", LARGE)
    outbox, workers = stage.it._parent.outbox, stage.it._ledger._tasks.workers
    (frame,) = stage.say_large(0, large(Kind.DONE, stage.has[0]))
    assert (outbox.size, outbox.load) == (0, len(frame.body)), "it has been sent, which says nothing"
    stage.ask(encode(Kind.SUBMIT, 8))
    assert not workers[0].jobs
    stage.ask(encode(Kind.GOT))
    assert [job.id for job in workers[0].jobs] == [8]
    told = stage.ask(encode(Kind.GOT))
    stage.it._say_goodbye()
    told += stage.turn()
    assert any(b"the parent sent a GOT frame, which is not its to send" in frame.body for frame in told)


def test_a_large_result_for_which_the_parent_has_no_room_comes_again_in_bytes(stage: Stage) -> None:
    frames = [large(Kind.DONE, stage.has[worker]) for worker in (0, 1)]
    for worker in (0, 1):
        stage.say_large(worker, frames[worker])
    told = stage.ask(encode(Kind.GOT, flag=1) + encode(Kind.GOT))
    while not told:
        told = stage.turn()
    assert [(frame.job, type(frame.body)) for frame in told] == [(stage.has[0], bytes)]
    assert told[0].body == frames[0].body.read()  # type: ignore[attr-defined]


def test_a_start_waits_a_moment_for_the_end(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatchers, "_SHORT", 3600.0)

    def has_started(job: int) -> list[Frame]:
        stage.ask(encode(Kind.SUBMIT, job, body=pack_call(support.give, (job,), {})))
        return stage.say(0, encode(Kind.STARTED, job, a=1.0), late=False)

    stage.say(0, encode(Kind.DONE, stage.has[0], body=pack(1, "it")))
    assert has_started(3) == []
    assert stage.it._starts_due < inf
    (frame,) = stage.say(0, encode(Kind.DONE, 3, body=pack(1, "it")), late=False)
    start = unpack_start(frame)
    assert start is not None
    assert (frame.kind, frame.job, start.kind, start.a) == (Kind.DONE, 3, Kind.STARTED, 1.0)
    assert stage.it._starts_due == inf
    assert has_started(4) == []
    assert [(frame.kind, frame.job) for frame in stage.turn()] == [(Kind.STARTED, 4)]
    stage.say(0, encode(Kind.DONE, 4, body=pack(1, "it")))
    assert has_started(5) == []
    stage.parent.sendall(encode(Kind.FLUSH, 9))  # what is told then has to be true
    assert [frame.kind for frame in stage.turn(late=False)] == [Kind.STARTED, Kind.FLUSHED]


def test_a_dispatcher_that_is_done_waits_until_the_parent_has_got_everything(stage: Stage) -> None:
    stage.say_large(0, frame := large(Kind.DONE, stage.has[0]))
    ending = threading.Thread(target=stage.it._say_goodbye)
    ending.start()
    stage.parent.setblocking(True)
    stage.parent.sendall(encode(Kind.GOT, flag=1))
    told: list[Frame] = []
    while not told:
        told = stage.heard.feed(stage.heard.receive(stage.parent) or b"")
    ending.join(support.PATIENCE)
    assert not ending.is_alive()
    (again,) = told
    assert (again.job, len(again.body)) == (frame.job, len(frame.body))


def test_a_job_whose_descriptor_a_worker_has_no_room_for_comes_again_in_bytes(stage: Stage) -> None:
    stage.say(0, encode(Kind.DONE, stage.has[0], body=pack(1, "it")))
    reader = FrameReader("the dispatcher")
    box = Outbox()
    box.put_frame(sent := large(Kind.SUBMIT, 8))
    assert box.flush(stage.parent.send, carrying(stage.parent))
    stage.turn()
    (frame,) = reader.feed(reader.receive(stage.fleet.theirs[0]) or b"")
    assert (frame.kind, frame.job, type(frame.body)) == (Kind.JOB, 8, Bulk)
    stage.say(1, encode(Kind.RETURNED, 8, 1))  # not its to return
    stage.say(0, encode(Kind.RETURNED, 8, 1))
    stage.fleet.theirs[0].setblocking(False)
    frames: list[Frame] = []
    while not frames:
        stage.turn()
        frames = reader.feed(reader.receive(stage.fleet.theirs[0]) or b"")
        stage.it._touched.add(0)
    assert (frames[0].kind, frames[0].job, type(frames[0].body)) == (Kind.JOB, 8, bytes)
    assert open_outcome(0, frames[0].body) == open_outcome(0, sent.body)


def test_a_dispatcher_that_was_stopped_hears_the_others_before_it_judges_them(stage: Stage) -> None:
    """All of them may have been stopped: a task that could not begin in time is no reason to kill whoever has it."""
    stage.say(0, encode(Kind.DONE, stage.has[0], body=pack(1, "it")))
    stage.ask(encode(Kind.SUBMIT, 9))
    now = stage.it._ledger.next_deadline()  # worker 0 should have begun job 9
    assert now < inf
    assert not stage.it._due(now - 0.1)
    assert stage.it._due(now)
    now += 1000.0
    assert not stage.it._due(now)
    assert not stage.it._due(now + 0.1)
    stage.say(0, encode(Kind.STARTED, 9, a=1.0))
    assert not stage.it._due(now + 0.2)
    stage.say(0, encode(Kind.DONE, 9, body=pack(1, "it")))
    stage.ask(encode(Kind.SUBMIT, 10))
    now = stage.it._ledger.next_deadline() + 1000.0
    assert not stage.it._due(now)
    assert stage.it._due(now + 0.3), "whoever says nothing is judged all the same"
