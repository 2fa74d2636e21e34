"""What the kernel tells of memory: how much a process group holds now, and how often its out-of-memory killer struck.

Owns the reading of ``/proc`` and of the control group. Never decides anything: what a figure means for a job is
:mod:`mpworker.pool.quota`'s. Where the kernel does not tell, there is no figure; nothing here raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from math import inf
from pathlib import Path

#: Processes that one strike of the kernel has ended may be found one after another: for so many seconds.
_AFTERMATH = 2.0
_PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = 1.0 / os.sysconf("SC_CLK_TCK")
#: Counts the kills on the whole machine; control groups have files of their own.
_MACHINE = Path("/proc/vmstat")


def resident(pid: int | str = "self") -> int:
    """Bytes that a process holds in memory now; 0 where that is not known."""
    try:
        fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY)
        try:
            return int(os.read(fd, 256).split()[1]) * _PAGE
        finally:
            os.close(fd)
    except (OSError, IndexError, ValueError):
        return 0


@cache
def can_tell() -> bool:
    """Whether this system tells how much memory another process holds."""
    return resident() > 0


def members() -> Iterator[tuple[int, int, float, int]]:
    """Every process there is: pid, process group, seconds from boot to its start, bytes in memory."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fd = os.open(f"/proc/{name}/stat", os.O_RDONLY)
                try:
                    text = os.read(fd, 2048)
                finally:
                    os.close(fd)
                # The second field, in brackets, is the program's name: it may hold anything.
                fields = text[text.rindex(b")") + 2 :].split()
                yield int(name), int(fields[2]), int(fields[19]) * TICK, int(fields[21]) * _PAGE
            except (OSError, IndexError, ValueError):  # it has just ended
                continue


class OomCounter:
    """Tells whether the kernel's out-of-memory killer has struck since it was last asked.

    Args:
        read: the kernel's count, ``None`` where there is none.
    """

    def __init__(self, read: Callable[[], int | None] | None = None) -> None:
        self._read = read or kills_counter()
        self._seen = self._read()
        self._claimed_at = -inf

    def forget(self, now: float) -> None:
        """What has happened until now concerns nobody who dies later.

        Args:
            now: ``time.monotonic()``.
        """
        if now > self._claimed_at + _AFTERMATH:
            self._seen = self._read()

    def claims(self, now: float) -> bool:
        """Whether a process that has died by SIGKILL may be one that it struck; each strike is one death."""
        count = self._read()
        if count is None or self._seen is None or count <= self._seen:
            return False
        self._seen += 1
        self._claimed_at = now
        return True


def kills_counter() -> Callable[[], int | None]:
    """What reads the count that is nearest to this process: its control group's, or else the whole machine's."""
    for path in (*_group_files(), _MACHINE):
        if _kills_in(path) is not None:
            return lambda: _kills_in(path)
    return lambda: None


def _group_files() -> Iterator[Path]:
    """Where control groups of both versions may keep theirs; in a container the group is the root of what is seen."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for _, controllers, group in entries:
        if "memory" in controllers.split(","):
            for folder in (root / "memory" / group.lstrip("/"), root / "memory"):
                yield folder / "memory.oom_control"
        elif not controllers:
            for folder in (root / group.lstrip("/"), root):
                yield folder / "memory.events"


def _kills_in(path: Path) -> int | None:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return None
