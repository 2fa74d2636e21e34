"""One lane of the ledger: a queue, the workers that serve it, and who gets what next.

Owns handing out, staffing and the kill ladder. Pure like the ledger it belongs to: no I/O, no clock, no processes.
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from math import inf

from mpworker.pool import facts as f
from mpworker.pool.facts import Action
from mpworker.pool.jobs import NO_SLOT, Job, Lane, Span, Worker
from mpworker.states import JobState, WorkerState

#: Seconds between SIGTERM and SIGKILL.
TERM_TO_KILL = 0.1
#: Seconds after SIGKILL at which a process counts as gone although the kernel still holds it.
UNKILLABLE = 5.0
#: Seconds in which a ready worker must start what it was given. Longer means that it is stopped or stuck.
START_GRACE = 10.0
#: Seconds an idle worker may take to leave when asked.
LEAVE_GRACE = 5.0
#: Workers that may die in a row before one has ever been ready.
MAX_BOOT_FAILURES = 5
#: Seconds to wait after the first that dies before it is ready, then twice as long each time, and at most so long.
BOOT_BACKOFF = 0.1
BOOT_BACKOFF_MAX = 5.0
#: A backlog of tiny jobs is handed out in batches worth about this many seconds …
BATCH_SECONDS = 0.008
#: … and of at most this many jobs …
BATCH_JOBS = 256
#: … of which each costs so many seconds besides its run time.
JOB_COST = 5e-6
#: Jobs that take less than so many seconds do not wait for the dispatcher between two of them.
SHORT = 0.002
#: Seconds after which a worker that was given a bundle and is silent is looked at.
LOOK_AFTER = 0.1
#: A worker that will be worn out in so many seconds, or that begins its last job, gets a successor.
LEAD = 5.0
#: So does one whose memory has reached this share of what it may.
WORN = 0.8
_BLINK = 2e-5  # seconds: less is not told apart
_SHORTEST = 1e-7  # seconds that a run time counts at least
# The members that each task needs: reading one from its enum takes longer than comparing it.
_ASSIGNED, _BUSY, _HOOKS = JobState.ASSIGNED, WorkerState.BUSY, Lane.HOOKS


class LaneBook:
    """The queue and the workers of one lane.

    Args:
        size: workers wanted.
        ready_timeout: seconds a worker may take until it is ready.
        max_tasks: jobs after which a worker is replaced, 0 for never.
        ids: numbers for new workers.
        jobs: the ledger's, by number; a bundle stands there once for each of its jobs.
        out: where decisions are appended.
    """

    def __init__(
        self,
        lane: Lane,
        size: int,
        ready_timeout: float,
        max_tasks: int,
        ids: Iterator[int],
        jobs: dict[int, Job | Span],
        out: list[Action],
    ) -> None:
        self.lane, self.size = lane, size
        self.queue: deque[Job | Span] = deque()
        #: jobs in the queue that still want to run
        self.waiting = 0
        self.workers: dict[int, Worker] = {}
        self.idle: dict[int, Worker] = {}
        #: a successor that waits for a slot; never more than one, and it never has a job
        self.spare: Worker | None = None
        #: give out nothing for now
        self.paused = False
        #: start no worker for now
        self.closed = True
        #: start only as many workers as the queue needs
        self.draining = False
        self.ever_ready = False
        self._ready_timeout, self._max_tasks = ready_timeout, max_tasks
        self._ids, self._jobs, self._out = ids, jobs, out
        self._mean = 0.0  # running mean of run times in seconds; 0 until one is known
        self._boot_failures = 0
        self._spawn_at = inf

    # -- handing out ---------------------------------------------------------------------------------------------

    def feed(self, now: float) -> None:
        """Gives what waits to whoever is idle."""
        while self.queue and self.idle and not self.paused:
            self.hand_out(self.idle.popitem()[1], now)

    def hand_out(self, worker: Worker, now: float) -> None:
        """Gives an available worker what it can hold, or notes that it is idle."""
        if self.queue and worker.load <= BATCH_JOBS // 2:
            self._hand_batch(worker)
        if not worker.jobs:
            worker.state, worker.deadline = WorkerState.IDLE, inf
            self.idle[worker.id] = worker
        elif worker.running is None:
            worker.looked = type(worker.jobs[0]) is not Span
            worker.deadline = now + (START_GRACE if worker.looked else LOOK_AFTER)

    def _hand_batch(self, worker: Worker) -> None:
        room = 1 if worker.hold else self._depth()
        if self._max_tasks:
            room = min(room, self._max_tasks - worker.done)
        if worker.load <= room // 2 and not self.paused:
            while worker.load < room and (job := self._next(room - worker.load)) is not None:
                worker.jobs.append(job)
                worker.state = _BUSY
                job.worker = worker
                if type(job) is Span:
                    worker.load += len(job.lengths)
                else:
                    worker.load += 1
                    job.state = _ASSIGNED
                self._out.append(f.Assign(worker.id, job, room > 1))

    def _depth(self) -> int:
        if not self._mean or self.lane is _HOOKS:
            return 1
        fit = int(BATCH_SECONDS / (self._mean + JOB_COST))
        if fit < 2 and self._mean < SHORT:
            fit = 2  # one to run and one to go on with: the way here and back would take a good part of its time
        # A fair share of the queue, but for what is done sooner than another worker would be awake.
        share = max(self.waiting // max(1, len(self.workers)), fit // 5)
        return max(1, min(BATCH_JOBS, fit, share))

    def _next(self, most: int) -> Job | Span | None:
        queue = self.queue
        while queue:
            job = queue.popleft()
            if type(job) is Span:
                if job.jobs is None:
                    if len(job.lengths) > most:
                        queue.appendleft(job)
                        job = job.take(most)
                        self._jobs.update(dict.fromkeys(job.ids, job))
                    self.waiting -= len(job.lengths)
                    return job
                queue.extendleft(reversed(job.jobs))
            elif job.queued:
                job.queued = False
                self.waiting -= 1
                return job  # else it ended while it waited
        return None

    def apart(self, span: Span) -> list[Job]:
        """Something happens to one of these: from now on they are single jobs."""
        jobs, worker = span.apart(), span.worker
        self._jobs.update(zip(span.ids, jobs, strict=True))
        for job in jobs:
            if worker is None:
                job.queued = True
            else:
                job.state, job.worker = _ASSIGNED, worker
        if worker is not None:
            worker.jobs = deque(j for item in worker.jobs for j in (jobs if item is span else (item,)))
        return jobs

    def put(self, job: Job | Span, *, first: bool = False) -> None:
        """Queues a job, or puts one back to the front."""
        if type(job) is Span:
            self.waiting += len(job.lengths)
        else:
            job.queued = True
            self.waiting += 1
        (self.queue.appendleft if first else self.queue.append)(job)

    def drop(self, job: Job) -> None:
        """A job has ended while it waited; it leaves the queue when its turn comes."""
        job.queued = False
        self.waiting -= 1

    def note_runtime(self, seconds: float) -> None:
        """Takes one run time into the running mean; a single one that is far off, such as that of a process which had
        to wait for a processor, has little weight."""
        mean, seconds = self._mean, max(_SHORTEST, seconds)  # in this order NaN, which a worker may say, loses
        self._mean += (min(seconds, 8 * mean + _BLINK) - mean) * 0.1 if mean else min(seconds, 1.0)

    # -- staffing ------------------------------------------------------------------------------------------------

    def balance(self, now: float) -> None:
        """Asks for as many workers as are missing."""
        if self.closed or now < self._spawn_at < inf:
            return
        # A slot stays taken until its process is gone, so that two never share one.
        taken = {worker.slot for worker in self.workers.values()}
        free = [slot for slot in range(self.size) if slot not in taken]
        wanted = min(self.size, self.waiting) if self.draining else self.size
        for slot in free[: max(0, wanted - len(self.workers))]:
            spare = self.spare
            if spare is not None and not spare.killed and not spare.fault:
                self.spare, worker = None, spare
                worker.slot, worker.deadline = slot, now + self._ready_timeout
                self._out.append(f.Promote(worker.id, slot))
            else:
                worker = Worker(next(self._ids), slot, self.lane, now + self._ready_timeout)
                self._out.append(f.Spawn(worker.id, slot, self.lane))
            self.workers[worker.id] = worker

    def wears_out(self, worker: Worker, now: float) -> None:
        """Prepares a successor if this worker has to be replaced soon for the number of its jobs."""
        left = self._max_tasks - worker.done
        if left <= 1 or 0.0 < left * self._mean <= LEAD:
            self.prepare_spare(now)

    def prepare_spare(self, now: float) -> None:
        """Asks for a successor, if there is none yet and there may be work for it."""
        pointless = self.closed or not self.ever_ready or (self.draining and not self.waiting)
        if self.spare is None and not pointless and not now < self._spawn_at < inf:
            self.spare = Worker(next(self._ids), NO_SLOT, self.lane)
            self._out.append(f.Spawn(self.spare.id, NO_SLOT, self.lane))

    def everybody(self) -> list[Worker]:
        """Every process of this lane."""
        return [*self.workers.values(), *([self.spare] if self.spare is not None else [])]

    def resize(self, size: int, now: float) -> None:
        """Changes how many workers are wanted; surplus ones leave, idle ones and high slots first."""
        self.size = size
        staying = [w for w in self.workers.values() if w.state not in (WorkerState.STOPPING, WorkerState.KILLED)]
        surplus = len(staying) - size
        for worker in sorted(staying, key=lambda w: (bool(w.jobs), -w.slot))[: max(0, surplus)]:
            self.retire(worker, now)
        self.balance(now)

    def ready(self, worker: Worker, pid: int, now: float) -> None:
        """A worker has said that it can work."""
        worker.pid = pid
        self._boot_failures, self.ever_ready = 0, True
        if worker.state is WorkerState.STARTING and not worker.killed and not worker.fault:
            self.hand_out(worker, now)
        elif worker.state is WorkerState.STOPPING and not worker.jobs:
            self.dismiss(worker, now)

    def boot_failed(self, now: float) -> int:
        """A worker died before it was ready; the next waits a while.

        Returns:
            how many did so in a row.
        """
        self._boot_failures += 1
        self._spawn_at = now + min(BOOT_BACKOFF * 2 ** min(self._boot_failures - 1, 16), BOOT_BACKOFF_MAX)
        return self._boot_failures

    def remove(self, worker: Worker) -> None:
        """Its process has ended."""
        self.workers.pop(worker.id, None)
        self.idle.pop(worker.id, None)
        if worker is self.spare:
            self.spare = None

    def retire(self, worker: Worker, now: float) -> None:
        """Has a worker leave after its current job; what it has not started goes to others."""
        starting = worker.state is WorkerState.STARTING
        worker.state = WorkerState.STOPPING
        self.idle.pop(worker.id, None)
        for item in list(worker.jobs):
            for job in self.apart(item) if type(item) is Span else (item,):
                if job is not worker.running:
                    self._out.append(f.Signal(worker.id, job.id, 0))
        if not worker.jobs and not starting:  # one that starts is told when it is ready
            self.dismiss(worker, now)
        elif worker.jobs and worker.running is None:  # it owes us what it has not started
            worker.deadline = now + START_GRACE

    def dismiss(self, worker: Worker, now: float) -> None:
        """Asks a worker without jobs to leave."""
        worker.state, worker.deadline = WorkerState.STOPPING, now + LEAVE_GRACE
        self.idle.pop(worker.id, None)
        self._out.append(f.Dismiss(worker.id))

    def kill(self, worker: Worker, now: float) -> None:
        """Climbs the kill ladder by one rung."""
        first = not worker.killed
        self._out.append(f.Kill(worker.id, signal.SIGTERM if first else signal.SIGKILL))
        self.idle.pop(worker.id, None)
        worker.killed, worker.final = True, not first
        if worker.state is not WorkerState.STARTING:
            worker.state = WorkerState.KILLED
        worker.deadline = now + (TERM_TO_KILL if first else UNKILLABLE)

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Starts workers whose time has come."""
        if self._spawn_at <= now:
            self._spawn_at = inf
            self.balance(now)

    def next_deadline(self) -> float:
        """When something here is due; ``inf`` for never."""
        deadline = self._spawn_at
        if self.spare is not None:
            deadline = min(deadline, self.spare.deadline)
        for worker in self.workers.values():
            deadline = min(deadline, worker.deadline)
            if worker.running is not None:
                deadline = min(deadline, worker.running.guard)
        return deadline
