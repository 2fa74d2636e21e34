"""``ProcessPool``: the engine behind the face of :class:`concurrent.futures.Executor`.

Owns futures, and one thread that turns the handle's events into their results. Never forks in the caller's process
(unless ``start_method="fork"`` asks for it), never runs a callback in it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, InvalidStateError
from functools import partial
from itertools import islice
from time import monotonic
from typing import Any, TypeVar

from mpworker.errors import BootError, ConfigurationError
from mpworker.pool import handle as handles
from mpworker.pool.callbacks import Callback, log_hook_failure, pack_hooks
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.handle import Handle, PoolOptions
from mpworker.pool.parcel import name_of, open_outcome, pack_call
from mpworker.settings import START_METHODS

T = TypeVar("T")
logger = logging.getLogger("mpworker.pool")
_COUNTS = ("submitted", "done", "failed", "timed_out", "lost", "cancelled")
_live: weakref.WeakSet[_Core] = weakref.WeakSet()


class TaskFuture(Future[Any]):
    """A future whose :meth:`cancel` also ends a task that runs: its worker is killed and replaced."""

    def __init__(self, core: _Core, job: int) -> None:
        super().__init__()
        self._core = core
        #: the job's number in its pool
        self.job = job

    def cancel(self) -> bool:
        """Cancels the task, started or not; the future is cancelled at once.

        Returns:
            ``False`` if the task is finished already.
        """
        with self._condition:
            if self._state == "FINISHED":
                return False
            if self._state.startswith("CANCELLED"):
                return True
            # The base class refuses to cancel what runs; here it can be ended.
            self._state = "CANCELLED"
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        self.set_running_or_notify_cancel()
        self._core.handle.cancel(self.job, signal.SIGTERM)
        self._core.wake()
        return True

    def begin(self) -> None:
        """The task runs, unless the future has been cancelled meanwhile."""
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"

    def settle(self, succeeded: bool, value: Any) -> None:
        """Takes the outcome, unless the future has been cancelled meanwhile."""
        self.begin()
        with contextlib.suppress(InvalidStateError):
            if succeeded:
                self.set_result(value)
            else:
                self.set_exception(value)


class _Core:
    """What the thread needs. Holds no reference to the pool, so that a forgotten pool can be collected."""

    def __init__(self, handle: Handle, max_pending: int | None) -> None:
        self.handle = handle
        self.owner = os.getpid()
        self.futures: dict[int, TaskFuture] = {}
        #: of jobs with callbacks, for the log
        self.names: dict[int, str] = {}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.running: set[int] = set()
        self.broken: BootError | None = None
        self.slots = threading.BoundedSemaphore(max_pending) if max_pending else None
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self.thread = threading.Thread(target=self._run, name="mpworker-results", daemon=True)

    def wake(self) -> None:
        """Makes the thread look at the outbox, if something is left in it."""
        if self.handle.wants_write:
            with contextlib.suppress(OSError):
                os.write(self._wake_writer, b"!")

    def close(self) -> None:
        if os.getpid() == self.owner:
            self.handle.close()
            self.wake()

    def _run(self) -> None:
        try:
            while self.handle.fileno() >= 0:
                self._wait()
                for frame in self.handle.drain():
                    self._on_event(frame)
        except BaseException as exc:
            logger.critical("the thread that reads results has failed", exc_info=True)
            self.broken = BootError(f"the thread that reads results has failed: {exc!r}")
            self.handle.kill()
        finally:
            self._fail_all(self.broken or BootError("the pool has been shut down"))
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _wait(self) -> None:
        poll = select.poll()
        line = self.handle.fileno()
        poll.register(line, select.POLLIN | (select.POLLOUT if self.handle.wants_write else 0))
        poll.register(self._wake_reader, select.POLLIN)
        for descriptor, mask in poll.poll():
            if descriptor == self._wake_reader:
                os.read(descriptor, 4096)
            elif mask & select.POLLOUT:
                self.handle.flush()

    def _on_event(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.STARTED:
            self.running.add(frame.job)
            if (future := self.futures.get(frame.job)) is not None:
                future.begin()
        elif kind is Kind.DONE or kind is Kind.ENDED:
            self._on_end(frame)
        elif kind is Kind.HOOK_ENDED:
            self._on_hook_ended(frame)
        elif kind is Kind.LOG:
            logger.log(frame.flag, "%s", frame.body.decode(errors="replace"))
        elif kind is Kind.BROKEN:
            self.broken = handles.boot_error(frame)

    def _on_end(self, frame: Frame) -> None:
        self.running.discard(frame.job)
        succeeded, value = open_outcome(frame.flag, frame.body)
        if frame.kind is Kind.ENDED:
            state = handles.verdict_of(frame)[0].value
        else:
            state = "done" if succeeded else "failed"
        self.counts[state] += 1
        if self.slots is not None:
            self.slots.release()
        if (future := self.futures.pop(frame.job, None)) is not None:
            future.settle(succeeded, value)

    def _on_hook_ended(self, frame: Frame) -> None:
        name = self.names.pop(frame.job, "?")
        succeeded, error = open_outcome(frame.flag, frame.body)
        if not succeeded:
            log_hook_failure(f"{name}[{frame.job}]", error)

    def _fail_all(self, error: BaseException) -> None:
        while self.futures:
            self.futures.popitem()[1].settle(False, error)
            if self.slots is not None:
                self.slots.release()


class ProcessPool(Executor):
    """A supervised process pool.

    Each task may have a soft limit (an exception inside it) and a hard limit (its process is killed); a death costs the
    one task that the process was running; ``callback`` and ``error_callback`` run in a process of their own.
    Processes start with the first task. Functions and arguments are pickled; a script guards its entry with
    ``if __name__ == "__main__":``.

    Args:
        max_workers: processes; default: the CPUs this process may use.
        start_method: ``auto`` (preload in a clean process and fork from it if it is one-threaded, else spawn),
            ``fork`` (workers get this process' memory as it is at the first task), ``forkserver``, ``spawn``.
        initializer, initargs: called in each worker before its first task.
        max_tasks_per_worker: tasks after which a worker is replaced.
        max_memory_per_worker: peak memory in bytes after which a worker is replaced, between tasks.
        timeout, soft_timeout: limits in seconds for tasks that bring none of their own.
        max_pending: unfinished tasks at which :meth:`submit` and :meth:`schedule` wait for one to finish.
        callback_timeout: seconds that one callback may run.
        ready_timeout: seconds that a worker may take to import and to initialize.

    Raises:
        ConfigurationError: an argument does not fit (it is a ``ValueError``).
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        start_method: str = "auto",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_worker: int | None = None,
        max_memory_per_worker: int | None = None,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        max_pending: int | None = None,
        callback_timeout: float = 60.0,
        ready_timeout: float = 120.0,
    ) -> None:
        if start_method not in START_METHODS:
            raise ConfigurationError(f"start_method must be one of {', '.join(START_METHODS)}, not {start_method!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._options = PoolOptions(
            size=_count("max_workers", max_workers) or handles.default_size(),
            start_method=start_method,
            ready_timeout=_limit("ready_timeout", ready_timeout),
            callback_limit=_limit("callback_timeout", callback_timeout),
            max_tasks=_count("max_tasks_per_worker", max_tasks_per_worker),
            max_memory=_count("max_memory_per_worker", max_memory_per_worker),
        )
        self._initializer = (initializer, initargs) if initializer else None
        self._timeout, self._soft_timeout = _limit("timeout", timeout), _limit("soft_timeout", soft_timeout)
        self._max_pending = _count("max_pending", max_pending)
        self._lock = threading.Lock()
        self._core: _Core | None = None
        self._closed = False

    # -- tasks ---------------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Runs ``fn(*args, **kwargs)`` in a worker, under the pool's own limits. As :meth:`schedule` otherwise."""
        return self.schedule(fn, args, kwargs)

    def schedule(
        self,
        fn: Callable[..., T],
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> Future[T]:
        """Runs ``fn(*args, **kwargs)`` in a worker.

        Args:
            timeout: seconds after which its process is killed: ``TimeLimitExceeded``.
            soft_timeout: seconds after which ``SoftTimeLimitExceeded`` is raised inside the task.
            callback: called with the result, in the callback process.
            error_callback: called there with the exception, however the task failed. Exactly one of the two runs.

        Returns:
            a future; its ``cancel()`` also ends a running task.

        Raises:
            PayloadError: the call cannot be pickled.
            ConfigurationError: a limit is not a positive number of seconds.
            BootError: the workers cannot start (it is a ``BrokenExecutor``).
            RuntimeError: after :meth:`shutdown`.
        """
        hard = _limit("timeout", timeout) or self._timeout
        soft = _limit("soft_timeout", soft_timeout) or self._soft_timeout
        body, hooks = pack_call(fn, tuple(args), kwargs or {}), pack_hooks(callback, error_callback)
        return self._send(body, soft, hard, hooks, name_of(fn) if hooks else "")

    def _send(self, body: bytes, soft: float, hard: float, hooks: bytes, name: str) -> TaskFuture:
        core = self._started()
        if core.slots is not None:
            core.slots.acquire()
        with self._lock:
            if core.broken is None and not self._closed:
                job = core.handle.next_id()
                future = core.futures[job] = TaskFuture(core, job)
                if name:
                    core.names[job] = name
                core.counts["submitted"] += 1
                core.handle.submit(job, body, soft=soft, hard=hard, hooks=hooks)
                core.wake()
                return future
        if core.slots is not None:
            core.slots.release()
        raise core.broken or RuntimeError("cannot schedule new futures after shutdown")

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """Like ``map(fn, *iterables)``; results come in order.

        Args:
            timeout: seconds that all results together may take, from this call on.
            chunksize: items that travel as one task; the pool's limits are multiplied by it.

        Raises:
            TimeoutError: from the iterator; what is left is cancelled.
        """
        if chunksize < 1:
            raise ConfigurationError("chunksize must be at least 1")
        end = None if timeout is None else monotonic() + timeout
        futures: list[Future[list[T]]] = []
        items = zip(*iterables, strict=False)
        while chunk := list(islice(items, chunksize)):
            body = pack_call(partial(_run_chunk, fn), (chunk,), {})
            size = len(chunk)
            futures.append(self._send(body, self._soft_timeout * size, self._timeout * size, b"", ""))
        return _results(futures, end)

    # -- the pool ------------------------------------------------------------------------------------------------

    def _started(self) -> _Core:
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._core is None:
                handle = handles.make(self._options, initializer=self._initializer)
                handle.start()
                core = self._core = _Core(handle, self._max_pending)
                core.thread.start()
                if not _live:
                    atexit.register(_end_live_pools)
                _live.add(core)
                weakref.finalize(self, core.close).atexit = False
            return self._core

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more tasks; ends when everything submitted is finished, callbacks included.

        Args:
            wait: return only then.
            cancel_futures: cancel what has not started.
        """
        with self._lock:
            self._closed = True
            core = self._core
        if core is None:
            return
        if cancel_futures:
            for job, future in list(core.futures.items()):
                if job not in core.running:
                    future.cancel()
        core.close()
        if wait:
            core.thread.join()

    def stats(self) -> dict[str, Any]:
        """What the pool has done and is doing.

        Returns:
            counts of ``submitted``, ``done``, ``failed``, ``timed_out``, ``lost``, ``cancelled``; ``pending`` and
            ``running`` now; ``dispatcher`` (pid) and ``workers`` (dicts with ``pid``, ``slot`` and ``lane``: 0 for
            workers, 1 for the callback process).
        """
        core = self._core
        if core is None:
            return {**dict.fromkeys(_COUNTS, 0), "pending": 0, "running": 0, "dispatcher": None, "workers": []}
        return {
            **core.counts,
            "pending": core.handle.pending,
            "running": len(core.running),
            "dispatcher": core.handle.pid,
            "workers": list(core.handle.workers),
        }


def _count(name: str, value: int | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _limit(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigurationError(f"{name} must be a number of seconds above 0 and below 1e9, not {value!r:.40}")
    return float(value)


def _run_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*args) for args in chunk]


def _results(futures: list[Future[list[T]]], end: float | None) -> Iterator[T]:
    futures.reverse()
    try:
        while futures:
            yield from futures.pop().result(None if end is None else end - monotonic())
    finally:
        for future in futures:
            future.cancel()


def _end_live_pools() -> None:
    """At interpreter exit: pending work is finished first, as ``concurrent.futures`` does."""
    cores = [core for core in _live if core.owner == os.getpid() and core.thread.is_alive()]
    for core in cores:
        core.close()
    for core in cores:
        core.thread.join()
