"""What the ledger is told and what it decides: plain values, named as facts. Holds no behaviour."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from mpworker.pool.frames import Frame
from mpworker.pool.jobs import Job, Lane, Span

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


class WorkerWorn(NamedTuple):
    """It asks to be replaced once its job is done."""

    worker: int


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
