"""The pure part of memory limits: which jobs have one, and what follows when a job passes it.

Owns the ladder: asked first, killed when that has not helped. Pure like the ledger it belongs to: no I/O, no clock, no
processes.
"""

from __future__ import annotations

from math import inf
from typing import Any

from mpworker.pool.facts import Action, AskToShrink, MemoryUsed
from mpworker.pool.jobs import Job, Lane, Worker
from mpworker.states import JobState

#: Seconds that a job gets to come below its limit, once it has been asked …
GRACE = 1.0
#: … unless it is found above this many times its limit.
FAR_ABOVE = 1.5


class Quota:
    """The jobs of one pool that have a limit.

    Args:
        limit: bytes for jobs that bring none of their own, 0 for no limit.
        out: where decisions are appended.
    """

    def __init__(self, limit: int, out: list[Action]) -> None:
        #: somebody has a limit: else nothing here is ever asked
        self.active = limit > 0
        #: workers that have started a job with a limit
        self.watched: dict[int, Worker] = {}
        self._limit, self._out = limit, out
        self._given: dict[int, int] = {}

    def give(self, job: int, limit: int) -> None:
        """The parent's word on a job that it submits next."""
        self.active = True
        self._given[job] = limit

    def admit(self, job: Job) -> None:
        """Notes a new job's limit in it."""
        limit = self._given.pop(job.id, self._limit)
        job.memory = limit if job.lane is Lane.TASKS else 0

    def running(self) -> list[tuple[Worker, Job]]:
        """Who runs a job with a limit."""
        found = [(worker, worker.running) for worker in self.watched.values() if worker.running is not None]
        found = [(worker, job) for worker, job in found if job.memory and job.state is JobState.RUNNING]
        self.watched = {worker.id: worker for worker, _ in found}
        return found

    def judge(self, worker: Worker, job: Job, event: MemoryUsed, now: float) -> bool:
        """Takes in how much a job's process group holds.

        Returns:
            whether it has to be killed for that; it has been asked before.
        """
        job.rss = event.used
        used = job.rss - worker.kept  # what earlier tasks left in this process is not this one's doing
        if used <= job.memory:
            job.asked = inf
            return False
        if job.verdict is not None:
            return False
        if job.asked == inf:
            job.asked = now
            self._out.append(AskToShrink(worker.id, job.id, job.memory, used))
            return False
        if now < job.asked + GRACE and used <= job.memory * FAR_ABOVE:
            return False
        job.verdict = over_quota(job.memory, used)
        return True


def over_quota(limit: int, used: int) -> tuple[JobState, dict[str, Any]]:
    """How a job ends that was killed for its memory."""
    return JobState.FAILED, {"memory_limit": limit, "used": used}
