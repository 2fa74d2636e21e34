"""The pure brain of the pool: ``apply(event, now) -> actions``.

Owns what each event means for jobs: who ends how, and when all is over. Staffing and handing out are in
:mod:`mpworker.pool.lanes`. Never does I/O, never reads a clock, never touches a process; the same events give the same
actions.

Every job gets exactly one terminal frame (DONE or ENDED). What arrives after it is expected, counted and dropped.
"""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Iterable
from math import inf
from typing import Any

from mpworker.pool import facts as f
from mpworker.pool.facts import Action
from mpworker.pool.frames import Frame, Kind, pack_start
from mpworker.pool.jobs import Job, Lane, Span, Worker
from mpworker.pool.lanes import MAX_BOOT_FAILURES, START_GRACE, WORN, LaneBook
from mpworker.pool.page import results, who_ran
from mpworker.pool.parcel import Outcome, pack_verdict
from mpworker.pool.quota import Quota, over_quota
from mpworker.states import JobState, WorkerState

#: Seconds after a hard limit at which the dispatcher steps in, because the watchdog evidently cannot.
GUARD_GRACE = 0.5
#: Bytes of outcomes that may wait for the callback process before no new task is started.
HOOKS_HIGH_WATER = 64 << 20
_HOOK_COST = 1024  # of a callback in the queue, besides its outcome
_HOOK_ID = 1 << 62
# The members that each task needs: reading one from its enum takes longer than comparing it.
_ASSIGNED, _RUNNING, _BUSY, _KILLED, _TASKS, _HOOKS = (
    JobState.ASSIGNED,
    JobState.RUNNING,
    WorkerState.BUSY,
    WorkerState.KILLED,
    Lane.TASKS,
    Lane.HOOKS,
)
_STARTED, _DONE, _ERROR = Kind.STARTED, Kind.DONE, Outcome.ERROR
_TAKEN_BACK = {"reason": "taken back before it started"}
_STOPPED = {"reason": "the pool was stopped"}


