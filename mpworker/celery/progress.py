"""``mpworker.progress()`` inside a Celery task: its state ``PROGRESS``, and the event ``task-progress``.

Owns who stores that state and when: a thread of the worker process, so that no task ever waits for Redis on its
account, at most once a second. Nothing of it is in the journal, which is for what must not be lost. With a foreign
result backend the task's own thread stores it, as if it had called ``update_state``.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery
from celery.app import trace
from celery.app.task import Context

from mpworker.pool import worker as pool_worker
from mpworker.pool.frames import Frame

logger = logging.getLogger("mpworker.progress")

STATE = "PROGRESS"
#: Seconds between two words of one task.
_PAUSE = 1.0
#: Seconds that the end of a task may wait for a word of it that is being stored; one that comes later is refused there.
_LAST_WORD = 0.5


class _Run:
    """One run of one task."""

    __slots__ = ("job", "name", "over", "request", "task_id")

    def __init__(self, job: int, name: str, task_id: str, request: Mapping[str, Any]) -> None:
        self.job, self.name, self.task_id, self.request = job, name, task_id, request
        #: its end is about to be stored
        self.over = False


_app: Celery | None = None
_run: _Run | None = None
_teller: _Teller | None = None


def listen_in_worker(app: Celery) -> None:
    """From here on what the tasks of this process tell becomes their state."""
    global _app
    _app = app
    if (worker := pool_worker.task_worker()) is not None:
        worker.progress_pause, worker.on_progress = _PAUSE, _on_progress


def follow(name: str = "", task_id: str = "", request: Mapping[str, Any] | None = None) -> None:
    """Says which task this process runs now; without arguments: it has ended."""
    global _run
    worker = pool_worker.this_worker
    if request is None or worker is None or worker.current is None:
        _run = None
    else:
        _run = _Run(worker.current.job, name, task_id, request)


def hush(task_id: str) -> None:
    """The end of a task, or its retry, is about to be stored: no word of this run comes after that."""
    if _run is not None and _run.task_id == task_id:
        _run.over = True
        if _teller is not None and _teller.storing.acquire(timeout=_LAST_WORD):
            _teller.storing.release()


def _on_progress(job: int, done: float, total: float, message: str) -> None:
    """In whatever thread a task tells, at most once in ``_PAUSE``."""
    global _teller
    run = _run
    if run is None or run.job != job or run.over or _app is None:
        return
    if _teller is None:
        _teller = _Teller()
        _teller.start()
    task = _app.tasks[run.name]
    mine = threading.current_thread() is threading.main_thread()
    if mine and task.request.id == run.task_id:
        run.request = task.request  # it knows the arguments too
    kept = not _ignores_result(task, _context(run))
    meta = {"done": done, "total": total, "message": message.encode(errors="replace").decode()}
    if kept and mine and not hasattr(task.backend, "store_progress"):
        task.backend.store_result(run.task_id, meta, STATE, request=_context(run))
    _teller.tell(run, meta if kept else None)


def _ignores_result(task: Any, request: Context) -> bool:
    actual = getattr(trace, "get_actual_ignore_result", None)  # before 5.6 Celery did not ask the request
    return bool(task.ignore_result if actual is None else actual(task, request))


def _context(run: _Run) -> Context:
    return run.request if isinstance(run.request, Context) else Context(run.request)


class _Teller(threading.Thread):
    """Stores the last word of a task, and sees to it that there is a last word, when the task itself falls silent."""

    def __init__(self) -> None:
        super().__init__(name="mpworker-progress", daemon=True)
        self.storing = threading.Lock()
        self._told, self._other = threading.Event(), threading.Event()
        self._word: tuple[_Run, dict[str, Any] | None] | None = None

    def tell(self, run: _Run, meta: dict[str, Any] | None) -> None:
        if self._word is not None and self._word[0] is not run:
            self._other.set()  # the pause was meant for another task
        self._word = run, meta
        self._told.set()

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        while True:
            self._told.wait()
            self._told.clear()
            self._other.clear()
            try:
                if self._word is not None:
                    self._store(*self._word)
            except Exception:
                logger.exception("progress could not be stored")
            self._other.wait(_PAUSE)
            if (worker := pool_worker.task_worker()) is not None:
                worker.tell_untold()

    def _store(self, run: _Run, meta: dict[str, Any] | None) -> None:
        assert _app is not None
        store: Callable[..., None] | None = getattr(_app.tasks[run.name].backend, "store_progress", None)
        if meta is not None and store is not None:
            with self.storing:
                if not run.over:
                    store(run.task_id, meta, _context(run))


# -- in the main process -----------------------------------------------------------------------------------------------


def send_event(accepted: Callable[..., Any] | None, frame: Frame) -> None:
    """Sends ``task-progress`` as the request does that has been accepted by this callback of it."""
    send = getattr(getattr(accepted, "__self__", None), "send_event", None)
    if send is not None:
        message = frame.body.decode(errors="replace")
        send("task-progress", done=frame.a, total=frame.b, message=message)
