"""Names a process in ``ps``. Linux only; elsewhere the command line itself, which names the role, has to do."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

#: An argument of this length, given when a process is started, leaves room for a title.
PADDING = " " * 160


def set_title(title: str) -> bool:
    """Overwrites this process' command line in place, and its short name.

    The command line's memory is found through ``/proc/self/stat`` and compared with ``/proc/self/cmdline`` before a
    byte is written. The new title is cut to the room there is.

    Returns:
        whether the title was set.
    """
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(title.removeprefix("mpworker: ")[:15])
    if (setproctitle := sys.modules.get("setproctitle")) is not None:  # its own place for titles is not where we look
        setproctitle.setproctitle(title)
        return True
    try:
        import ctypes

        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        size = end - start
        if size < 2 or ctypes.string_at(start, size) != Path("/proc/self/cmdline").read_bytes():
            return False
        ctypes.memmove(start, title.encode()[: size - 1].ljust(size, b"\0"), size)
    except (ImportError, OSError, ValueError, IndexError):
        return False
    return True
