"""What Sentry and OpenTelemetry have gathered in a worker process leaves before that process does.

Both send in the background, some seconds late. Where prefork is used, Sentry has its children wait for that; here they
would not know where to. Owns nothing: loads neither library, and knows no more of them than how one says "now".
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable

logger = logging.getLogger("mpworker.telemetry")

#: Module, how to get at what can be flushed, and for how many seconds at most it is waited for: each time, and for
#: nothing if the collector is away. Sentry's are its own usual ones.
_HOLDERS = (
    ("sentry_sdk", "", 2.0),
    ("opentelemetry.trace", "get_tracer_provider", 0.5),
    ("opentelemetry.metrics", "get_meter_provider", 0.5),
    ("opentelemetry._logs", "get_logger_provider", 0.5),
)


def flush() -> None:
    """Has what is loaded of them send what it holds. Never raises; takes the sum of their times at most."""
    for name, getter, seconds in _HOLDERS:
        module = sys.modules.get(name)
        if module is None:
            continue
        try:
            holder = getattr(module, getter)() if getter else module
            call = getattr(holder, "force_flush" if getter else "flush", None)
        except Exception as exc:
            logger.debug("%s cannot be asked to send what it holds: %r", name, exc)
            continue
        if call is not None:
            _bounded(name, call, seconds)


def _bounded(name: str, call: Callable[[], object], seconds: float) -> None:
    """In a thread of its own: what these libraries take for a timeout does not cover what they wait for in it."""

    def run() -> None:
        try:
            call()
        except Exception as exc:
            logger.debug("%s has not sent what it holds: %r", name, exc)

    thread = threading.Thread(target=run, name="mpworker-telemetry", daemon=True)
    thread.start()
    thread.join(seconds)
