"""``mpworker requeue`` and ``mpworker results --dead``: dead letters, found in both places and sent again.

Owns the order: claim, send, forget. Never looks into a message's body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from celery import Celery
from celery.app.utils import find_app
from celery.utils.imports import cwd_in_path
from kombu.compression import encoders as _known_encoders

from mpworker import embedded
from mpworker.celery.app import settings_of, uses_embedded
from mpworker.celery.deadletters import DeadLetter, Letters, local_letters, shared_letters
from mpworker.celery.queueing import RECEIVED, SENT
from mpworker.errors import ConfigurationError, RequeueError
from mpworker.results.record import describe

_encoders: Callable[[], list[str]] = _known_encoders
#: Seconds that broker or Redis may take to answer a person.
_PATIENCE = 5.0


def app_of(name: str | None) -> Celery:
    """The app that ``-A`` names, as with ``celery -A``; without one mpworker's own.

    Raises:
        ConfigurationError: there is no such app, or importing it fails.
    """
    if not name:
        from mpworker.celery.app import app

        return app
    try:
        with cwd_in_path():
            return find_app(name)
    except (Exception, SystemExit) as exc:
        reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
        raise ConfigurationError(f"cannot load the app of -A {name}: {reason}") from exc


class DeadLetters:
    """All letters that can be seen from here: those of every node in Redis, those of this machine's node in files.

    Raises:
        ConfigurationError: an ``mpworker_`` setting is wrong, the result backend cannot be used, or the bundled server
            does not start.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        if uses_embedded(app):  # it need not run yet, and ends with this process if nobody else uses it
            embedded.acquire(settings_of(app).data_dir)
        try:
            self._shared = shared_letters(app, _PATIENCE)
        except ConfigurationError:
            raise
        except Exception as exc:  # of the backend's own making
            raise ConfigurationError(f"the result backend cannot be used: {describe(exc)}") from exc
        self._places: list[Letters] = [local_letters(app), *([self._shared] if self._shared else [])]

    def all(self) -> Iterator[DeadLetter]:
        """Oldest first in each place; of this machine first.

        Raises:
            RequeueError: after what could be read.
        """
        for place in self._places:
            try:
                yield from sorted(place.all(), key=lambda letter: letter.timestamp)
            except Exception as exc:
                raise RequeueError(f"the dead letters cannot be read: {describe(exc)}") from exc

    def requeue(self, task_id: str) -> str:
        """Sends one message again, with its id, to where it came from; its deaths are counted from 0 again.

        Returns:
            one line that says what was done.

        Raises:
            RequeueError: nobody knows a dead letter of that id, somebody else is sending it at this moment, or it could
                not be sent, and is where it was.
        """
        place, letter = self._claim(task_id)
        fresh = letter.unexpired()
        try:
            if self._shared is not None:
                self._shared.forget_deaths(task_id)  # before it is sent: its next death is the first again
            send(self._app, fresh, _PATIENCE)
        except BaseException as exc:
            with suppress(Exception):  # then the claim ends by itself
                place.release(letter)
            if not isinstance(exc, Exception):
                raise
            raise RequeueError(f"{task_id} could not be sent, and stays dead: {describe(exc)}") from exc
        where = f"{letter.name}[{task_id}] was sent again to {letter.routing_key or letter.exchange}"
        line = f"{where}, without its expiry, which has passed" if fresh is not letter else where
        try:
            place.sent(letter)
        except Exception as exc:
            raise RequeueError(f"{line}, but is still listed as dead: {describe(exc)}") from exc
        return line

    def _claim(self, task_id: str) -> tuple[Letters, DeadLetter]:
        for place in self._places:
            try:
                letter = place.claim(task_id)
            except RequeueError:
                raise
            except Exception as exc:
                raise RequeueError(f"{task_id}: the dead letters cannot be read: {describe(exc)}") from exc
            if letter is not None:
                return place, letter
        raise RequeueError(f"no dead message has the id {task_id}")


def send(app: Celery, letter: DeadLetter, patience: float) -> None:
    """Publishes the message as it was, to where it was published before.

    Args:
        patience: seconds to wait for the broker.

    Raises:
        Exception: whatever the transport raises when the broker does not take it.
    """
    compression = letter.headers.get("compression")  # kombu takes it off when a message comes in
    headers = {key: value for key, value in letter.headers.items() if key not in ("compression", SENT, RECEIVED)}
    with app.connection_for_write(connect_timeout=patience) as connection:
        if connection.transport.driver_type == "redis":
            for option in ("socket_connect_timeout", "socket_timeout"):
                connection.transport_options.setdefault(option, patience)
        confirmed: dict[str, Any] = {}
        if connection.transport.driver_type == "amqp":  # else it is not known whether the broker has taken it
            connection.transport_options["confirm_publish"] = True
            confirmed["confirm_timeout"] = patience
        connection.ensure_connection(max_retries=1, interval_start=0.2)
        with app.amqp.Producer(connection, auto_declare=False) as producer:
            producer.publish(
                letter.body,
                exchange=letter.exchange,
                routing_key=letter.routing_key,
                priority=letter.priority or 0,
                content_type=letter.content_type or "application/data",
                content_encoding=letter.content_encoding or "binary",
                compression=compression if compression in _encoders() else None,
                headers=headers,
                declare=[queue for queue in app.amqp.queues.values() if _leads_to(queue, letter)],
                **letter.properties,
                **confirmed,
            )


def _leads_to(queue: Any, letter: DeadLetter) -> bool:
    if not letter.exchange:
        return bool(queue.name == letter.routing_key)
    return bool(queue.exchange.name == letter.exchange and queue.routing_key == letter.routing_key)
