"""``@app.task(callback=f, error_callback=g)``: found on the task, called in the callback process, reported by name.

Owns who asks for the call. A worker process does when Celery says there that the task has succeeded or failed, with
the real result or exception; the main process does when Celery fails or revokes a task there, because its process was
killed or lost. Those two never both happen for one end of a task. Never runs a callback in either of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import current_app, signals, states
from celery.backends.base import DisabledBackend
from celery.exceptions import TaskRevokedError

from mpworker.errors import PayloadError
from mpworker.pool import worker as pool_worker
from mpworker.pool.callbacks import log_hook_failure, pack_hooks
from mpworker.pool.coroutines import settle
from mpworker.pool.frames import Frame
from mpworker.pool.handle import Handle
from mpworker.pool.parcel import Outcome, open_outcome, pack_error, pack_outcome

logger = logging.getLogger("mpworker.callbacks")

#: A revoke may cross the end of its task; so many ends are remembered.
_MAX_ASKED = 10_000
CALLBACK, ERROR_CALLBACK = "callback", "error_callback"


def hooks_of(task: Any) -> bytes:
    """The packed callbacks of a task, by name, so that the callback process finds them in its own registry."""
    if not any(find_hook(task, which) for which in (CALLBACK, ERROR_CALLBACK)):
        return b""
    return pack_hooks(partial(call_hook, task.name, CALLBACK), partial(call_hook, task.name, ERROR_CALLBACK))


def find_hook(task: Any, which: str) -> Callable[[Any], object] | None:
    """What ``@app.task(callback=…)`` was given. A method of that name in a task class is the project's own affair."""
    options = vars(type(task))
    if "_decorated" not in options:  # the decorator makes a class of its own for each task
        return None
    hook = options.get(which)  # not by getattr: it would be bound to the task
    if isinstance(hook, staticmethod):
        hook = hook.__func__
    return hook if callable(hook) else None


def call_hook(name: str, which: str, value: Any) -> None:
    """In the callback process: calls the hook of a task, if it has that one."""
    hook = find_hook(current_app.tasks[name], which)
    if hook is not None:
        settle(hook(value))


def _refuse(error: BaseException) -> None:
    raise error


# -- in a worker process -----------------------------------------------------------------------------------------------

_task_id: str | None = None


def follow(task_id: str | None) -> None:
    """Says which task this process runs now; ``None``: it has ended."""
    global _task_id
    _task_id = task_id


def listen_in_worker() -> None:
    """From here on the ends of tasks in this process call their hooks."""
    signals.task_success.connect(_on_success, weak=False, dispatch_uid="mpworker.success")
    signals.task_failure.connect(_on_failure, weak=False, dispatch_uid="mpworker.failure")


def _on_success(sender: Any, result: Any = None, **_: Any) -> None:
    if _is_current(sender) and (hooks := hooks_of(sender)):
        flag, body = pack_outcome(result)
        if flag is Outcome.ERROR:  # it succeeded, so its error_callback is not concerned: the log is
            hooks = pack_hooks(None, _refuse)
        _call(hooks, flag, body)


def _on_failure(sender: Any, exception: BaseException, **_: Any) -> None:
    if _is_current(sender) and (hooks := hooks_of(sender)):
        _call(hooks, Outcome.ERROR, pack_error(exception))


def _is_current(task: Any) -> bool:
    # Tasks that this one runs eagerly send the same signals.
    return _task_id is not None and task.request.id == _task_id


def _call(hooks: bytes, flag: Outcome, body: bytes) -> None:
    if pool_worker.this_worker is not None:
        pool_worker.this_worker.call_hooks(hooks, flag, body)


# -- in the main process -----------------------------------------------------------------------------------------------


def stored_success(task: Any, task_id: str) -> dict[str, Any] | None:
    """What the result backend holds of a task whose process was lost, if that is a success."""
    if task.ignore_result or isinstance(task.backend, DisabledBackend):
        return None  # nothing is stored that could be asked
    try:
        meta: dict[str, Any] = task.backend.get_task_meta(task_id, cache=False)
    except Exception as exc:
        logger.error("whether %s[%s] had succeeded before its process was lost: %r", task.name, task_id, exc)
        return None
    return meta if meta.get("status") == states.SUCCESS else None


class ParentHooks:
    """The main process' part, for one pool.

    Args:
        handle: of the pool.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        #: of tasks whose callback has not ended, for the log
        self._names: dict[int, str] = {}
        #: ids of the tasks that have lately asked for their callback in the worker, in order
        self._asked: dict[str, None] = {}
        #: id of the task of whose end Celery has spoken last
        self._spoken: str | None = None

    def connect(self) -> None:
        signals.task_failure.connect(self._on_failure, weak=True)
        signals.task_revoked.connect(self._on_revoked, weak=True)

    def disconnect(self) -> None:
        signals.task_failure.disconnect(self._on_failure)
        signals.task_revoked.disconnect(self._on_revoked)

    def queued(self, job: int, name: str, task_id: str) -> None:
        """A worker has asked for the callback of this job; whatever becomes of its process, there is no second."""
        self._names[job] = f"{name}[{task_id}]"
        self._asked[task_id] = None
        if len(self._asked) > _MAX_ASKED:
            del self._asked[next(iter(self._asked))]

    def begins(self, task_id: str) -> None:
        """A message of this task goes to the pool, perhaps not the first one."""
        self._asked.pop(task_id, None)
        if task_id == self._spoken:
            self._spoken = None

    def ended(self, frame: Frame) -> None:
        """Hears a HOOK_ENDED."""
        name = self._names.pop(frame.job, "?")
        succeeded, error = open_outcome(frame.flag, frame.body)
        if not succeeded:
            log_hook_failure(name, error)

    def lost(self, task: Any, task_id: str) -> None:
        """Celery has heard that the process of this task was lost. Of a task whose success was stored before, it then
        says nothing; nor had the process asked for the callback, if the two came too close together."""
        if task_id == self._spoken or task_id in self._asked or find_hook(task, CALLBACK) is None:
            return
        meta = stored_success(task, task_id)
        if meta is not None:
            self._ask(task, task_id, *pack_outcome(meta.get("result")))

    def _on_failure(self, sender: Any, task_id: str, exception: BaseException, **_: Any) -> None:
        """Celery fails a task in this process: its worker was killed or lost, or the task rejected its message."""
        self._ask(sender, task_id, Outcome.ERROR, pack_error(exception, ""))

    def _on_revoked(self, sender: Any, request: Any = None, **facts: Any) -> None:
        how = "terminated" if facts.get("terminated") else "expired" if facts.get("expired") else "revoked"
        self._ask(sender, str(getattr(request, "id", "?")), Outcome.ERROR, pack_error(TaskRevokedError(how), ""))

    def _ask(self, task: Any, task_id: str, flag: Outcome, body: bytes) -> None:
        self._spoken = task_id
        if task_id in self._asked:
            return
        try:
            hooks = hooks_of(task)
        except PayloadError as exc:
            logger.error("the callbacks of %s[%s] cannot be called: %s", task.name, task_id, exc)
            return
        if hooks:
            self.call(task, task_id, hooks, flag, body)

    def call(self, task: Any, task_id: str, hooks: bytes, flag: Outcome, body: bytes) -> None:
        """Has the callback process call packed hooks; what they raise is logged with the task's name."""
        if self._handle.fileno() >= 0:
            job = self._handle.next_id()
            self._names[job] = f"{task.name}[{task_id}]"
            self._handle.call_hooks(job, hooks, flag, body)