class Ledger:
    """The state of one pool.

    Args:
        size: task workers wanted.
        ready_timeout: seconds a worker may take until it is ready.
        callback_limit: hard limit of each callback in seconds.
        max_tasks: jobs after which a worker is replaced, 0 for never.
        max_memory: peak memory in bytes after which it is replaced (checked between jobs), 0 for never.
        warm: a successor is prepared before a worker has to be replaced for its tasks or its memory.
        memory_limit: bytes that a job may use which brings no limit of its own, 0 for no limit.
    """

    def __init__(
        self,
        size: int,
        ready_timeout: float,
        callback_limit: float,
        max_tasks: int = 0,
        max_memory: int = 0,
        memory_limit: int = 0,
        warm: bool = True,
    ) -> None:
        self.jobs: dict[int, Job | Span] = {}
        #: answers that came too late
        self.late = 0
        self.begun = self.finished = False
        self._out: list[Action] = []
        ids = itertools.count()
        self._tasks = LaneBook(Lane.TASKS, size, ready_timeout, max_tasks, ids, self.jobs, self._out)
        self._hooks = LaneBook(Lane.HOOKS, 0, ready_timeout, 0, ids, self.jobs, self._out)
        self._books = (self._tasks, self._hooks)
        self._ready_timeout, self._callback_limit, self._max_memory = ready_timeout, callback_limit, max_memory
        self._max_tasks, self._warm = max_tasks, warm
        self.quota = Quota(memory_limit, self._out)
        self._next_hook = _HOOK_ID
        self._hook_load = 0
        self._parent_is_full = False
        self._ending = self._stopping = False
        self._recalled: set[int] = set()
        self._flush_tokens: list[int] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            f.Begun: self._begin,
            f.Submitted: self._submitted,
            f.BundleSubmitted: self._bundle_submitted,
            f.MemoryLimited: lambda event, now: self.quota.give(event.job, event.limit),
            f.MemoryKept: self._kept,
            f.MemoryUsed: self._used,
            f.WorkerWorn: self._worn,
            f.Cancelled: self._cancelled,
            f.Resized: lambda event, now: self._tasks.resize(event.size, now),
            f.FlushAsked: self._flush_asked,
            f.Paused: self._pause,
            f.Restarting: self._restart,
            f.Draining: self._drain,
            f.Stopping: self._stop,
            f.WorkerReady: self._ready,
            f.WorkerUnready: self._unready,
            f.JobStarted: self._started,
            f.SoftLimitHit: self._soft,
            f.JobProgressed: self._progressed,
            f.JobCut: self._cut,
            f.JobExpired: self._expired,
            f.HookCalled: self._hook_called,
            f.JobDone: self._done,
            f.JobRan: self._ran,
            f.JobsRan: self._several_ran,
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
        return self.apply_all((event,), now)

    def apply_all(self, events: Iterable[Any], now: float) -> list[Action]:
        """As :meth:`apply` for several events that have become known together."""
        if self.finished:  # nobody is there to act, nor to listen
            return []
        handlers = self._handlers
        for event in events:
            handlers[type(event)](event, now)
        if self._ending:
            self._wind_down(now)
        out = self._out[:]
        self._out.clear()
        return out

    def next_deadline(self) -> float:
        """When :class:`~mpworker.pool.facts.Ticked` is due at the latest; ``inf`` for never."""
        return min(book.next_deadline() for book in self._books)

    def resume(self) -> None:
        """For a dispatcher that replaces one whose workers were ready: what cannot be started now is tried on."""
        self._tasks.ever_ready = True

    @property
    def ever_ready(self) -> bool:
        """A task worker has been ready: what loads the application works, or worked."""
        return self._tasks.ever_ready

    def _find(self, worker: int) -> tuple[LaneBook, Worker] | None:
        if found := self._tasks.workers.get(worker):
            return self._tasks, found
        if found := self._hooks.workers.get(worker):
            return self._hooks, found
        if (spare := self._tasks.spare) is not None and spare.id == worker:
            return self._tasks, spare
        return None

    def _job(self, number: int) -> Job | None:
        """A job by its number; the bundle that it travels in is taken apart."""
        job = self.jobs.get(number)
        if type(job) is Span:
            self._tasks.apart(job)
            job = self.jobs[number]
        return job  # type: ignore[return-value]

    def _each(self) -> list[Job]:
        for span in {id(span): span for span in self.jobs.values() if type(span) is Span}.values():
            self._tasks.apart(span)
        return list(self.jobs.values())  # type: ignore[arg-type]

    # -- what the parent asks ------------------------------------------------------------------------------------

    def _begin(self, event: f.Begun, now: float) -> None:
        self.begun = True
        self._tasks.closed, self._hooks.closed = self._stopping, False  # callbacks run to the end all the same
        for book in self._books:
            book.balance(now)

    def _submitted(self, event: f.Submitted, now: float) -> None:
        job = event.job
        if self.quota.active:
            self.quota.admit(job)
        if job.id in self.jobs:
            self.late += 1
            return
        self.jobs[job.id] = job
        if self._stopping and job.lane is _TASKS:
            self._end(job, JobState.CANCELLED, _STOPPED, now)
        else:
            self._enqueue(job, now)

    def _bundle_submitted(self, event: f.BundleSubmitted, now: float) -> None:
        span = event.span
        if self._stopping or self.quota.active or not self.jobs.keys().isdisjoint(span.ids):
            for job in span.apart():
                self._submitted(f.Submitted(job), now)
            return
        self.jobs.update(dict.fromkeys(span.ids, span))
        self._enqueue(span, now)

    def _enqueue(self, job: Job | Span, now: float) -> None:
        book = self._tasks if type(job) is Span else self._books[job.lane]
        book.put(job)
        if not book.size and book is self._hooks:  # opens on first need
            book.size = 1
        if len(book.workers) < book.size:
            book.balance(now)
        if book.idle:
            book.feed(now)

    def _cancelled(self, event: f.Cancelled, now: float) -> None:
        job = self._job(event.job)
        if job is None:
            self.late += 1
            return
        facts = {"signal": event.signum}
        if job.worker is None:
            self._end(job, JobState.CANCELLED, facts, now)
            return
        if event.signum != signal.SIGUSR1 and job.verdict is None:  # SIGUSR1 is the soft limit: no verdict
            job.verdict = (JobState.CANCELLED, facts)
            if event.grace:
                job.guard = min(job.guard, now + event.grace)
        self._out.append(f.Signal(job.worker.id, job.id, event.signum))

    def _flush_asked(self, event: f.FlushAsked, now: float) -> None:
        for job in self._each():
            if job.lane is not Lane.TASKS:
                continue
            if job.worker is None:
                self._end(job, JobState.CANCELLED, _TAKEN_BACK, now)
            elif job.state is JobState.ASSIGNED:
                job.recalled = True
                self._recalled.add(job.id)
                self._out.append(f.Signal(job.worker.id, job.id, 0))
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

    def _pause(self, event: f.Paused, now: float) -> None:
        self._parent_is_full = event.on
        self._set_pause(now)

    def _set_pause(self, now: float) -> None:
        """Nothing new is started while results or callbacks pile up somewhere (invariant 9)."""
        full = HOOKS_HIGH_WATER if not self._tasks.paused else HOOKS_HIGH_WATER // 2
        self._tasks.paused = self._parent_is_full or self._hook_load > full
        self._tasks.feed(now)

    def _restart(self, event: f.Restarting, now: float) -> None:
        if self._ending:
            return
        if event.boot:
            self._out.append(f.Reload(event.boot))
        for book in self._books:
            for worker in book.everybody():
                if worker is book.spare or worker.state is WorkerState.STARTING:  # has loaded what was there before
                    self._end_worker(book, worker, now)
                elif worker.state in (WorkerState.IDLE, WorkerState.BUSY):
                    book.retire(worker, now)

    def _drain(self, event: f.Draining, now: float) -> None:
        self._ending = self._tasks.draining = self._hooks.draining = True

    def _stop(self, event: f.Stopping, now: float) -> None:
        self._ending = self._stopping = self._tasks.closed = self._hooks.draining = True
        for job in self._each():
            if job.lane is Lane.TASKS and job.worker is None:
                self._end(job, JobState.CANCELLED, _STOPPED, now)
            elif job.lane is Lane.TASKS:
                job.verdict = job.verdict or (JobState.CANCELLED, _STOPPED)
        for worker in self._tasks.everybody():
            self._end_worker(self._tasks, worker, now)

    # -- what workers report -------------------------------------------------------------------------------------

    def _ready(self, event: f.WorkerReady, now: float) -> None:
        if found := self._find(event.worker):
            book, worker = found
            if worker is book.spare:  # it has no slot yet; it says so again when it has
                self.late += 1
                return
            book.ready(worker, event.pid, now)
            if self._warm and self._max_tasks and book is self._tasks:
                book.wears_out(worker, now)

    def _unready(self, event: f.WorkerUnready, now: float) -> None:
        found = self._find(event.worker) if event.worker is not None else None
        if found is None and event.worker is not None:
            self.late += 1
        elif found is None or (found[0] is self._tasks and not found[0].ever_ready and not found[1].killed):
            self._break(event.why)
        else:  # its exit, which follows, counts as the failure
            self._log(logging.ERROR, f"a replacement worker did not get ready: {event.why}")

    def _started(self, event: f.JobStarted, now: float) -> None:
        found, job = self._find(event.worker), self._job(event.job)
        if found is None or job is None or job.worker is not found[1] or job.state is not _ASSIGNED:
            self.late += 1
            return
        worker = found[1]
        if worker.running is not None:
            self._faulty(f.WorkerFaulty(worker.id, "it began a task before it had ended the one before"), now)
            return
        at = event.at if event.at <= now else now  # a limit must not depend on what a worker makes up
        job.state, job.started = _RUNNING, at
        if job.hard:
            job.guard = min(job.guard, at + job.hard + GUARD_GRACE)
        worker.running, worker.call = job, None
        if job.memory:
            self.quota.watched[worker.id] = worker
        if worker.state is not _KILLED:
            worker.deadline = inf
        if job.lane is _TASKS:
            job.body = b""  # it never starts again
            self._tell(_STARTED, job.id, 0, at, float(worker.pid))
        else:
            self._tell(Kind.HOOK_STARTED, job.of or job.id)
        self._settle_recall(job)  # who has asked knows by then what had started

    def _soft(self, event: f.SoftLimitHit, now: float) -> None:
        found, job = self._find(event.worker), self._job(event.job)
        if found is None or job is None or job.worker is not found[1]:
            self.late += 1
        elif job.lane is _TASKS:
            self._tell(Kind.SOFT, job.id, a=event.limit)

    def _progressed(self, event: f.JobProgressed, now: float) -> None:
        if self._running(event) is not None and not self._parent_is_full:  # nobody needs it as much as its memory
            self._tell(Kind.PROGRESS, event.job, a=event.done, b=event.total, body=event.message)

    def _cut(self, event: f.JobCut, now: float) -> None:
        if self._running(event) is not None:
            self._tell(Kind.CUT, event.job, body=event.report)

    def _expired(self, event: f.JobExpired, now: float) -> None:
        if (found := self._running(event)) is not None:
            _, worker, job = found
            job.verdict = job.verdict or _timed_out(job, event.stack)
            job.guard = inf
            worker.killed = True  # by its watchdog
            worker.state, worker.deadline = WorkerState.KILLED, now + GUARD_GRACE

    def _kept(self, event: f.MemoryKept, now: float) -> None:
        if found := self._find(event.worker):
            found[1].kept = event.size

    def _worn(self, event: f.WorkerWorn, now: float) -> None:
        if (found := self._find(event.worker)) and found[1].state in (WorkerState.IDLE, WorkerState.BUSY):
            found[0].retire(found[1], now)

    def _used(self, event: f.MemoryUsed, now: float) -> None:
        if (found := self._running(event)) is not None:
            book, worker, job = found
            if self.quota.judge(worker, job, event, now):
                book.kill(worker, now)

    def _hook_called(self, event: f.HookCalled, now: float) -> None:
        if (found := self._running(event)) is not None:
            found[1].call = event

    def _running(self, event: Any) -> tuple[LaneBook, Worker, Job] | None:
        """The worker and the job of an event, if that worker runs that job; else the event is late."""
        found, job = self._find(event.worker), self._job(event.job)
        if found is None or job is None or found[1].running is not job:
            self.late += 1
            return None
        return found[0], found[1], job

    def _done(self, event: f.JobDone, now: float) -> None:
        if (found := self._running(event)) is None:
            return
        book, worker, job = found
        call, worker.call, worker.running, worker.hold = worker.call, None, None, False
        worker.jobs.remove(job)
        worker.load -= 1
        worker.done += 1
        book.note_runtime(event.runtime)
        if job.verdict is not None:
            self._end(job, *job.verdict, now)
        else:
            self._honour(call, now)
            self._finish(job, event, now)
        if self._warm and self._max_tasks and book is self._tasks:
            book.wears_out(worker, now)
        worn = (self._max_tasks and worker.done >= self._max_tasks) or self._outgrown(event.max_rss, now)
        if not worn and worker.state is _BUSY:
            book.hand_out(worker, now)
        elif worn and book is self._tasks and worker.state is _BUSY:
            book.retire(worker, now)
        else:
            self._go_on(book, worker, now)

    def _ran(self, event: f.JobRan, now: float) -> None:
        worker, job = self._tasks.workers.get(event.worker), self._job(event.job)
        plain = worker is not None and worker.state is _BUSY and worker.running is None and not self._max_tasks
        if not plain or job is None or job.worker is not worker or job.verdict or job.recalled or job.hooks:
            seen = (worker.running, worker.call) if worker is not None else (None, None)
            if worker is not None and seen[0] is not job and job is not None and job.worker is worker:
                worker.running = None
            if job is None or seen[0] is not job:  # else it was announced before
                self._started(f.JobStarted(event.worker, event.job, event.at), now)
            self._done(f.JobDone(event.worker, event.job, *event[3:]), now)
            if worker is not None and seen[0] not in (None, job):
                # That one was seen to run before this result, which waited for company, was heard.
                worker.running, worker.call = seen
                worker.deadline = worker.deadline if worker.state is _KILLED else inf
            return
        # The same in one go, for the frequent case.
        assert worker is not None
        _, _, at, flag, body, runtime, max_rss = event
        worker.jobs.remove(job)  # it is the first one
        worker.load -= 1
        worker.done += 1
        self._tasks.note_runtime(runtime)
        job.state = JobState.FAILED if flag == _ERROR else JobState.DONE
        del self.jobs[job.id]
        self._out.append(f.Tell(Frame(_DONE, job.id, flag, runtime, max_rss, pack_start(at, worker.pid), body)))
        if self._max_memory and self._outgrown(max_rss, now):
            self._tasks.retire(worker, now)
        else:
            self._tasks.hand_out(worker, now)

    def _outgrown(self, max_rss: float, now: float) -> bool:
        """Whether a worker has used too much memory to keep it. If it is about to, a successor is prepared."""
        if self._warm and 0 < self._max_memory * WORN < max_rss:
            self._tasks.prepare_spare(now)
        return 0 < self._max_memory < max_rss

    def _several_ran(self, event: f.JobsRan, now: float) -> None:
        worker = self._tasks.workers.get(event.worker)
        if worker is None or worker.state is not _BUSY or worker.running or not _are_next(event.jobs, worker):
            _, max_rss = who_ran(event.frame)
            for job, flag, started, seconds, body in results(event.frame):
                self._ran(f.JobRan(event.worker, job, started, flag, body, seconds, max_rss), now)
            return
        jobs, left = self.jobs, len(event.jobs)
        worker.load -= left
        worker.done += left
        self._tasks.note_runtime(event.runtime / left)
        for job in event.jobs:
            del jobs[job]
        while left:
            span = worker.jobs[0]
            assert type(span) is Span
            if left < len(span.lengths):
                span.take(left)
                break
            left -= len(span.lengths)
            worker.jobs.popleft()
        self._out.append(f.Tell(event.frame))
        if self._warm and self._max_tasks:
            self._tasks.wears_out(worker, now)
        worn = self._max_tasks and worker.done >= self._max_tasks
        if worn or (self._max_memory and self._outgrown(who_ran(event.frame)[1], now)):
            self._tasks.retire(worker, now)
        else:
            self._tasks.hand_out(worker, now)

    def _honour(self, call: f.HookCalled | None, now: float) -> None:
        """The callback that a task has asked for itself; it had ended by then, whatever became of its process."""
        if call is not None:
            self._out.append(f.Tell(Frame(Kind.HOOK_QUEUED, call.job, call.flag, 0.0, 0.0, call.hooks, call.body)))
            self._hook(call.job, call.flag, call.hooks, call.body, now)

    def _returned(self, event: f.JobReturned, now: float) -> None:
        found, job = self._find(event.worker), self._job(event.job)
        if found is None or job is None or job.worker is not found[1] or job.state is not JobState.ASSIGNED:
            self.late += 1
            return
        book, worker = found
        worker.jobs.remove(job)
        worker.load -= 1
        worker.hold = worker.running is not None
        self._requeue(job, now)
        if not worker.jobs:
            self._go_on(book, worker, now)
        book.feed(now)

    def _go_on(self, book: LaneBook, worker: Worker, now: float) -> None:
        """A worker has got rid of a job: more of them, or its leave."""
        if worker.state is WorkerState.BUSY:
            book.hand_out(worker, now)
        elif worker.state is WorkerState.STOPPING:
            if not worker.jobs:
                book.dismiss(worker, now)
            elif worker.running is None:  # it owes us what it has not started
                worker.deadline = now + START_GRACE

    def _requeue(self, job: Job | Span, now: float) -> None:
        job.worker = None
        if type(job) is Span:
            self._tasks.put(job, first=True)
            return
        job.guard = inf
        if job.verdict is not None:
            self._end(job, *job.verdict, now)
        elif job.recalled:
            self._end(job, JobState.CANCELLED, _TAKEN_BACK, now)
        else:
            job.state = JobState.QUEUED
            self._books[job.lane].put(job, first=True)

    def _faulty(self, event: f.WorkerFaulty, now: float) -> None:
        found = self._find(event.worker)
        if found is None:
            return
        book, worker = found
        if worker.killed or worker.state is _KILLED or (worker.state is WorkerState.STOPPING and not worker.jobs):
            return  # it is on its way
        worker.fault = event.why
        worker.deadline = now + GUARD_GRACE  # its exit usually follows at once, and tells more
        book.idle.pop(worker.id, None)
        if worker.state is not WorkerState.STARTING:
            worker.state = WorkerState.KILLED

    def _gone(self, event: f.WorkerGone, now: float) -> None:
        if (found := self._find(event.worker)) is None:
            return
        book, worker = found
        book.remove(worker)
        job = worker.running
        begun = {id(known): known for number in event.begun if (known := self._job(number)) and known.worker is worker}
        for waiting in reversed(worker.jobs):
            if waiting is job:
                continue
            if id(waiting) not in begun:
                self._requeue(waiting, now)
                continue
            ended = begun[id(waiting)]  # how it ended was said behind garbage, or not at all: once is enough
            self._end(ended, *(ended.verdict or _cause(ended, worker, event, now)), now)
        if job is not None:
            self._honour(worker.call, now)
            self._end(job, *(job.verdict or _cause(job, worker, event, now)), now)
        elif worker.state in (WorkerState.IDLE, WorkerState.BUSY) and not begun:
            self._log(logging.WARNING, f"an idle worker, process {worker.pid}, {_manner(event)}; it is replaced")
        if worker.state is WorkerState.STARTING:
            self._boot_failed(book, event, now)
        book.balance(now)
        book.feed(now)

    def _boot_failed(self, book: LaneBook, event: f.WorkerGone, now: float) -> None:
        """Before the first success it ends the pool; afterwards it is bad luck that may pass, such as no memory."""
        failures = book.boot_failed(now)
        manner = f"{failures} workers in a row died before they were ready; the last one {_manner(event)}"
        if book is self._tasks and not book.ever_ready:
            if failures >= MAX_BOOT_FAILURES:
                self._break(manner)
        elif failures == MAX_BOOT_FAILURES:
            self._log(logging.ERROR, f"{manner}; trying on")
        if book is self._hooks and failures >= MAX_BOOT_FAILURES:
            for job in [job for job in self._each() if job.queued and job.lane is Lane.HOOKS]:
                self._end(job, JobState.LOST, {"why": "the callback process cannot start"}, now)

    # -- time ----------------------------------------------------------------------------------------------------

    def _ticked(self, event: f.Ticked, now: float) -> None:
        for book in self._books:
            book.tick(now)
            for worker in book.everybody():
                job = worker.running
                if job is not None and job.guard <= now:
                    job.guard = inf
                    job.verdict = job.verdict or _timed_out(job)
                    book.kill(worker, now)
                elif worker.deadline <= now:
                    self._overdue(book, worker, now)

    def _overdue(self, book: LaneBook, worker: Worker, now: float) -> None:
        if worker.state is WorkerState.STARTING and not worker.killed:
            why = worker.fault or f"not ready within {self._ready_timeout:g} s"
            self._unready(f.WorkerUnready(worker.id, why), now)
        if not worker.looked and worker.state is _BUSY:
            worker.looked, worker.deadline = True, now + START_GRACE
            self._out.append(f.Look(worker.id))
        elif worker.final:  # not even SIGKILL: an uninterruptible wait in the kernel
            self._out.append(f.Abandon(worker.id))
            worker.deadline = inf
        else:
            book.kill(worker, now)

    # -- endings -------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, event: f.JobDone, now: float) -> None:
        job.state = JobState.FAILED if event.flag == _ERROR else JobState.DONE
        del self.jobs[job.id]
        if job.lane is _HOOKS:
            self._unload(job, now)
            self._tell(Kind.HOOK_ENDED, job.of or job.id, event.flag, body=event.body)
            return
        self._tell(_DONE, job.id, event.flag, event.runtime, event.max_rss, event.body)
        if job.hooks:
            self._hook(job.id, event.flag, job.hooks, event.body, now)

    def _end(self, job: Job, state: JobState, facts: dict[str, Any], now: float) -> None:
        """A job ends without its worker's word."""
        if self.jobs.pop(job.id, None) is None:
            return
        job.state = state
        if job.queued:
            self._books[job.lane].drop(job)
        body = pack_verdict(state, **facts)
        if job.lane is Lane.HOOKS:
            self._unload(job, now)
            self._tell(Kind.HOOK_ENDED, job.of or job.id, Outcome.VERDICT, body=body)
        else:
            self._tell(Kind.ENDED, job.id, Outcome.VERDICT, body=body)
            if job.hooks:
                self._hook(job.id, Outcome.VERDICT, job.hooks, body, now)
        job.body = b""  # the job may stay for a while: in a queue, or with the dead worker, which it holds in turn
        self._settle_recall(job)

    def _hook(self, of: int, flag: int, hooks: bytes, body: bytes, now: float) -> None:
        self._next_hook += 1
        job = Job(self._next_hook, Lane.HOOKS, flag, 0.0, self._callback_limit, hooks, body, of)
        self.jobs[job.id] = job
        self._hook_load += len(body) + _HOOK_COST
        self._enqueue(job, now)
        self._set_pause(now)

    def _unload(self, job: Job, now: float) -> None:
        if job.of:
            self._hook_load -= len(job.body) + _HOOK_COST
            self._set_pause(now)

    def _wind_down(self, now: float) -> None:
        if self.jobs or self.finished:
            return
        workers = [(book, worker) for book in self._books for worker in book.everybody()]
        for book, worker in workers:
            if worker.state is WorkerState.IDLE:
                book.retire(worker, now)
            elif worker.state is WorkerState.STARTING:  # nobody needs it any more
                self._end_worker(book, worker, now)
        if not workers:
            self.finished = True
            self._tell(Kind.BYE)
            self._out.append(f.Finish())

    @staticmethod
    def _end_worker(book: LaneBook, worker: Worker, now: float) -> None:
        if worker.state is WorkerState.STARTING:
            worker.state = WorkerState.STOPPING  # that it was never ready is no failure of its
        book.kill(worker, now)

    def _break(self, why: str) -> None:
        """The pool cannot go on; the parent fails what it still holds."""
        if not self.finished:
            self.finished = self._tasks.closed = self._hooks.closed = True
            self._tell(Kind.BROKEN, body=why.encode())
            self._out.append(f.Finish())

    def _tell(self, kind: Kind, job: int = 0, flag: int = 0, a: float = 0.0, b: float = 0.0, body: bytes = b"") -> None:
        self._out.append(f.Tell(Frame(kind, job, flag, a, b, b"", body)))

    def _log(self, level: int, text: str) -> None:
        self._tell(Kind.LOG, flag=level, body=text.encode())


