"""The poison cap: a message that has cost ``mpworker_max_deaths`` workers their lives is not run again.

Owns the count and the verdict. A death is counted before its message can go back to the broker: who is killed in
between has counted one too many, and nothing runs for ever. Never waits long for Redis: what it does not take is owed
to it, counts on this node at once, and is added as soon as it answers again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from billiard.exceptions import WorkerLostError
from celery import Celery, states
from celery.backends.base import DisabledBackend
from celery.worker import state as worker_state

from mpworker.celery.deadletters import DeadLetter, Letters, RedisLetters, local_letters, shared_letters
from mpworker.errors import PoisonMessage
from mpworker.results.record import describe

logger = logging.getLogger("mpworker.pool")

#: Seconds that one exchange with Redis may hold the main process up.
_PATIENCE = 1.0
#: After a failure Redis is left alone for so many seconds.
_PAUSE = 15.0
#: Messages whose deaths this node remembers by itself.
_MAX_OWED = 10_000


def _has_had_its_retries(request: Any) -> bool:
    task = request.task
    most = task.max_retries if getattr(task, "retry_on_worker_lost", False) else None  # Celery 5.7
    return most is not None and (request.message.headers.get("retries") or 0) >= most


class Deaths:
    """Judges the messages of one node whose workers were lost.

    Args:
        limit: deaths that a message may cost; 0: any number.
        hostname: the node's name.
    """

    def __init__(self, app: Celery, limit: int, hostname: str) -> None:
        self._app, self._limit, self._node = app, limit, hostname
        #: deaths that Redis has not heard of; where there is none, all
        self._owed: dict[str, int] = {}
        self._left_alone_until = 0.0
        self._place: RedisLetters | None = None
        self._looked = False
        #: messages that this node has given up
        self.given_up = 0

    def judge(self, listener: Callable[..., Any] | None, lost: BaseException) -> BaseException:
        """What Celery is to be told of a task whose worker was lost.

        Args:
            listener: the ``on_failure`` of Celery's request; of anybody else, or ``None``, nothing is counted.
            lost: how the worker ended: an error with which Celery may deliver the message again.

        Returns:
            that error, or a ``PoisonMessage`` if it may not. Where Celery does not either, because the task has had its
            retries, it is a ``WorkerLostError`` as with any pool, with an attribute ``is_dead``.
        """
        request: Any = getattr(listener, "__self__", None)
        if not self._limit or not hasattr(request, "message") or worker_state.should_terminate:
            return lost
        deaths = self._count(request.id)
        if deaths < self._limit or self._had_succeeded(request):
            return lost
        self._owed.pop(request.id, None)
        self.given_up += 1
        workers = "1 worker" if deaths == 1 else f"{deaths} workers"
        told = f"killed {workers}; not run again; send it again with: mpworker requeue {request.id}"
        self._keep(request, deaths, f"killed {workers}; the last: {describe(lost)}")
        logger.error("task %s[%s] has %s", request.name, request.id, told)
        if not _has_had_its_retries(request):
            return PoisonMessage(f"{told} (the last: {describe(lost)})")
        error: BaseException = WorkerLostError(f"{lost}; the task has {told}")
        error.is_dead = True  # type: ignore[attr-defined]
        return error

    def _count(self, task_id: str) -> int:
        owed = self._owed.pop(task_id, 0) + 1
        deaths = self._at_redis(lambda place: place.count(task_id, owed))
        if deaths is not None:
            return int(deaths)
        self._owed[task_id] = owed
        if len(self._owed) > _MAX_OWED:
            del self._owed[next(iter(self._owed))]
        return owed

    def _had_succeeded(self, request: Any) -> bool:
        """Its success is stored, and its worker died afterwards: Celery, from 5.7 on, takes it for what it is."""
        task = request.task
        if not hasattr(request, "_success_was_stored") or isinstance(task.backend, DisabledBackend):
            return False
        if request.ignore_result or time.monotonic() < self._left_alone_until:
            return False
        try:
            return bool(task.backend.get_task_meta(request.id, cache=False).get("status") == states.SUCCESS)
        except Exception as exc:
            logger.error("whether %s[%s] had succeeded: %s", request.name, request.id, describe(exc))
            return False

    def _keep(self, request: Any, deaths: int, reason: str) -> None:
        def add(place: Letters) -> bool:
            place.add(letter)
            return True

        try:
            letter = DeadLetter.of(request, deaths=deaths, reason=reason, node=self._node)
            if not self._at_redis(add):
                local_letters(self._app).add(letter)
        except Exception as exc:
            what = f"the message of task {request.name}[{request.id}]"
            logger.error("%s cannot be kept, so it cannot be sent again: %s", what, describe(exc))

    def _at_redis(self, ask: Callable[[RedisLetters], Any]) -> Any:
        """What Redis answers; ``None``: there is none, or it does not answer in time."""
        if time.monotonic() < self._left_alone_until:
            return None
        try:
            if not self._looked:
                self._place, self._looked = shared_letters(self._app, _PATIENCE), True
            return None if self._place is None else ask(self._place)
        except Exception as exc:  # whatever that backend may raise: the node goes on by itself
            self._left_alone_until = time.monotonic() + _PAUSE
            logger.warning(
                "this node counts the deaths of tasks alone for a while, because of Redis: %s", describe(exc)
            )
            return None
