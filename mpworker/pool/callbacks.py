"""What the callback process does with one outcome. It is a worker of the second lane: the same loop, watchdog, limits.

Owns the choice between ``callback`` and ``error_callback``. Never runs in the parent, a worker or the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mpworker.pool.parcel import open_outcome, pack, unpack

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
    chosen = fitting.callback if succeeded else fitting.error_callback
    if chosen is not None:
        chosen(value)
