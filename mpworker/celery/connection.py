"""Connections that fail well: to the broker, closing in peace when it is gone; to Redis, giving up soon.

Owns those two differences. Never connects by itself.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery

logger = logging.getLogger("mpworker.broker")


def make_closable(app: Celery) -> None:
    """From here on this app's connections can be closed whatever state a lost broker has left them in.

    Celery closes a lost connection twice, and kombu takes the transport away in between. A Redis channel that the
    first attempt did not get to then fails in a way that Celery does not expect, and the whole node would end.
    """
    base = app.amqp.Connection
    if not getattr(base, "closes_in_peace", False):
        app.amqp.Connection = type("Connection", (_Closable, base), {})


def quick_client(backend: Any, patience: float) -> Any:
    """A client of a Redis result backend's server, for what can be done without it.

    Args:
        backend: Celery's, or one derived from it.
        patience: seconds that one exchange may take.
    """
    from redis import exceptions, retry  # not needed by nodes without Redis
    from redis.backoff import NoBackoff

    params = dict(backend.connparams)
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in params:
            params[name] = min(params[name] or patience, patience)
    # One immediate retry mends a connection that a restarted server has closed; a timeout is not tried again.
    params.update(retry_on_timeout=False, retry=retry.Retry(NoBackoff(), 1, (exceptions.ConnectionError,)))
    return backend._create_client(**params)


class _Closable:
    closes_in_peace = True

    def maybe_close_channel(self, channel: Any) -> None:
        try:
            super().maybe_close_channel(channel)  # type: ignore[misc]
        except AttributeError as exc:
            logger.debug("closing a channel of a lost connection: %r", exc)
