"""``mpworker_worker_env``: environment variables that depend on a worker's slot.

Owns how the setting becomes what the pool knows. The variables are set by the worker process itself, before it imports
the application.
"""

from __future__ import annotations

import logging

from mpworker.errors import ConfigurationError
from mpworker.pool.slots import SlotVariables, variables_of_slots
from mpworker.settings import Settings, SlotFormats

logger = logging.getLogger("mpworker.pool")

#: A callable cannot travel to where the application is not imported yet. It is asked beforehand for so many slots.
_ASKED = 256


def slot_env_of(settings: Settings, size: int) -> SlotVariables | None:
    """What :func:`mpworker.pool.boot.describe` takes, for a pool of ``size`` workers that may grow.

    Raises:
        ConfigurationError: the callable has failed for one of these workers.
    """
    env = settings.worker_env
    if env is None or isinstance(env, SlotFormats):
        return env
    found: dict[int, dict[str, str]] = {}
    for slot in range(max(size, _ASKED)):
        try:
            found |= {slot: variables_of_slots({slot: env(slot)}, slot + 1)[slot]}
        except Exception as exc:  # the user's own function
            if slot < size:
                raise ConfigurationError(f"mpworker_worker_env, for slot {slot}: {type(exc).__name__}: {exc}") from exc
            break
    return found


def warn_beyond(env: SlotVariables | None, size: int) -> None:
    """Says so when a pool grows beyond the slots that have variables."""
    if isinstance(env, dict) and size > len(env):
        logger.error("workers from slot %d on get no variables: mpworker_worker_env has none for them", len(env))
