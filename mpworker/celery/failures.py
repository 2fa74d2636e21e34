"""What Celery does in the main process when it fails a task there, because its process was killed, lost or has left.

Owns that this is the same with each version of Celery, each part once, and none in another's way: the task's own hooks
run in the callback process, errbacks that cannot be sent wait for the broker. Never decides whether a task has failed.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import WorkerLostError
from celery import current_app, signals, states
from celery.app.task import Task
from celery.exceptions import TimeLimitExceeded
from celery.utils.saferepr import saferepr
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError

from mpworker.celery.hooks import ParentHooks, stored_success
from mpworker.errors import PayloadError
from mpworker.pool.callbacks import pack_hooks
from mpworker.pool.coroutines import settle
from mpworker.pool.parcel import Outcome, pack_error

logger = logging.getLogger("mpworker.pool")

FAILED, RETRIED, RETURNED = "on_failure", "on_retry", "after_return"

#: Seconds between two attempts to send what the broker did not take; one of them may hold up the main process a little.
_RESEND_INTERVAL = 5.0


class _Errback(NamedTuple):
    """One errback of one failed task, not sent yet."""

    backend: Any
    request: Any
    error: BaseException
    traceback: Any


class Failures:
    """Calls what Celery's ``Request`` has for the bad ends of its task.

    Args:
        hooks: the way to the callback process.
    """

    def __init__(self, hooks: ParentHooks) -> None:
        self._hooks = hooks
        self._errbacks: deque[_Errback] = deque()
        self._not_before = 0.0

    def report(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls ``function`` with what follows.

        Args:
            function: ``on_failure`` or ``on_timeout`` of a request; anything else is called as it is.
        """
        request: Any = getattr(function, "__self__", None)
        if not hasattr(request, "request_dict"):
            function(*args, **kwargs)
            return
        if args and not hasattr(request, "_success_was_stored") and _succeeded(request, args[0].exception):
            return  # Celery itself looks since 5.7
        called: set[str] = set()
        heard: list[tuple[BaseException, str]] = []

        def hear(sender: Any, task_id: str, exception: BaseException, einfo: Any, **_: Any) -> None:
            if task_id == request.id:
                heard.append((exception, str(einfo.traceback)))

        signals.task_failure.connect(hear)
        try:
            with self._kept_back(request, called):
                function(*args, **kwargs)
            if not heard and "timeout" in kwargs and not worker_state.should_terminate:
                _announce(request, TimeLimitExceeded(kwargs["timeout"]))  # Celery itself does so since 5.7
        finally:
            signals.task_failure.disconnect(hear)
            self.send_errbacks()
        if heard:
            self._call_hooks(request, {FAILED, RETURNED}, *heard[0])
        elif called and args:
            self._call_hooks(request, called, args[0].exception, str(args[0].traceback))

    @contextmanager
    def _kept_back(self, request: Any, called: set[str]) -> Iterator[None]:
        """Meanwhile the task's hooks are not called but noted, and errbacks wait."""

        def noting(which: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def note(*args: Any) -> Any:
                if request.id not in args[1:3]:  # a handler of a signal has come between, with another request
                    return original(*args)
                return called.add(which)

            return note

        task = request.task
        hooks = {which: noting(which, getattr(task, which)) for which in (FAILED, RETRIED, RETURNED)}
        with _replaced(task, **hooks), _replaced(task.backend, _call_task_errbacks=self._keep(task.backend)):
            yield

    def _keep(self, backend: Any) -> Callable[..., None]:
        def keep(request: Any, error: BaseException, traceback: Any) -> None:
            for errback in request.errbacks:
                single = copy.copy(request)
                single.errbacks = [errback]
                self._errbacks.append(_Errback(backend, single, error, traceback))

        return keep

    def send_errbacks(self, *, at_once: bool = False, last: bool = False) -> None:
        """Calls or sends the errbacks that wait. Without a broker they go on waiting.

        Args:
            at_once: also when the last attempt has just failed.
            last: nobody will ask again, so those that cannot be sent are logged.
        """
        if not self._errbacks or (not (at_once or last) and time.monotonic() < self._not_before):
            return
        while self._errbacks:
            errback = self._errbacks.popleft()
            backend, request, error, traceback = errback
            try:
                backend._call_task_errbacks(request, error, traceback)
            except OperationalError as exc:
                if not last:
                    self._errbacks.appendleft(errback)
                    self._not_before = time.monotonic() + _RESEND_INTERVAL
                    return
                logger.error("the errback of %s is lost with its broker (%s): %r", request.id, exc, request.errbacks)
            except Exception:
                logger.exception("the errback of %s failed: %r", request.id, request.errbacks)

    def _call_hooks(self, request: Any, which: set[str], error: BaseException, traceback: str) -> None:
        task = request.task
        which = {name for name in which if getattr(getattr(task, name), "__func__", None) is not getattr(Task, name)}
        if not which:
            return
        error = error.exc if isinstance(error, ExceptionWithTraceback) else error
        try:
            call = partial(_call_task_hooks, task.name, frozenset(which), dict(vars(request._context)), traceback)
            self._hooks.call(task, request.id, pack_hooks(None, call), Outcome.ERROR, pack_error(error, ""))
        except PayloadError as exc:
            logger.error("the hooks of %s[%s] cannot be called: %s", task.name, request.id, exc)


def _call_task_hooks(
    name: str, which: frozenset[str], request: dict[str, Any], traceback: str, error: BaseException
) -> None:
    """In the callback process: what Celery would have called in the main process."""
    task, facts = current_app.tasks[name], (request["id"], request["args"], request["kwargs"])
    info = _einfo(error)
    info.traceback = traceback or info.traceback
    task.push_request(**request)
    with ExitStack() as last:  # also when the first hook raises
        last.callback(task.pop_request)
        if RETURNED in which:
            last.callback(lambda: settle(task.after_return(states.FAILURE, error, *facts, None)))
        for hook in {FAILED, RETRIED} & which:
            settle(getattr(task, hook)(error, *facts, info))


def _succeeded(request: Any, error: BaseException) -> bool:
    """Whether the task had stored its success before its process was lost. Then that is its end."""
    meta = stored_success(request.task, request.id) if isinstance(error, WorkerLostError) else None
    if meta is None:
        return False
    logger.warning("Task %s[%s] succeeded before the worker was lost: %r", request.name, request.id, error)
    request.on_success((0, saferepr(meta.get("result"), request.task.resultrepr_maxsize), 0.0))
    return True


def _announce(request: Any, error: TimeLimitExceeded) -> None:
    info = _einfo(error)
    facts = {"task_id": request.id, "args": request.args, "kwargs": request.kwargs}
    signals.task_failure.send(sender=request.task, exception=error, traceback=error.__traceback__, einfo=info, **facts)
    request.send_event("task-failed", exception=saferepr(error), traceback=info.traceback)
    error.__traceback__ = None


def _einfo(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except BaseException:
        return ExceptionInfo()


@contextmanager
def _replaced(target: Any, **attributes: Any) -> Iterator[None]:
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    vars(target).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            with suppress(KeyError):
                del vars(target)[name]
        vars(target).update(before)
