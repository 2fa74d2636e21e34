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


def progress(done: float, total: float, message: str = "") -> None:
    """Tells how far the running task is: ``future.progress`` and ``ProcessPool.stats()`` show it. In a Celery task it
    becomes the state ``PROGRESS`` and the event ``task-progress``.

    Cheap enough for each turn of a tight loop: at most ten times in a second (in a Celery task, once) something is
    sent, and what is told in between replaces the last word. It never waits; what the pool has no room for is left
    out. Does nothing outside a task.

    Args:
        done, total: in any unit.
        message: its first 200 characters are shown.

    Raises:
        TypeError, ValueError: ``done`` or ``total`` is no number.
    """
    if (worker := task_worker()) is not None:
        worker.tell_progress(done, total, message)
