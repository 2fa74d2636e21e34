"""How a node's workers start: ``mpworker_start_method``, and what ``auto`` makes of it.

Owns the choice and the one log line that tells it. Never starts anything.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence

from mpworker.pool.forking import risk_of_forking
from mpworker.settings import Settings

logger = logging.getLogger("mpworker.pool")


def embedded() -> bool:
    """The worker runs in a thread of a program, a test as a rule: what that has made of the app, no import does."""
    return threading.current_thread() is not threading.main_thread()


def may_copy(settings: Settings, forks: bool) -> bool:
    """Whether an app that no import finds will be copied with its process; see :func:`start_method_of`."""
    if settings.start_method == "auto":
        return forks and settings.worker_env is None
    return settings.start_method == "fork"


def start_method_of(
    settings: Settings, *, forks: bool = True, unplaced: bool = False, local: Sequence[str] = ()
) -> str:
    """The start method for the main process as it is now; to be asked right before the processes are started, in the
    thread that starts them.

    Args:
        forks: what Celery's own setting, ``worker_pool_start_method``, has to say.
        unplaced: no import finds the app.
        local: names of tasks of such an app that no import makes again.
    """
    method = settings.start_method
    if method == "auto" and not forks:
        logger.info("start method spawn: worker_pool_start_method says so")
        method = "spawn"
    if method == "auto" and settings.worker_env is not None:
        logger.info("start method forkserver: with mpworker_worker_env each worker imports the application by itself")
        method = "forkserver"
    if method != "auto":
        if local and method != "fork":
            logger.error(
                "worker processes will not know %s: the app is in no module that they could import; "
                "define it at the top level of one, or set mpworker_start_method to fork",
                ", ".join(local),
            )
        return method
    if embedded() or unplaced:
        why = "the worker runs in a thread of a program" if embedded() else "the app is in no module"
        risk = f", although it {found}" if (found := risk_of_forking()) else ""
        logger.info("start method fork: %s, so that only this process can be copied%s", why, risk)
        return "fork"
    if not sys.platform.startswith("linux"):  # where there is no template either, as nobody adopts orphans
        return "auto"
    if risk := risk_of_forking():
        logger.info("start method auto: the application is loaded once more, in a template; the main process %s", risk)
        return "auto"
    logger.info("start method fork: the main process has loaded the application, and has one thread")
    return "fork"
