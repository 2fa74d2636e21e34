"""The few kernel services that the standard library does not wrap. Each says whether it worked; none raises."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: The limit on a process' file locks, which no kernel has looked at since 2.4.
_RLIMIT_LOCKS = 10
#: NVIDIA's and AMD's.
_GPU_DEVICES = ("/dev/nvidia", "/dev/kfd")


def _prctl(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        import ctypes

        return bool(ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def die_with_parent() -> bool:
    """Asks the kernel for SIGKILL when the *thread* that is our parent ends: only for children of one-threaded ones."""
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> bool:
    """Makes this process the parent of descendants that lose theirs."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def native_threads() -> int:
    """Threads of this process as the kernel counts them, Python's or not; 1 where that cannot be told."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def open_devices() -> list[str]:
    """Device files of a GPU driver that this process has open: such a driver does not work in a fork."""
    found = set()
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{fd}")
                if path.startswith(_GPU_DEVICES):
                    found.add(path)
    return sorted(found)


class Queueing:
    """How long a thread of this process has been ready to run and had no processor (scheduler statistics)."""

    def __init__(self, thread: int) -> None:
        try:
            self._fd = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
        except OSError:
            self._fd = -1

    def seconds(self) -> float:
        """So far; 0 where the kernel does not tell."""
        try:
            return int(os.pread(self._fd, 80, 0).split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0


def alive(pid: int) -> bool:
    """Whether a process runs or may run; ``False`` for a zombie, and where the kernel does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def give_back_memory() -> bool:
    """Has the C library return free memory to the system. Some milliseconds, if there is much."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (ImportError, OSError, AttributeError):  # only glibc has that
        return False


def mark(number: int) -> bool:
    """Marks what this process starts from now on, and what that starts in turn: whatever becomes of it, another parent,
    session, program, environment or title, it inherits a limit that means nothing else.

    Args:
        number: the mark; -1 to be without one again.
    """
    if not sys.platform.startswith("linux"):  # elsewhere that limit is another one
        return False
    try:
        resource.setrlimit(_RLIMIT_LOCKS, (number, resource.getrlimit(_RLIMIT_LOCKS)[1]))
    except (OSError, ValueError, OverflowError):
        return False
    return True


def mark_of(pid: int) -> int:
    """What :func:`mark` has marked a process with; -1 for nothing, and where that cannot be told."""
    try:
        return resource.prlimit(pid, _RLIMIT_LOCKS)[0]
    except (OSError, AttributeError):
        return -1


def children() -> list[int]:
    """The pids of this process' children; empty where the kernel does not tell."""
    try:
        return [int(pid) for pid in Path("/proc/self/task", str(os.getpid()), "children").read_text().split()]
    except (OSError, ValueError):
        return []


def descendants(pid: int) -> list[int]:
    """A process' children, theirs, and so on; empty where the kernel does not tell. Not what has left its parent."""
    found, families = [], [pid]
    while families:
        with contextlib.suppress(OSError, ValueError):
            for task in Path(f"/proc/{families.pop()}/task").iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                families += children
    return found


def kill_strays(pid: int) -> None:
    """SIGKILL for those descendants of a process that have left its group, such as those in a session of their own."""
    handles = {}
    with contextlib.suppress(OSError, AttributeError):
        group = os.getpgid(pid)
        for stray in descendants(pid):
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(stray) != group:
                    handles[stray] = os.pidfd_open(stray)  # so that the number cannot come to mean another process
    if handles:
        family = set(descendants(pid))  # looked up before any of them loses its parent
        for stray, handle in handles.items():
            if stray in family:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)
