"""The pure brain of the pool: ``apply(event, now) -> actions``.

Owns every decision: who gets which job, when a limit has passed, what a death means, when all is over. Never does I/O,
never reads a clock, never touches a process; the same events give the same actions.

Every job gets exactly one terminal frame (DONE or ENDED). What arrives after it is expected, counted and dropped.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from mpworker.pool import facts as f
from mpworker.pool.facts import Action, Job, Lane, Worker
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.parcel import Outcome, pack_verdict
from mpworker.states import JobState, WorkerState

#: Seconds after a hard limit at which the dispatcher steps in, because the watchdog evidently cannot.
GUARD_GRACE = 0.5
#: Seconds between SIGTERM and SIGKILL.
TERM_TO_KILL = 0.1
#: Seconds in which a ready worker must start what it was given. Longer means that it is stopped or stuck.
START_GRACE = 10.0
#: Seconds after SIGKILL at which a process counts as gone although the kernel still holds it.
UNKILLABLE = 5.0
#: Seconds an idle worker may take to leave when asked.
LEAVE_GRACE = 5.0
#: Workers that may die in a row before they are ready.
MAX_BOOT_FAILURES = 5
#: A backlog of tiny jobs is handed out in batches worth about this many seconds …
BATCH_SECONDS = 0.001
#: … and of at most this many jobs.
BATCH_JOBS = 64
_HOOK_ID = 1 << 62


@dataclass(slots=True)
class _LaneBook:
    """The queue and the workers of one lane."""

    lane: Lane
    size: int
    queue: deque[Job] = field(default_factory=deque)
    workers: dict[int, Worker] = field(default_factory=dict)
    idle: dict[int, Worker] = field(default_factory=dict)
    #: running mean of run times, in seconds; 0 until one is known
    mean: float = 0.0
    boot_failures: int = 0
    ever_ready: bool = False
    spawn_at: float = inf


class Ledger:
    """The state of one pool.

    Args:
        size: task workers wanted.
        ready_timeout: seconds a worker may take until it is ready.
        callback_limit: hard limit of each callback in seconds.
        max_tasks: jobs after which a worker is replaced, 0 for never.
        max_memory: peak memory in bytes after which it is replaced (checked between jobs), 0 for never.
    """

    def __init__(
        self, size: int, ready_timeout: float, callback_limit: float, max_tasks: int = 0, max_memory: int = 0
    ) -> None:
        self.jobs: dict[int, Job] = {}
        self.late = 0
        self.begun = False
        self._lanes = {Lane.TASKS: _LaneBook(Lane.TASKS, size), Lane.HOOKS: _LaneBook(Lane.HOOKS, 0)}
        self._workers: dict[int, Worker] = {}
        self._ready_timeout, self._callback_limit = ready_timeout, callback_limit
        self._max_tasks, self._max_memory = max_tasks, max_memory
        self._next_worker = self._next_hook = 0
        self._paused = self._draining = self._stopping = self._finished = False
        self._recalled: set[int] = set()
        self._flush_tokens: list[int] = []
        self._out: list[Action] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            f.Submitted: self._submitted,
            f.Cancelled: self._cancelled,
            f.Resized: self._resized,
            f.FlushAsked: self._flush_asked,
            f.Paused: self._set_paused,
            f.Draining: self._set_draining,
            f.Stopping: self._set_stopping,
            f.WorkerReady: self._ready,
            f.WorkerUnready: self._unready,
            f.JobStarted: self._started,
            f.SoftLimitHit: self._soft,
            f.JobExpired: self._expired,
            f.HookCalled: self._hook_called,
            f.JobDone: self._done,
            f.JobReturned: self._returned,
            f.WorkerFaulty: self._faulty,
            f.WorkerGone: self._gone,
            f.Ticked: self._ticked,
        }

    def apply(self, event: Any, now: float) -> list[Action]:
        """Takes in one event and returns what to do, in order.

        Args:
            event: one of the events in :mod:`mpworker.pool.facts`.
            now: ``time.monotonic()``.
        """
        self._handlers[type(event)](event, now)
        if self._draining or self._stopping:
            self._wind_down(now)
        out, self._out = self._out, []
        return out

    def start(self, now: float) -> list[Action]:
        """The first actions: workers for the tasks."""
        self.begun = True
        self._balance(self._lanes[Lane.TASKS], now)
        return self.apply(f.Ticked(), now)

    def next_deadline(self) -> float:
        """When :class:`Ticked` is due at the latest; ``inf`` for never."""
        deadline = min(book.spawn_at for book in self._lanes.values())
        for worker in self._workers.values():
            deadline = min(deadline, worker.deadline)
            if worker.running is not None:
                deadline = min(deadline, worker.running.guard)
        return deadline

    @property
    def backlog(self) -> int:
        """Jobs that have no terminal state yet."""
        return len(self.jobs)

    # -- what the parent asks ------------------------------------------------------------------------------------

    def _submitted(self, event: f.Submitted, now: float) -> None:
        job = event.job
        self.jobs[job.id] = job
        if self._stopping and job.lane is Lane.TASKS:
            self._end(job, JobState.CANCELLED, {"reason": "the pool is shutting down"}, now)
            return
        self._enqueue(job, now)

    def _enqueue(self, job: Job, now: float) -> None:
        book = self._lanes[job.lane]
        book.queue.append(job)
        if book.lane is Lane.HOOKS and not book.size:  # opens on first need
            book.size = 1
            self._balance(book, now)
        if book.idle:
            self._assign(book, book.idle.popitem()[1], now)

    def _cancelled(self, event: f.Cancelled, now: float) -> None:
        job = self.jobs.get(event.job)
        if job is None:
            self.late += 1
            return
        facts = {"signal": event.signum}
        if job.state is JobState.QUEUED:
            self._end(job, JobState.CANCELLED, facts, now)
            return
        if event.signum != signal.SIGUSR1 and job.verdict is None:  # SIGUSR1 is the soft limit: no verdict
            job.verdict = (JobState.CANCELLED, facts)
            if event.grace:
                job.guard = min(job.guard, now + event.grace)
        worker = self._worker_of(job)
        if worker is not None:
            self._out.append(f.Signal(worker.id, job.id, event.signum))

    def _resized(self, event: f.Resized, now: float) -> None:
        book = self._lanes[Lane.TASKS]
        book.size = event.size
        for worker in sorted(book.workers.values(), key=lambda w: (bool(w.jobs), -w.slot)):
            if len(self._staying(book)) <= book.size:
                break
            if worker.state in (WorkerState.IDLE, WorkerState.BUSY):
                self._retire(book, worker, now)
        self._balance(book, now)

    def _flush_asked(self, event: f.FlushAsked, now: float) -> None:
        for job in list(self.jobs.values()):
            if job.lane is not Lane.TASKS:
                continue
            if job.state is JobState.QUEUED:
                self._end(job, JobState.CANCELLED, {"reason": "taken back before it started"}, now)
            elif job.state is JobState.ASSIGNED and (worker := self._worker_of(job)) is not None:
                job.recalled = True
                self._recalled.add(job.id)
                self._out.append(f.Signal(worker.id, job.id, 0))
        self._flush_tokens.append(event.token)
        self._answer_flush()

    def _answer_flush(self) -> None:
        if not self._recalled:
            for token in self._flush_tokens:
                self._tell(Kind.FLUSHED, token)
            self._flush_tokens.clear()

    def _settle_recall(self, job: Job) -> None:
        if job.recalled:
            job.recalled = False
            self._recalled.discard(job.id)
            self._answer_flush()

    def _set_paused(self, event: f.Paused, now: float) -> None:
        self._paused = event.on
        book = self._lanes[Lane.TASKS]
        while not self._paused and book.queue and book.idle:
            self._assign(book, book.idle.popitem()[1], now)

    def _set_draining(self, event: f.Draining, now: float) -> None:
        self._draining = True

    def _set_stopping(self, event: f.Stopping, now: float) -> None:
        self._stopping = True
        for job in list(self.jobs.values()):
            if job.lane is Lane.TASKS and job.state is JobState.QUEUED:
                self._end(job, JobState.CANCELLED, {"reason": "the pool was stopped"}, now)
        for worker in list(self._lanes[Lane.TASKS].workers.values()):
            for job in worker.jobs:
                job.verdict = job.verdict or (JobState.CANCELLED, {"reason": "the pool was stopped"})
            self._kill(worker, now)

    # -- what workers report -------------------------------------------------------------------------------------

    def _ready(self, event: f.WorkerReady, now: float) -> None:
        worker = self._workers.get(event.worker)
        if worker is None:
            return
        book = self._lanes[worker.lane]
        worker.pid = event.pid
        book.boot_failures, book.ever_ready = 0, True
        if worker.state is WorkerState.STARTING:
            worker.state, worker.deadline = WorkerState.IDLE, inf
            self._assign(book, worker, now)
        elif worker.state is WorkerState.STOPPING:
            self._dismiss(worker, now)

    def _unready(self, event: f.WorkerUnready, now: float) -> None:
        worker = self._workers.get(event.worker) if event.worker is not None else None
        book = self._lanes[worker.lane if worker else Lane.TASKS]
        if worker is None or not book.ever_ready:
            self._break(event.why)
        else:
            # Its exit, which follows, counts as the failure.
            self._log(logging.ERROR, f"a replacement worker did not get ready: {event.why}")

    def _started(self, event: f.JobStarted, now: float) -> None:
        worker, job = self._workers.get(event.worker), self.jobs.get(event.job)
        if worker is None or job is None or job.state is not JobState.ASSIGNED:
            self.late += 1
            return
        job.state, job.started = JobState.RUNNING, event.at
        if job.hard:
            job.guard = min(job.guard, event.at + job.hard + GUARD_GRACE)
        worker.running, worker.call = job, None
        if worker.state is WorkerState.BUSY:
            worker.deadline = inf
        self._settle_recall(job)
        if job.lane is Lane.TASKS:
            self._tell(Kind.STARTED, job.id, a=event.at, b=float(worker.pid))

    def _soft(self, event: f.SoftLimitHit, now: float) -> None:
        job = self.jobs.get(event.job)
        if job is not None and job.lane is Lane.TASKS:
            self._tell(Kind.SOFT, job.id, a=event.limit)

    def _expired(self, event: f.JobExpired, now: float) -> None:
        worker, job = self._workers.get(event.worker), self.jobs.get(event.job)
        if worker is None or job is None or worker.running is not job:
            self.late += 1
            return
        job.verdict = job.verdict or _timed_out(job, event.stack)
        job.guard = inf
        worker.killed = True
        worker.state, worker.deadline = WorkerState.KILLED, now + GUARD_GRACE

    def _hook_called(self, event: f.HookCalled, now: float) -> None:
        worker = self._workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            worker.call = event

    def _done(self, event: f.JobDone, now: float) -> None:
        worker, job = self._workers.get(event.worker), self.jobs.get(event.job)
        if worker is None or job is None or worker.running is not job:
            self.late += 1
            return
        book = self._lanes[worker.lane]
        call, worker.call, worker.running, worker.hold = worker.call, None, None, False
        worker.jobs.remove(job)
        worker.done += 1
        book.mean += (event.runtime - book.mean) * 0.1 if book.mean else event.runtime
        if job.verdict is None:
            if call is not None:
                self._hook(job.id, call.flag, call.hooks, call.body, now)
            self._finish(job, event, now)
        else:
            self._end(job, *job.verdict, now)
        worn = (self._max_tasks and worker.done >= self._max_tasks and worker.lane is Lane.TASKS) or (
            self._max_memory and event.max_rss > self._max_memory
        )
        if worn and worker.state is WorkerState.BUSY:
            self._retire(book, worker, now)
        elif worker.state is WorkerState.BUSY:
            self._assign(book, worker, now)
        elif worker.state is WorkerState.STOPPING and not worker.jobs:
            self._dismiss(worker, now)

    def _returned(self, event: f.JobReturned, now: float) -> None:
        worker, job = self._workers.get(event.worker), self.jobs.get(event.job)
        if worker is None or job is None or job not in worker.jobs:
            self.late += 1
            return
        worker.jobs.remove(job)
        worker.hold = worker.running is not None
        self._requeue(job, now)
        book = self._lanes[worker.lane]
        if not worker.jobs and worker.state is WorkerState.BUSY:
            self._assign(book, worker, now)
        elif not worker.jobs and worker.state is WorkerState.STOPPING:
            self._dismiss(worker, now)
        if book.queue and book.idle:
            self._assign(book, book.idle.popitem()[1], now)

    def _requeue(self, job: Job, now: float) -> None:
        job.state = JobState.QUEUED
        recalled = job.recalled
        if job.verdict is not None or recalled:
            state, facts = job.verdict or (JobState.CANCELLED, {"reason": "taken back before it started"})
            self._end(job, state, facts, now)
        else:
            self._lanes[job.lane].queue.appendleft(job)

    def _faulty(self, event: f.WorkerFaulty, now: float) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state in (WorkerState.STOPPING, WorkerState.KILLED):
            return
        job = worker.running
        if job is not None and job.verdict is None:
            job.verdict = (JobState.LOST, {"pid": worker.pid, "why": event.why})
        self._lanes[worker.lane].idle.pop(worker.id, None)
        # Its exit usually follows at once, and tells more.
        worker.deadline = now + GUARD_GRACE
        if worker.state is not WorkerState.STARTING:
            worker.state = WorkerState.KILLED

    def _gone(self, event: f.WorkerGone, now: float) -> None:
        worker = self._workers.pop(event.worker, None)
        if worker is None:
            return
        book = self._lanes[worker.lane]
        book.workers.pop(worker.id, None)
        book.idle.pop(worker.id, None)
        for waiting in reversed(worker.jobs):
            if waiting is not worker.running:
                self._requeue(waiting, now)
        job = worker.running
        if job is not None:
            if job.verdict is not None and "why" in job.verdict[1] and not worker.killed:
                job.verdict = None  # the exit itself says more than the closed line did
            self._end(job, *(job.verdict or self._cause(job, worker, event, now)), now)
        if worker.state is WorkerState.STARTING and not self._finished:
            self._boot_failure(book, event, now)
        elif job is None and worker.state in (WorkerState.IDLE, WorkerState.BUSY):
            self._log(logging.WARNING, f"an idle worker, process {worker.pid}, {_manner(event)}; it is replaced")
        self._balance(book, now)
        while book.queue and book.idle and not (self._paused and book.lane is Lane.TASKS):
            self._assign(book, book.idle.popitem()[1], now)

    def _cause(self, job: Job, worker: Worker, event: f.WorkerGone, now: float) -> tuple[JobState, dict[str, Any]]:
        # The watchdog's last word may not have got out before its own signal struck.
        if job.hard and now - job.started >= job.hard and event.signal in (signal.SIGTERM, signal.SIGKILL):
            return _timed_out(job)
        return JobState.LOST, {
            "pid": worker.pid or None,
            "exitcode": event.exitcode,
            "signal": event.signal,
            "max_rss": event.max_rss,
            "by_pool": worker.killed,
        }

    def _boot_failure(self, book: _LaneBook, event: f.WorkerGone, now: float) -> None:
        book.boot_failures += 1
        if book.boot_failures >= MAX_BOOT_FAILURES:
            self._break(f"{book.boot_failures} workers in a row died before they were ready; the last {_manner(event)}")
            return
        book.spawn_at = now + 0.05 * 2**book.boot_failures

    # -- time ----------------------------------------------------------------------------------------------------

    def _ticked(self, event: f.Ticked, now: float) -> None:
        for book in self._lanes.values():
            if book.spawn_at <= now:
                book.spawn_at = inf
                self._balance(book, now)
        for worker in list(self._workers.values()):
            job = worker.running
            if job is not None and job.guard <= now:
                job.guard = inf
                job.verdict = job.verdict or _timed_out(job)
                self._kill(worker, now)
            elif worker.deadline <= now:
                self._overdue(worker, now)

    def _overdue(self, worker: Worker, now: float) -> None:
        if worker.state is WorkerState.STARTING:
            self._unready(f.WorkerUnready(worker.id, f"not ready within {self._ready_timeout:g} s"), now)
        if worker.final:  # not even SIGKILL: an uninterruptible wait in the kernel
            self._gone(f.WorkerGone(worker.id, None, signal.SIGKILL, None), now)
        else:
            self._kill(worker, now)

    def _kill(self, worker: Worker, now: float) -> None:
        """Climbs the kill ladder by one rung."""
        first = not worker.killed
        self._out.append(f.Kill(worker.id, signal.SIGTERM if first else signal.SIGKILL))
        self._lanes[worker.lane].idle.pop(worker.id, None)
        worker.killed, worker.final = True, not first
        if worker.state is not WorkerState.STARTING:
            worker.state = WorkerState.KILLED
        worker.deadline = now + (TERM_TO_KILL if first else UNKILLABLE)

    # -- handing out ---------------------------------------------------------------------------------------------

    def _assign(self, book: _LaneBook, worker: Worker, now: float) -> None:
        """Gives an available worker what it can hold, or notes that it is idle."""
        hooks = book.lane is Lane.HOOKS
        room = 1 if hooks or worker.hold else self._depth(book)
        if self._max_tasks and not hooks:
            room = min(room, self._max_tasks - worker.done)
        if len(worker.jobs) <= room // 2 and (hooks or not self._paused):
            while len(worker.jobs) < room and (job := self._pop(book)) is not None:
                if not worker.jobs:
                    worker.deadline = now + START_GRACE
                worker.jobs.append(job)
                worker.state = WorkerState.BUSY
                job.state = JobState.ASSIGNED
                self._out.append(f.Assign(worker.id, job))
        if worker.jobs:
            worker.deadline = now + START_GRACE if worker.running is None else inf
        else:
            worker.state, worker.deadline = WorkerState.IDLE, inf
            book.idle[worker.id] = worker

    def _depth(self, book: _LaneBook) -> int:
        if not book.mean:
            return 1
        share = len(book.queue) // max(1, len(book.workers))
        return max(1, min(BATCH_JOBS, int(BATCH_SECONDS / book.mean), share))

    def _pop(self, book: _LaneBook) -> Job | None:
        while book.queue:
            job = book.queue.popleft()
            if job.state is JobState.QUEUED:  # else cancelled while it waited
                return job
        return None

    def _staying(self, book: _LaneBook) -> list[Worker]:
        leaving = (WorkerState.STOPPING, WorkerState.KILLED)
        return [worker for worker in book.workers.values() if worker.state not in leaving]

    def _balance(self, book: _LaneBook, now: float) -> None:
        """Asks for as many workers as are missing."""
        if not self.begun or (self._stopping and book.lane is Lane.TASKS) or self._finished or now < book.spawn_at < inf:
            return
        # A slot stays taken until its process is gone, so that two never share one.
        taken = {worker.slot for worker in book.workers.values()}
        wanted = book.size if not self._draining else min(book.size, len(book.queue) + len(book.workers))
        for slot in range(wanted):
            if slot not in taken:
                worker = Worker(self._next_worker, slot, book.lane, deadline=now + self._ready_timeout)
                self._next_worker += 1
                self._workers[worker.id] = book.workers[worker.id] = worker
                self._out.append(f.Spawn(worker.id, slot, book.lane))

    def _dismiss(self, worker: Worker, now: float) -> None:
        worker.deadline = now + LEAVE_GRACE
        self._out.append(f.Dismiss(worker.id))

    def _retire(self, book: _LaneBook, worker: Worker, now: float) -> None:
        worker.state = WorkerState.STOPPING
        book.idle.pop(worker.id, None)
        for job in worker.jobs:
            if job is not worker.running:
                self._out.append(f.Signal(worker.id, job.id, 0))
        if not worker.jobs:
            self._dismiss(worker, now)

    def _worker_of(self, job: Job) -> Worker | None:
        return next((w for w in self._lanes[job.lane].workers.values() if job in w.jobs), None)

    # -- endings -------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, event: f.JobDone, now: float) -> None:
        failed = event.flag == Outcome.ERROR
        job.state = JobState.FAILED if failed else JobState.DONE
        del self.jobs[job.id]
        if job.lane is Lane.TASKS:
            self._tell(Kind.DONE, job.id, event.flag, a=event.runtime, b=event.max_rss, body=event.body)
            if job.hooks:
                self._hook(job.id, event.flag, job.hooks, event.body, now)
        else:
            self._tell(Kind.HOOK_ENDED, job.of or job.id, event.flag, body=event.body)

    def _end(self, job: Job, state: JobState, facts: dict[str, Any], now: float) -> None:
        """A job ends without its worker's word."""
        if self.jobs.pop(job.id, None) is None:
            return
        job.state = state
        body = pack_verdict(state, **facts)
        self._settle_recall(job)
        if job.lane is Lane.TASKS:
            self._tell(Kind.ENDED, job.id, Outcome.VERDICT, body=body)
            if job.hooks:
                self._hook(job.id, Outcome.VERDICT, job.hooks, body, now)
        else:
            self._tell(Kind.HOOK_ENDED, job.of or job.id, Outcome.VERDICT, body=body)

    def _hook(self, of: int, flag: int, hooks: bytes, body: bytes, now: float) -> None:
        self._next_hook += 1
        job = Job(_HOOK_ID + self._next_hook, Lane.HOOKS, flag, 0.0, self._callback_limit, hooks, body, of)
        self.jobs[job.id] = job
        self._enqueue(job, now)

    def _wind_down(self, now: float) -> None:
        if self.jobs or self._finished:
            return
        for worker in list(self._workers.values()):
            if worker.state in (WorkerState.IDLE, WorkerState.STARTING):
                idle = worker.state is WorkerState.IDLE
                worker.state = WorkerState.STOPPING
                self._lanes[worker.lane].idle.pop(worker.id, None)
                if idle:
                    self._dismiss(worker, now)
        if not self._workers:
            self._finished = True
            self._tell(Kind.BYE)
            self._out.append(f.Finish())

    def _break(self, why: str) -> None:
        """The pool cannot go on; the parent fails what it still holds."""
        if not self._finished:
            self._finished = True
            self._tell(Kind.BROKEN, body=why.encode())
            self._out.append(f.Finish())

    def _tell(self, kind: Kind, job: int = 0, flag: int = 0, a: float = 0.0, b: float = 0.0, body: bytes = b"") -> None:
        self._out.append(f.Tell(Frame(kind, job, flag, a, b, b"", body)))

    def _log(self, level: int, text: str) -> None:
        self._tell(Kind.LOG, flag=level, body=text.encode())


def _timed_out(job: Job, stack: str = "") -> tuple[JobState, dict[str, Any]]:
    return JobState.TIMED_OUT, {"limit": job.hard, "stack": stack}


def _manner(event: f.WorkerGone) -> str:
    if event.signal is not None:
        return f"was ended by signal {event.signal}"
    return f"exited with code {event.exitcode}"
