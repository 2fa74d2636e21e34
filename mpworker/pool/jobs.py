"""What a pool works with, as the ledger sees it: jobs, alone or in a bundle, and workers. Decides nothing."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import TYPE_CHECKING, Any, final

from mpworker.errors import ProtocolError
from mpworker.pool.frames import Frame, Kind, encode
from mpworker.states import JobState, WorkerState

if TYPE_CHECKING:
    from mpworker.pool.facts import HookCalled

#: Tells a worker, and what it starts, its slot.
SLOT_VARIABLE = "MPWORKER_SLOT"
#: The slot of a spare.
NO_SLOT = -1


class Lane(IntEnum):
    """A queue with workers of its own."""

    #: the tasks
    TASKS = 0
    #: their callbacks: one worker, first come first served
    HOOKS = 1
    #: no queue at all: one process that serves the pool's user beside them
    SERVICE = 2


@final
@dataclass(slots=True, eq=False)
class Job:
    """One piece of work. ``soft`` and ``hard`` are seconds, 0 for none; times are ``time.monotonic()``."""

    id: int
    lane: Lane = Lane.TASKS
    flag: int = 0
    soft: float = 0.0
    hard: float = 0.0
    hooks: bytes = b""
    body: bytes = b""
    #: for a callback: the job it belongs to
    of: int = 0
    state: JobState = JobState.QUEUED
    #: who has it, from ASSIGNED on
    worker: Worker | None = None
    started: float = 0.0
    #: when the dispatcher itself steps in
    guard: float = inf
    #: how the job will end, once that is decided but its worker still lives
    verdict: tuple[JobState, dict[str, Any]] | None = None
    #: stands in its lane's queue
    queued: bool = False
    #: asked back by a flush, unless it has started
    recalled: bool = False
    #: bytes that its process group may hold, 0 for no limit; when it was asked to hold less; what it was seen to hold
    memory: int = 0
    asked: float = inf
    rss: int = 0


@final
@dataclass(slots=True, eq=False)
class Span:
    """Small jobs with consecutive numbers and the same limits, treated as one until something happens to one of them.

    ``body`` holds their calls one after another, ``lengths`` the bytes of each.
    """

    first: int
    soft: float
    hard: float
    lengths: array[int]
    body: bytes
    worker: Worker | None = None
    #: taken apart: these have taken its place
    jobs: list[Job] | None = None

    @property
    def ids(self) -> range:
        return range(self.first, self.first + len(self.lengths))

    def take(self, count: int) -> Span:
        """Splits the first ones off."""
        lengths = self.lengths[:count]
        size = sum(lengths)
        taken = Span(self.first, self.soft, self.hard, lengths, self.body[:size])
        self.first += count
        self.lengths, self.body = self.lengths[count:], self.body[size:]
        return taken

    def calls(self) -> Iterator[tuple[int, bytes]]:
        """Each number with its call."""
        body, end = self.body, 0
        for job, length in zip(self.ids, self.lengths, strict=True):
            start, end = end, end + length
            yield job, body[start:end]

    def apart(self) -> list[Job]:
        """The same as single jobs."""
        soft, hard = self.soft, self.hard
        self.jobs = [Job(job, Lane.TASKS, 0, soft, hard, b"", call) for job, call in self.calls()]
        return self.jobs


def pack_span(first: int, soft: float, hard: float, calls: list[bytes]) -> bytes:
    """The BUNDLE frame of packed calls."""
    return encode(Kind.BUNDLE, first, 0, soft, hard, array("I", map(len, calls)).tobytes(), b"".join(calls))


def open_span(frame: Frame, peer: str) -> Span:
    """What a BUNDLE frame says.

    Raises:
        ProtocolError: it is damaged.
    """
    _, job, _, soft, hard, extra, body = frame
    lengths = array("I")
    try:
        lengths.frombytes(extra)
    except ValueError:
        lengths = array("I")
    if not lengths or sum(lengths) != len(body):
        raise ProtocolError(f"{peer} sent a damaged bundle of jobs")
    return Span(job, soft, hard, lengths, body)


@dataclass(slots=True, eq=False)
class Worker:
    """One child process as the ledger sees it."""

    id: int
    slot: int
    lane: Lane
    #: what happens next if nothing else does: ready timeout, start guard or escalation
    deadline: float = inf
    state: WorkerState = WorkerState.STARTING
    pid: int = 0
    #: given to it and not finished, in order
    jobs: deque[Job | Span] = field(default_factory=deque)
    #: how many these are
    load: int = 0
    running: Job | None = None
    done: int = 0
    #: it handed jobs back: give it no more than one until its job is done
    hold: bool = False
    #: its page has been looked at since it was given a bundle
    looked: bool = True
    #: this pool sent it a signal
    killed: bool = False
    #: the second rung of the kill ladder has been reached
    final: bool = False
    #: what is wrong with its line to the pool
    fault: str = ""
    #: a callback that goes with the running job
    call: HookCalled | None = None
    #: bytes that earlier jobs have left in its memory
    kept: int = 0
