"""The node's connection to its broker: kombu's, which also closes in peace when the broker is gone.

Owns that one difference. Never connects by itself.
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


class _Closable:
    closes_in_peace = True

    def maybe_close_channel(self, channel: Any) -> None:
        try:
            super().maybe_close_channel(channel)  # type: ignore[misc]
        except AttributeError as exc:
            logger.debug("closing a channel of a lost connection: %r", exc)
