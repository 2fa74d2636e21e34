"""The time limits of one message: its own, else its task's as they are now, else the pool's.

Owns that order. Celery remembers a task's limits when it first sees the task, and so does not notice that its own
remote command ``time_limit`` has changed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def limits_of(task: Any, request: Mapping[str, Any], pool: tuple[float, float]) -> tuple[float, float]:
    """Returns soft and hard limit in seconds; 0: none.

    Args:
        task: as registered, or ``None`` if it is not.
        request: the message's headers, in which ``timelimit`` is (hard, soft).
        pool: soft and hard limit for whoever has none.
    """
    hard, soft = request.get("timelimit") or (None, None)
    return (
        soft or getattr(task, "soft_time_limit", None) or pool[0],
        hard or getattr(task, "time_limit", None) or pool[1],
    )
