"""Connections that fail well: to the broker, closing in peace when it is gone, and alert meanwhile; to Redis, giving up
soon.

Owns those differences. Never connects by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

from celery import Celery, signals

logger = logging.getLogger("mpworker.broker")

#: Seconds from one attempt to connect to the next, at least: a broker may take the connection and refuse all else.
_INTERVAL = 1.0
#: Seconds after which this process has been sent, by all odds, what had started when its broker was lost.
_ON_ITS_WAY = 0.02


def make_closable(app: Celery) -> None:
    """From here on this app's connections can be closed whatever state a lost broker has left them in.

    Celery closes a lost connection twice, and kombu takes the transport away in between. A Redis channel that the
    first attempt did not get to then fails in a way that Celery does not expect, and the whole node would end.
    """
    base = app.amqp.Connection
    if not getattr(base, "closes_in_peace", False):
        app.amqp.Connection = type("Connection", (_Closable, base), {"outages": WeakSet()})


class Outage:
    """Hears a pool while the broker is away: then the main thread tries to connect, and its event loop stands still.

    Args:
        pool: the worker's.
        listen: called about once a second.
    """

    def __init__(self, pool: Any, listen: Callable[[], None]) -> None:
        self._pool, self._listen = pool, listen
        self._consumer: Any = None
        self._last_attempt = 0.0

    def connect(self) -> None:
        make_closable(self._pool.app)
        self._pool.app.amqp.Connection.outages.add(self)
        signals.worker_ready.connect(self._on_ready)

    def disconnect(self) -> None:
        self._pool.app.amqp.Connection.outages.discard(self)
        signals.worker_ready.disconnect(self._on_ready)

    def _on_ready(self, sender: Any, **_: Any) -> None:
        if getattr(sender, "pool", None) is self._pool:
            self._consumer = sender
            if sender.connection.transport.driver_type == "redis":
                _outlast_refusals(sender)

    def pace(self) -> None:
        """Called before an attempt to connect in the main thread."""
        if self._consumer is None or self._consumer.connection is not None:
            return  # at the start, or one connection more
        if (pause := self._last_attempt + _INTERVAL - time.monotonic()) > 0:
            time.sleep(pause)
            self.passes()
        self._last_attempt = time.monotonic()

    def begins(self) -> None:
        """Called before Celery looks at what runs, to cancel it, or to fetch so much less: a start that it has not
        heard of yet is on its way, or held back for a moment."""
        time.sleep(_ON_ITS_WAY)
        self._listen()

    def passes(self) -> None:
        """Called by a connection that waits."""
        self._listen()
        dispatcher = getattr(self._consumer, "event_dispatcher", None)
        if dispatcher is not None:
            _keep_events(dispatcher)


def _outlast_refusals(consumer: Any) -> None:
    """From here on an error that Redis answers, as it is a replica by now, or full, is a lost connection to Celery.

    At the start such an error is more likely a mistake, and ends the node as Celery has it.
    """
    from redis import exceptions  # not needed by nodes without Redis

    def listening(read: Callable[..., Any]) -> Callable[..., Any]:
        def listen(*args: Any, **kwargs: Any) -> Any:
            try:
                return read(*args, **kwargs)
            except exceptions.ResponseError as exc:
                raise exceptions.ConnectionError(str(exc)) from exc

        return listen

    consumer.connection_errors = (*consumer.connection_errors, exceptions.ResponseError)
    channel = consumer.connection.default_channel  # Celery looks at these errors when it connects, so at the next time
    channel.handlers = {name: listening(read) for name, read in channel.handlers.items()}


def _keep_events(dispatcher: Any) -> None:
    """Celery's next dispatcher takes over what this one could not send, but not what it has not tried to send yet."""
    with dispatcher.mutex:
        for group, events in dispatcher._group_buffer.items():
            if events:
                dispatcher._publish(list(events), _Nobody, f"{group}.multi")
                del events[:]


class _Nobody:
    """A producer whose broker is away. Asking the real one could take minutes."""

    @staticmethod
    def publish(*_: object, **__: object) -> None:
        raise ConnectionError("the broker is away")


def quick_client(backend: Any, patience: float) -> Any:
    """A client of a Redis result backend's server, for what can be done without it.

    Args:
        backend: Celery's, or one derived from it.
        patience: seconds that one exchange may take.
    """
    return backend._create_client(**impatient(backend.connparams, patience))


def impatient(params: Mapping[str, Any], patience: float) -> dict[str, Any]:
    """Parameters of a connection to Redis that gives up after so many seconds."""
    from redis import exceptions, retry  # not needed by nodes without Redis
    from redis.backoff import NoBackoff

    params = {**params}
    params.pop("max_connections", None)  # meant for Celery's own client
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in params:
            params[name] = min(params[name] or patience, patience)
    # One immediate retry mends a connection that a restarted server has closed; a timeout is not tried again.
    params.update(retry_on_timeout=False, retry=retry.Retry(NoBackoff(), 1, (exceptions.ConnectionError,)))
    return params


class _Closable:
    closes_in_peace = True
    outages: WeakSet[Outage]
    #: Called when this connection is lost, before it gives up what it holds.
    on_lost: Callable[[], None] | None = None

    def collect(self, *args: Any, **kwargs: Any) -> Any:
        if self.on_lost is not None:
            self.on_lost()
            for outage in list(self.outages):
                outage.begins()
        return super().collect(*args, **kwargs)  # type: ignore[misc]

    def maybe_close_channel(self, channel: Any) -> None:
        try:
            super().maybe_close_channel(channel)  # type: ignore[misc]
        except AttributeError as exc:
            logger.debug("closing a channel of a lost connection: %r", exc)

    def ensure_connection(self, *args: Any, callback: Callable[[], None] | None = None, **kwargs: Any) -> Any:
        """As kombu's, whose ``callback`` is for those who wait in the main thread; others give none."""

        def waiting() -> None:
            for outage in list(self.outages):
                outage.passes()
            if callback is not None:
                callback()

        if callback is not None:
            for outage in list(self.outages):
                outage.pace()
        return super().ensure_connection(*args, callback=waiting if callback else None, **kwargs)  # type: ignore[misc]
