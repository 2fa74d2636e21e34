"""How long a task has waited: marks on its message when it is sent and when a node receives it, read when it begins.

Owns the marks' names and what they mean together. A message that was sent by a process that does not know mpworker has
only the second one; where clocks differ, so do the figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from celery import signals

#: Headers: seconds since the epoch.
SENT, RECEIVED = "mpworker_sent", "mpworker_received"


def mark_what_is_sent() -> None:
    """From now on, whatever task this process sends."""
    signals.before_task_publish.connect(_sending, weak=False, dispatch_uid="mpworker.sent")


def mark_what_is_received() -> None:
    """From now on, in the main process of a node."""
    signals.task_received.connect(_received, weak=False, dispatch_uid="mpworker.received")


def _sending(headers: Any = None, **_: Any) -> None:
    if isinstance(headers, dict) and "task" in headers:  # the first protocol has no such headers
        headers[SENT] = round(time.time(), 6)


def _received(request: Any, **_: Any) -> None:
    request.request_dict[RECEIVED] = round(time.time(), 6)


def waited(request: Mapping[str, Any]) -> float | None:
    """Seconds from when a task could have begun (it was sent, or its ETA had come) to now.

    Args:
        request: the message's headers.
    """
    since = [mark for name in (SENT, RECEIVED) if isinstance(mark := request.get(name), int | float)]
    if not since:
        return None
    begun = min(since)
    if due := request.get("eta"):
        with suppress(TypeError, ValueError):  # none that we can read
            eta = datetime.fromisoformat(due)
            begun = max(begun, (eta if eta.tzinfo else eta.replace(tzinfo=UTC)).timestamp())
    return max(0.0, time.time() - begun)
