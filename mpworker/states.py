"""The states of jobs and workers, and which state may follow which. Holds no behaviour.

Job     QUEUED → ASSIGNED → RUNNING → a terminal state; ASSIGNED → QUEUED when a worker hands a job back;
        any state that is not terminal → CANCELLED or LOST. Terminal states absorb.
Worker  STARTING → IDLE ⇄ BUSY → STOPPING → GONE; any state → KILLED → GONE.
"""

from __future__ import annotations

from enum import Enum


class JobState(Enum):
    """Where a job is. The last five are terminal."""

    #: waits in the dispatcher
    QUEUED = "queued"
    #: lies in a worker's inbox, not started
    ASSIGNED = "assigned"
    #: the worker has said that it runs
    RUNNING = "running"
    #: returned a value
    DONE = "done"
    #: raised, or was killed because it used too much memory
    FAILED = "failed"
    #: killed at its hard limit
    TIMED_OUT = "timed_out"
    #: its worker died
    LOST = "lost"
    #: cancelled before or while it ran
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset({JobState.DONE, JobState.FAILED, JobState.TIMED_OUT, JobState.LOST, JobState.CANCELLED})


class WorkerState(Enum):
    """Where a worker process is."""

    #: asked for, has not said that it is ready
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    #: told to leave after its current job
    STOPPING = "stopping"
    #: a kill is under way
    KILLED = "killed"
    #: reaped
    GONE = "gone"
