"""What the ledger is told and what it decides: plain values, named as facts. Holds no behaviour."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple, final

from mpworker.errors import ProtocolError
from mpworker.pool.frames import Frame, Kind, encode
from mpworker.states import JobState, WorkerState

#: Of a spare.
NO_SLOT = -1


class Lane(IntEnum):
    """A queue with workers of its own."""

    #: the tasks
    TASKS = 0
    #: their callbacks: one worker, first come first served
    HOOKS = 1


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


class Progress(NamedTuple):
    """What a task has last said of itself, by :func:`mpworker.progress`."""

    done: float
    total: float
    message: str


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


# -- events ----------------------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """Workers can be started."""


class Submitted(NamedTuple):
    job: Job


class BundleSubmitted(NamedTuple):
    span: Span


class MemoryLimited(NamedTuple):
    """Of a job that is submitted next."""

    job: int
    limit: int


class Cancelled(NamedTuple):
    job: int
    signum: int
    #: seconds until SIGKILL follows; 0: never
    grace: float


class Resized(NamedTuple):
    size: int


class FlushAsked(NamedTuple):
    token: int


class Paused(NamedTuple):
    """The parent does not read its results: assign nothing new until it does."""

    on: bool


class Draining(NamedTuple):
    """Nothing more will be submitted."""


class Restarting(NamedTuple):
    """Every worker shall be replaced once its job is done."""

    #: what children need from now on, opaque; empty: nothing has changed
    boot: bytes


class Stopping(NamedTuple):
    """Everything shall end now."""


class WorkerReady(NamedTuple):
    worker: int
    pid: int


class WorkerUnready(NamedTuple):
    #: ``None``: the preload, which stands for all of them
    worker: int | None
    why: str


class JobStarted(NamedTuple):
    worker: int
    job: int
    at: float


class SoftLimitHit(NamedTuple):
    worker: int
    job: int
    limit: float


class JobProgressed(NamedTuple):
    worker: int
    job: int
    done: float
    total: float
    message: bytes


class JobCut(NamedTuple):
    """A chunk will not begin the rest of its items: those are the parent's again."""

    worker: int
    job: int
    #: what is known of it, for the parent
    report: bytes


class JobExpired(NamedTuple):
    """The watchdog kills its process at the hard limit."""

    worker: int
    job: int
    #: where the task was, as text
    stack: str = ""


class HookCalled(NamedTuple):
    """A task asks for a callback of its own, to run when it is done."""

    worker: int
    job: int
    flag: int
    hooks: bytes
    body: bytes


class JobDone(NamedTuple):
    worker: int
    job: int
    flag: int
    body: bytes
    runtime: float
    max_rss: float


class JobRan(NamedTuple):
    """JobStarted and JobDone, heard together."""

    worker: int
    job: int
    at: float
    flag: int
    body: bytes
    runtime: float
    max_rss: float


class JobsRan(NamedTuple):
    """Several jobs of a bundle have started and ended, one after the other."""

    worker: int
    jobs: tuple[int, ...]
    #: of all together, in seconds
    runtime: float
    #: RESULTS, for the parent
    frame: Frame


class MemoryKept(NamedTuple):
    """What a worker holds, before its next job starts, beyond what it held when it was new."""

    worker: int
    size: int


class MemoryUsed(NamedTuple):
    """What a job's process group has been seen to hold, in bytes."""

    worker: int
    job: int
    used: int


class JobReturned(NamedTuple):
    worker: int
    job: int


class WorkerFaulty(NamedTuple):
    """Its line to the pool is closed or carries garbage: no more words, only its exit."""

    worker: int
    why: str


class WorkerGone(NamedTuple):
    """Its process has ended and everything that it had written has been told."""

    worker: int
    exitcode: int | None
    signal: int | None
    max_rss: int | None
    #: the kernel's out-of-memory killer has struck meanwhile
    oom: bool = False
    #: what its page says that it has begun, told or not
    begun: Collection[int] = ()


class Ticked(NamedTuple):
    """Only time has passed."""


# -- actions ---------------------------------------------------------------------------------------------------------


class Spawn(NamedTuple):
    """Slot ``NO_SLOT`` is for a spare, which loads the application and then waits until it is promoted."""

    worker: int
    slot: int
    lane: Lane


class Reload(NamedTuple):
    """Workers that are started from here on have the application as it is now."""

    boot: bytes


class Promote(NamedTuple):
    """The spare gets the slot of one that is gone: from here on it is a worker that starts."""

    worker: int
    slot: int


class Assign(NamedTuple):
    worker: int
    job: Job | Span
    #: others may follow before it is done
    batched: bool


class Look(NamedTuple):
    """It has jobs of a bundle and is silent: see in its page whether one runs."""

    worker: int


class Dismiss(NamedTuple):
    """Ask it to leave; it has nothing to do."""

    worker: int


class Signal(NamedTuple):
    """Through the watchdog: to the worker's group if, and only if, it runs this job (signal 0: only hand it back)."""

    worker: int
    job: int
    signum: int


class Kill(NamedTuple):
    """From outside, to the worker's whole group."""

    worker: int
    signum: int


class Abandon(NamedTuple):
    """Nothing ends this process: hear it out as if it were gone."""

    worker: int


class AskToShrink(NamedTuple):
    """Raise an exception in the worker's task, if it still runs this job."""

    worker: int
    job: int
    limit: int
    used: int


class Tell(NamedTuple):
    """To the parent."""

    frame: Frame


class Finish(NamedTuple):
    """The dispatcher's work is over."""


Action = Spawn | Reload | Promote | Assign | Look | Dismiss | Signal | Kill | Abandon | AskToShrink | Tell | Finish
