"""The lobby: mpworker's public names, loaded when first used.

Importing this package starts nothing, reads no environment and opens no file.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpworker.celery.app import app as app
    from mpworker.celery.app import install as install
    from mpworker.errors import MemoryLimitExceeded as MemoryLimitExceeded
    from mpworker.errors import MPWorkerError as MPWorkerError
    from mpworker.errors import RemoteTraceback as RemoteTraceback
    from mpworker.errors import SoftTimeLimitExceeded as SoftTimeLimitExceeded
    from mpworker.errors import TaskCancelled as TaskCancelled
    from mpworker.errors import TimeLimitExceeded as TimeLimitExceeded
    from mpworker.errors import WorkerLost as WorkerLost
    from mpworker.model import InfoTask as InfoTask
    from mpworker.model import Model as Model
    from mpworker.model import MultiProcess as MultiProcess
    from mpworker.pool.cpus import pool_size as pool_size
    from mpworker.pool.executor import ProcessPool as ProcessPool
    from mpworker.pool.inside import current_slot as current_slot
    from mpworker.pool.inside import progress as progress
    from mpworker.results.query import ResultStore as ResultStore

_HOME = {
    "install": "mpworker.celery.app",
    "app": "mpworker.celery.app",
    "ProcessPool": "mpworker.pool.executor",
    "pool_size": "mpworker.pool.cpus",
    "current_slot": "mpworker.pool.inside",
    "progress": "mpworker.pool.inside",
    "MultiProcess": "mpworker.model",
    "InfoTask": "mpworker.model",
    "Model": "mpworker.model",
    "ResultStore": "mpworker.results.query",
    "MPWorkerError": "mpworker.errors",
    "SoftTimeLimitExceeded": "mpworker.errors",
    "TimeLimitExceeded": "mpworker.errors",
    "MemoryLimitExceeded": "mpworker.errors",
    "WorkerLost": "mpworker.errors",
    "TaskCancelled": "mpworker.errors",
    "RemoteTraceback": "mpworker.errors",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'mpworker' has no attribute {name!r}") from None
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
