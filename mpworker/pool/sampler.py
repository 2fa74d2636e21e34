"""How much memory the jobs with a limit hold, looked at now and then.

Owns the pace. Decides nothing: what a figure means for a job is :mod:`mpworker.pool.quota`'s.
"""

from __future__ import annotations

import time
from math import inf

from mpworker.pool.facts import MemoryUsed
from mpworker.pool.jobs import Job, Worker
from mpworker.pool.memory import TICK, members, resident

#: Seconds between two looks at the workers whose jobs have a limit: when all are far from it, and when one is not.
CALM, ALERT = 0.1, 0.05
#: The share of its limit up to which a job is far from it.
_FAR = 0.5
#: Seconds between two looks for the processes that tasks have started: all of /proc has to be read for that.
_SCAN_PAUSE = 0.25
#: Jobs younger than that have started none yet, as far as is known: small ones cost no such look.
_YOUNG = 0.25
#: Looking takes no more than this part of the loop's time, however many processes there are.
_SHARE = 0.02


class Sampler:
    """Looks at the workers whose jobs have a limit, at a pace that the loop does not feel.

    What counts is the memory of the worker and of every process of its group that was started after the job: what an
    earlier task left behind is not this one's.
    """

    def __init__(self) -> None:
        #: when the next look is due, by ``time.monotonic()``, if there is anybody to look at
        self.due = 0.0
        self._scan_due = 0.0
        #: bytes in other processes of a job, as of the last scan
        self._others: dict[int, int] = {}

    def look(self, jobs: list[tuple[Worker, Job]], now: float) -> list[MemoryUsed]:
        """One figure for each job, but for those of which only a look at all processes could tell, which is not due.

        Args:
            jobs: who runs what.
            now: ``time.monotonic()``.
        """
        scanned = now >= self._scan_due and any(now - job.started > _YOUNG for _, job in jobs)
        if scanned:
            self._scan(jobs, now)
        begun = time.monotonic()
        found, pace = [], CALM
        for worker, job in jobs:
            own = resident(worker.pid)
            used = own + self._others.get(job.id, 0)
            if used >= job.memory * _FAR:
                pace = ALERT
            # 0: it is about to be reaped. And what others held at the last scan may be gone: that accuses nobody.
            if own and (scanned or own > job.memory or used <= job.memory):
                found.append(MemoryUsed(worker.id, job.id, used))
        ended = time.monotonic()
        self.due = ended + max(pace, (ended - begun) / _SHARE)
        return found

    def _scan(self, jobs: list[tuple[Worker, Job]], now: float) -> None:
        since_boot = _since_boot() - now
        # Two clock ticks of leave: the kernel rounds the start of a process down.
        starts = {worker.pid: (job.id, job.started + since_boot - 2 * TICK) for worker, job in jobs}
        self._others = dict.fromkeys((job.id for _, job in jobs), 0)
        for pid, group, started, size in members():
            if group in starts and pid != group and started >= starts[group][1]:
                self._others[starts[group][0]] += size
        self._scan_due = time.monotonic() + max(_SCAN_PAUSE, (time.monotonic() - now) / _SHARE)


def _since_boot() -> float:
    try:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return inf  # nobody started after that: only the worker itself counts
