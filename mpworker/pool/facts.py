"""What the ledger is told and what it decides: plain values, named as facts. Holds no behaviour."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple

from mpworker.pool.frames import Frame
from mpworker.states import JobState, WorkerState

#: Of a spare.
NO_SLOT = -1


class Lane(IntEnum):
    """A queue with workers of its own."""

    #: the tasks
    TASKS = 0
    #: their callbacks: one worker, first come first served
    HOOKS = 1


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
    jobs: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    done: int = 0
    #: it handed jobs back: give it no more than one until its job is done
    hold: bool = False
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


class Ticked(NamedTuple):
    """Only time has passed."""


# -- actions ---------------------------------------------------------------------------------------------------------


class Spawn(NamedTuple):
    """Slot ``NO_SLOT`` is for a spare, which loads the application and then waits until it is promoted."""

    worker: int
    slot: int
    lane: Lane


class Promote(NamedTuple):
    """The spare gets the slot of one that is gone: from here on it is a worker that starts."""

    worker: int
    slot: int


class Assign(NamedTuple):
    worker: int
    job: Job
    #: others may follow before it is done
    batched: bool


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


Action = Spawn | Promote | Assign | Dismiss | Signal | Kill | AskToShrink | Tell | Finish
