"""Every error mpworker raises, in one tree. Holds no logic beyond the wording of the messages.

MPWorkerError
├── ConfigurationError          a setting is wrong; the message names it and says what to do
├── BootError                   a child process could not get ready (also a ``BrokenExecutor``)
├── PoolFull                    ``max_pending`` is reached, and the pool shall not wait (also a ``queue.Full``)
├── PayloadError                something cannot be pickled or unpickled (also a ``TypeError`` and a ``PicklingError``)
├── RemoteError                 an error from a child that cannot be rebuilt here; tells its type and text
├── UnheardError                a classic model failed that has no ``error_callback``
├── ProtocolError               a peer sent bytes that are no frame
├── StoreError                  a result could not be written or read
├── SoftTimeLimitExceeded       raised *inside* a task that may still clean up
├── TimeLimitExceeded           the task was killed at its limit (also a ``TimeoutError``)
├── MemoryLimitExceeded         raised inside a task that uses too much memory, or why it was killed (a ``MemoryError``)
├── TaskCancelled               the task was cancelled (also a ``CancelledError``)
├── WorkerLost                  the process that ran the task died
├── PoisonMessage               a message has killed too many workers; it is kept, and not run again
└── RequeueError                such a message could not be read or sent again; it is where it was

``RemoteTraceback`` stands outside: it is only ever the ``__cause__`` of an error from a child.
"""

from __future__ import annotations

import signal as _signal
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from pickle import PicklingError
from queue import Full
from typing import Any


class MPWorkerError(Exception):
    """Base of every error that mpworker itself raises."""


class ConfigurationError(MPWorkerError, ValueError):
    """A setting or an argument is wrong. The message names it and says what to do."""


class BootError(MPWorkerError, BrokenExecutor):
    """A child process could not get ready: its preload or its initializer failed, or it took too long."""


class PoolFull(MPWorkerError, Full):
    """So many tasks are unfinished as ``max_pending`` allows, and the pool shall not wait. Nothing was sent."""


class PayloadError(MPWorkerError, TypeError, PicklingError):
    """A function, an argument or a result cannot be pickled, or not unpickled at the other end."""


class RemoteError(MPWorkerError):
    """Stands for an exception of a child process that cannot be rebuilt in this one.

    Args:
        type_name: the exception's class, as ``module.qualname``.
        text: its ``str()``.
    """

    def __init__(self, type_name: str, text: str = "") -> None:
        super().__init__(type_name, text)
        self.type_name, self.text = type_name, text

    def __str__(self) -> str:
        return f"{self.type_name}: {self.text}" if self.text else self.type_name


class UnheardError(MPWorkerError):
    """A task failed and has no ``error_callback`` that could hear it; the pool's log says so by name."""


class ProtocolError(MPWorkerError):
    """Bytes on a pipe that are no frame. The message names the peer.

    Args:
        before: the frames that came in front of those bytes; they count.
    """

    def __init__(self, text: str = "", before: Sequence[Any] = ()) -> None:
        super().__init__(text)
        self.before = before


class StoreError(MPWorkerError, OSError):
    """The journal could not be written or read."""


class SoftTimeLimitExceeded(MPWorkerError):
    """Raised inside a running task when its soft limit has passed; the hard limit still follows.

    Args:
        limit: the soft limit in seconds.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"the soft time limit of {self.limit:g} s has passed" if self.limit else "the soft time limit has passed"


class TimeLimitExceeded(MPWorkerError, TimeoutError):
    """The task ran longer than its hard limit and its process was killed.

    Args:
        limit: the hard limit in seconds.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__(limit)
        self.limit = limit

    def __str__(self) -> str:
        return f"killed at its time limit of {self.limit:g} s" if self.limit is not None else "killed at its time limit"


class MemoryLimitExceeded(MPWorkerError, MemoryError):
    """The task used more memory than it may: raised inside it, or its process was killed because that did not help.

    Args:
        limit: in bytes, ``None`` where it is not known.
        used: by the task when it was last seen, in bytes; ``None`` where it is not known.
    """

    def __init__(self, limit: int | None = None, used: int | None = None) -> None:
        super().__init__(limit, used)
        self.limit, self.used = limit, used

    def __str__(self) -> str:
        if self.limit is None or self.used is None:
            return "the memory limit has been passed"
        return f"the memory limit has been passed: used {_mebibytes(self.used)}, limit {_mebibytes(self.limit)}"


class TaskCancelled(MPWorkerError, CancelledError):
    """The task was cancelled, before it started or while it ran (then its process was ended)."""


class WorkerLost(MPWorkerError):
    """The worker process that ran the task died.

    Args:
        pid: of the process that died, ``None`` where it is not known.
        exitcode: its exit code, ``None`` when a signal ended it.
        signal: the number of that signal, else ``None``.
        max_rss: the most memory that the process ever used, in bytes, ``None`` where it is not known.
        by_pool: the pool itself sent the signal (so it was not the kernel's OOM killer).
        why: what else is known.
        rss: the memory of the process and of what its task had started when that was last looked at, in bytes; known
            only for tasks with a memory limit, else ``None``.
        runtime: how long the task had run, in seconds, ``None`` where it is not known.
        oom_killed: the kernel's out-of-memory killer has struck, since the pool last started a worker, in its control
            group or, where the kernel counts no nearer, on its machine. ``False`` also where the kernel does not say.
    """

    def __init__(
        self,
        pid: int | None = None,
        exitcode: int | None = None,
        signal: int | None = None,
        max_rss: int | None = None,
        by_pool: bool = False,
        why: str = "",
        rss: int | None = None,
        runtime: float | None = None,
        oom_killed: bool = False,
    ) -> None:
        super().__init__(pid, exitcode, signal, max_rss, by_pool, why, rss, runtime, oom_killed)
        self.pid, self.exitcode, self.signal, self.max_rss = pid, exitcode, signal, max_rss
        self.by_pool, self.why = by_pool, why
        self.rss, self.runtime, self.oom_killed = rss, runtime, oom_killed

    def __str__(self) -> str:
        who = f"worker process {self.pid}" if self.pid else "the worker process"
        if self.signal is not None:
            how = f"was ended by {_signal_name(self.signal)}"
        elif self.exitcode is not None:
            how = f"exited with code {self.exitcode}"
        else:
            how = "was lost"
        when = f", after {self.runtime:.3g} s" if self.runtime is not None else ""
        rss = f"; it had used up to {self.max_rss / 2**20:.0f} MiB" if self.max_rss else ""
        rss += f"; the task was last seen with {_mebibytes(self.rss)}" if self.rss else ""
        oom = "; out of memory?" if self.signal == _signal.SIGKILL and not self.by_pool else ""
        oom = "; killed by the kernel's out-of-memory killer" if self.oom_killed else oom
        why = f"; {self.why}" if self.why else ""
        return f"{who} {how} while it ran the task{when}{rss}{oom}{why}"


class PoisonMessage(MPWorkerError):
    """A message has cost as many workers their lives as one may. It is not run again by itself, but kept as dead."""


class RequeueError(MPWorkerError):
    """Dead messages could not be read, or one could not be sent again; then it is where it was."""


class RemoteTraceback(Exception):
    """Carries the text of a traceback from another process, as the ``__cause__`` of the error it belongs to."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size < 10 << 20 else f"{size / 2**20:.0f} MiB"


def _signal_name(number: int) -> str:
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
