"""How many CPUs this process may really use. Owns the reading of cgroup files and affinity; never changes either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import ceil, inf
from pathlib import Path
from typing import Literal

from mpworker.errors import ConfigurationError

#: Waiting tasks need no CPU: so many workers for each.
_IO_FACTOR = 2


def pool_size(kind: Literal["cpu", "io"] = "cpu") -> int:
    """A fitting number of workers: the CPUs that affinity and the cgroup's quota (v1 and v2, rounded up) leave us.

    Args:
        kind: ``cpu`` for tasks that compute; ``io`` for tasks that mostly wait: twice as many.

    Returns:
        at least 1.

    Raises:
        ConfigurationError: for any other kind.
    """
    if kind not in ("cpu", "io"):
        raise ConfigurationError(f"kind must be 'cpu' or 'io', not {kind!r}")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpus = max(1, ceil(min(allowed, _quota(Path("/")))))
    return cpus * _IO_FACTOR if kind == "io" else cpus


def _quota(root: Path) -> float:
    """The CPUs that the strictest of our cgroups allows; ``inf`` without any limit.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    quota = inf
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                folders = _upwards(root / "sys/fs/cgroup", path)
                quota = min([quota, *(_limit_v2(folder) for folder in folders)])
            elif "cpu" in controllers.split(","):
                for mount in ("cpu", controllers):
                    folders = _upwards(root / "sys/fs/cgroup" / mount, path)
                    quota = min([quota, *(_limit_v1(folder) for folder in folders)])
    return quota


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """A cgroup's folder and those above it, whose limits hold too. In a container our own may be mounted as the top."""
    folder = mount / path.strip("/")
    yield folder
    while folder != mount and mount in folder.parents:
        folder = folder.parent
        yield folder


def _limit_v2(folder: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return _ratio(quota, period)
    return inf


def _limit_v1(folder: Path) -> float:
    with suppress(OSError, ValueError):
        return _ratio((folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text())
    return inf


def _ratio(quota: str, period: str) -> float:
    # "max" (v2) is no number, -1 (v1) is no limit
    return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else inf
