"""The beginning of a cold shutdown: what runs may finish for a while, and nothing else begins.

Owns that wait, which takes the place of a sleep in Celery's handler of the signal, and the knowledge that what still
runs after it is about to be cancelled: before 5.7 Celery says so only when it has waited for the pool. Cancels nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from celery import signals
from celery.worker import state as worker_state

logger = logging.getLogger("mpworker.pool")


class SoftShutdown:
    """For one pool.

    Args:
        pool: the worker's.
        drain: of that pool; called with seconds, and whether to wait also without tasks.
    """

    def __init__(self, pool: object, drain: Callable[[float, bool], None]) -> None:
        self._pool, self._drain = pool, drain
        self._over = False

    @property
    def is_cold(self) -> bool:
        """What runs now is cancelled."""
        return self._over or bool(worker_state.should_terminate)

    def connect(self) -> None:
        """Before its worker is ready, a node has no tasks."""
        signals.worker_ready.connect(self._on_ready)

    def disconnect(self) -> None:
        signals.worker_ready.disconnect(self._on_ready)

    def _on_ready(self, sender: Any, **_: Any) -> None:
        worker = getattr(sender, "controller", None)
        if worker is not None and worker.pool is self._pool:
            worker.wait_for_soft_shutdown = partial(self._wait, worker.app.conf)

    def _wait(self, conf: Any) -> None:
        """In place of ``WorkController.wait_for_soft_shutdown``."""
        seconds, on_idle = conf.worker_soft_shutdown_timeout, bool(conf.worker_enable_soft_shutdown_on_idle)
        if seconds > 0 and (on_idle or worker_state.active_requests):
            logger.warning("Initiating Soft Shutdown, terminating in %s seconds", seconds)
            self._drain(seconds, on_idle)
        self._over = True
