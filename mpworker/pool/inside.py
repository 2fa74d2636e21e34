"""What a task may ask the process that runs it. Owns nothing: outside a worker there is simply no answer."""

from __future__ import annotations

from mpworker.pool.worker import task_worker


def current_slot() -> int | None:
    """The slot of the worker that this is: from 0 on, unique among the living workers of its pool.

    A replacement inherits the slot of the worker that it replaces. The environment variable ``MPWORKER_SLOT`` says the
    same, also to what the worker starts.

    Returns:
        ``None`` outside a worker: in the main process, the callback process, or a child that a task has started.
    """
    worker = task_worker()
    return None if worker is None else worker.slot