def _are_next(jobs: tuple[int, ...], worker: Worker) -> bool:
    """Whether these are the next ones, in order, of the bundles that a worker has."""
    at = 0
    for span in worker.jobs:
        if type(span) is not Span:
            return False
        part = jobs[at : at + len(span.lengths)]
        if part != tuple(span.ids[: len(part)]):
            return False
        at += len(part)
        if at == len(jobs):
            return True
    return False


def _timed_out(job: Job, stack: str = "") -> tuple[JobState, dict[str, Any]]:
    return JobState.TIMED_OUT, {"limit": job.hard, "stack": stack}


def _cause(job: Job, worker: Worker, event: f.WorkerGone, now: float) -> tuple[JobState, dict[str, Any]]:
    """What a death means for the job that was running."""
    if job.asked < inf and event.signal == signal.SIGUSR1:  # an earlier task has meddled with what should hear it
        return over_quota(job.memory, job.rss - worker.kept)
    # The watchdog's last word may not have got out before its own signal struck.
    if job.hard and job.started and now - job.started >= job.hard and event.signal in (signal.SIGTERM, signal.SIGKILL):
        return _timed_out(job)
    return JobState.LOST, {
        "pid": worker.pid or None,
        "exitcode": event.exitcode,
        "signal": event.signal,
        "max_rss": event.max_rss,
        "rss": job.rss or None,
        "runtime": max(0.0, now - job.started) if job.started else None,
        "oom_killed": event.oom and not worker.killed,
        "by_pool": worker.killed,
        "why": worker.fault if worker.killed else "",
    }


def _manner(event: f.WorkerGone) -> str:
    if event.signal is not None:
        return f"was ended by signal {event.signal}"
    return "died" if event.exitcode is None else f"exited with code {event.exitcode}"
