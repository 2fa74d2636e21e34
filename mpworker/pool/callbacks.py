"""What the callback process does with one outcome. It is a worker of the second lane: the same loop, watchdog, limits.

Owns the choice between ``callback`` and ``error_callback``. Never runs in the parent, a worker or the dispatcher.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from mpworker.errors import UnheardError
from mpworker.pool.bulk import Bulk
from mpworker.pool.coroutines import settle
from mpworker.pool.parcel import open_outcome, pack, unpack

logger = logging.getLogger("mpworker.callbacks")

Callback = Callable[[Any], object]


class Hooks(NamedTuple):
    """The two callbacks of a job; exactly one of them runs."""

    callback: Callback | None
    error_callback: Callback | None


def pack_hooks(callback: Callback | None, error_callback: Callback | None) -> bytes:
    """Packs a job's callbacks, empty if there are none.

    Raises:
        PayloadError: one of them cannot be pickled.
    """
    if callback is None and error_callback is None:
        return b""
    return pack((callback, error_callback), "a callback")


def run(hooks: bytes, flag: int, body: bytes) -> None:
    """Calls the callback that fits the outcome, with the value or with the exception."""
    fitting = Hooks(*unpack(hooks, "a callback"))
    succeeded, value = open_outcome(flag, body)
    if type(body) is Bulk:
        body.close()
    chosen = fitting.callback if succeeded else fitting.error_callback
    if chosen is not None:
        settle(chosen(value))


def log_hook_failure(task: str, error: BaseException) -> None:
    """In the parent: says that a callback raised, hung or crashed.

    Args:
        task: the name and id of the task it belongs to.
    """
    if isinstance(error, UnheardError):
        logger.error("%s failed and has no error_callback: %s", task, error)
    else:
        logger.error("a callback of %s failed: %s: %s", task, type(error).__name__, error, exc_info=error)
