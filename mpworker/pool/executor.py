"""``ProcessPool``: the engine behind the face of :class:`concurrent.futures.Executor`.

Owns the public face: arguments, limits, life and death of the pool. Never forks in the caller's process
(unless ``start_method="fork"`` asks for it), never runs a callback in it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from mpworker.errors import ConfigurationError, PayloadError, PoolFull
from mpworker.pool import handle as handles
from mpworker.pool.callbacks import Callback, pack_hooks
from mpworker.pool.chunks import pack_chunks
from mpworker.pool.coroutines import settle
from mpworker.pool.cpus import pool_size
from mpworker.pool.futures import COUNTS, Results, TaskFuture
from mpworker.pool.handle import PoolOptions
from mpworker.pool.mapping import Chunk, Course, cancel_from, hand_out
from mpworker.pool.memory import can_tell
from mpworker.pool.parcel import name_of, pack_call, pack_error, unpack_error
from mpworker.pool.slots import SlotEnv, variables_of_slots
from mpworker.settings import START_METHODS

if TYPE_CHECKING:
    import asyncio
    from types import TracebackType

T = TypeVar("T")
F = TypeVar("F", bound=TaskFuture[Any])


class _This:
    """This process, told from a fork of it by what that runs first; asking for the pid would be a system call."""

    def __init__(self) -> None:
        self.process = object()


_this = _This()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_this.__init__)  # type: ignore[misc]
#: What a chunk of ``map`` returns: results, the packed error of the item behind them (or nothing).
_Part = tuple[list[T], bytes]


class ProcessPool(Executor):
    """A supervised process pool.

    Each task may have a soft limit (an exception inside it) and a hard limit (its process is killed); a death costs the
    one task that the process was running; ``callback`` and ``error_callback`` run in a process of their own.
    An ``async def`` function runs in its worker's one event loop, under the same limits.
    Processes start with the first task. Functions and arguments are pickled; a script guards its entry with
    ``if __name__ == "__main__":``.

    Args:
        max_workers: processes; default: :func:`~mpworker.pool.cpus.pool_size`.
        start_method: ``auto`` (preload in a clean process and fork from it if that is safe, else spawn),
            ``fork`` (workers get this process' memory as it is at the first task), ``forkserver``, ``spawn``.
        initializer, initargs: called in each worker before its first task. The arguments may be queues, locks and the
            like of a ``spawn`` context of :mod:`multiprocessing`, with ``start_method="fork"`` anything.
        slot_env: environment variables of each worker: a mapping from its slot (0 to ``max_workers`` - 1, inherited by
            its replacement) to a dict, or a callable that returns such a dict, called here for each slot, now. They
            are set before the initializer, and with ``spawn`` before anything is imported. Values may be numbers.
        max_tasks_per_worker: tasks after which a worker is replaced. Its successor is started before that, and waits
            with the initializer until its slot is free; with ``slot_env`` it is started only then.
        max_memory_per_worker: bytes that a task may use which brings no ``memory_limit`` of its own (where the system
            has no ``/proc`` this is not watched), and peak memory after which a worker is replaced, between tasks.
        timeout, soft_timeout: limits in seconds for tasks that bring none of their own.
        max_pending: unfinished tasks at which nothing more is taken; it bounds what the pool's memory holds.
        on_full: what :meth:`submit`, :meth:`schedule`, :meth:`run` and :meth:`map` do then: ``block`` until one is
            finished, or ``raise`` :class:`~mpworker.errors.PoolFull`, which is a ``queue.Full``.
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
        slot_env: SlotEnv | None = None,
        max_tasks_per_worker: int | None = None,
        max_memory_per_worker: int | None = None,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        max_pending: int | None = None,
        on_full: str = "block",
        callback_timeout: float = 60.0,
        ready_timeout: float = 120.0,
    ) -> None:
        if start_method not in START_METHODS:
            raise ConfigurationError(f"start_method must be one of {', '.join(START_METHODS)}, not {start_method!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        size = _count("max_workers", max_workers) or pool_size()
        self._slot_env = variables_of_slots(slot_env, size)
        self._options = PoolOptions(
            size=size,
            start_method=start_method,
            ready_timeout=_limit("ready_timeout", ready_timeout),
            callback_limit=_limit("callback_timeout", callback_timeout),
            max_tasks=_count("max_tasks_per_worker", max_tasks_per_worker),
            max_memory=_bytes("max_memory_per_worker", max_memory_per_worker),
            memory_limit=_bytes("max_memory_per_worker", max_memory_per_worker) if can_tell() else 0,
            # Variables of a slot are there before anything is imported, and two processes must not share them.
            warm=not self._slot_env,
        )
        self._initializer = (initializer, initargs) if initializer else None
        self._timeout, self._soft_timeout = _limit("timeout", timeout), _limit("soft_timeout", soft_timeout)
        self._max_pending = _count("max_pending", max_pending)
        if on_full not in ("block", "raise"):
            raise ConfigurationError(f"on_full must be block or raise, not {on_full!r}")
        self._blocks = on_full == "block"
        if not self._blocks and not self._max_pending:
            raise ConfigurationError("on_full='raise' needs max_pending: without it the pool is never full")
        self._lock = threading.Lock()
        self._process = _this.process
        self._core: Results | None = None
        self._submitter: ThreadPoolExecutor | None = None
        self._closed = False

    # -- tasks ---------------------------------------------------------------------------------------------------

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> TaskFuture[T]:
        """Runs ``fn(*args, **kwargs)`` in a worker, under the pool's own limits. As :meth:`schedule` otherwise.

        But a call that cannot be pickled fails its future, as with every other executor.
        """
        try:
            body = pack_call(fn, args, kwargs)
        except PayloadError as exc:
            core = self._started()
            future: TaskFuture[T] = TaskFuture(core, core.handle.next_id())
            future.settle(False, exc)
            return future
        return self._send(body, self._soft_timeout, self._timeout, b"", "")

    def schedule(
        self,
        fn: Callable[..., T],
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        memory_limit: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> TaskFuture[T]:
        """Runs ``fn(*args, **kwargs)`` in a worker.

        Args:
            timeout: seconds after which its process is killed: ``TimeLimitExceeded``.
            soft_timeout: seconds after which ``SoftTimeLimitExceeded`` is raised inside the task.
            memory_limit: bytes that its process may use, together with the processes that it has started (of the same
                process group). Beyond that ``MemoryLimitExceeded`` is raised inside the task. If it has not come below
                the limit a second later, or is found above one and a half times the limit, all of them are killed.
                It is looked at ten to twenty times in a second; what earlier tasks have left is not counted.
            callback: called with the result, in the callback process.
            error_callback: called there with the exception, however the task failed. Exactly one of the two runs.

        Returns:
            a future; its ``cancel()`` also ends a running task, and its ``progress`` is what the task has last told
            by :func:`mpworker.progress`: ``done``, ``total``, ``message``, or ``None``.

        Raises:
            PayloadError: the call cannot be pickled.
            ConfigurationError: a limit is not a positive number of seconds, or of bytes.
            PoolFull: ``max_pending`` is reached, and the pool was made with ``on_full="raise"``.
            BootError: the workers cannot start (it is a ``BrokenExecutor``).
            RuntimeError: after :meth:`shutdown`.
        """
        hard = self._timeout if timeout is None else _limit("timeout", timeout)
        soft = self._soft_timeout if soft_timeout is None else _limit("soft_timeout", soft_timeout)
        body, hooks = pack_call(fn, tuple(args), kwargs or {}), pack_hooks(callback, error_callback)
        memory = _memory_limit(memory_limit) if memory_limit is not None else 0
        return self._send(body, soft, hard, hooks, name_of(fn) if hooks else "", memory)

    async def run(
        self,
        fn: Callable[..., T],
        /,
        *args: Any,
        kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        soft_timeout: float | None = None,
        memory_limit: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> T:
        """Runs ``fn(*args, **kwargs)`` in a worker; to be awaited. Arguments and errors as those of :meth:`schedule`.

        Cancelling the awaiting task cancels the work too, also while it runs. With ``max_pending`` the wait for room
        does not block the event loop.
        """
        import asyncio

        call = partial(
            self.schedule,
            fn,
            args,
            kwargs,
            timeout=timeout,
            soft_timeout=soft_timeout,
            memory_limit=memory_limit,
            callback=callback,
            error_callback=error_callback,
        )
        future = await self._patiently(call) if self._max_pending and self._blocks else call()
        loop = asyncio.get_running_loop()
        # Not wrap_future: some exceptions, such as StopIteration, cannot be set on a future of asyncio.
        done = asyncio.Event()
        future.add_done_callback(lambda _: _wake(loop, done))
        try:
            await done.wait()
        except BaseException:  # cancelled, or given up by whoever awaited it
            future.cancel()
            raise
        return future.result()

    async def _patiently(self, call: Callable[[], Future[T]]) -> Future[T]:
        """Submits from a thread, which may wait for room; a single one, so that those who wait keep their order."""
        import asyncio

        self._started()  # after a fork, too: the thread is the parent's
        with self._lock:
            if self._submitter is None:
                self._submitter = ThreadPoolExecutor(1, "mpworker-submitter")
        submission = self._submitter.submit(call)
        try:
            return await asyncio.wrap_future(submission)
        except asyncio.CancelledError:
            submission.add_done_callback(_cancel_submitted)  # the thread may be at it
            raise

    def _send(
        self,
        body: bytes,
        soft: float,
        hard: float,
        hooks: bytes,
        name: str,
        memory: int = 0,
        make: Callable[[Results, int], F] = TaskFuture,  # type: ignore[assignment]
    ) -> F:
        core = self._started()
        if core.slots is not None:
            in_callback = threading.current_thread() is core.thread
            if not core.slots.acquire(blocking=self._blocks and not in_callback):
                if not self._blocks:
                    raise PoolFull(f"{self._max_pending} tasks are unfinished, which is all that max_pending allows")
                raise RuntimeError(
                    "max_pending is reached, and a callback of a future cannot wait for a task to finish"
                )
        with self._lock:
            if core.broken is None and not self._closed:
                job = core.handle.next_id()
                future = make(core, job)
                core.futures[job] = future
                if name:
                    core.names[job] = name
                core.submitted += 1
                core.handle.submit(job, body, soft, hard, memory, hooks, held=True)
                core.send()
                if core.ended:  # meanwhile
                    core.fail_all()
                return future
        if core.slots is not None:
            with contextlib.suppress(ValueError):  # the thread has freed all of them already
                core.slots.release()
        raise core.broken or RuntimeError("cannot schedule new futures after shutdown")

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Like ``map(fn, *iterables)``; results come in order.

        By default the pool itself lets items travel together, as one task that :meth:`stats` counts once, so that tiny
        ones cost little. That changes nothing for an item: the limits hold for each one, one that fails takes neither
        the results before it nor the run of those behind it, and if a worker that is busy with an item for more than
        some 15 ms holds others behind it, they go to whoever is free. No item runs twice: of those that a worker has
        begun and not told when it dies, none runs again, and the iterator raises ``WorkerLost`` at the first of them.

        Args:
            timeout: seconds that all results together may take, from this call on.
            chunksize: items that travel as one task, come what may; the pool's limits are multiplied by it. Default:
                as above; but 1 with ``buffersize``, which bounds memory, and with ``max_tasks_per_worker``, which
                counts items.
            buffersize: so many tasks are ahead of the results that were taken; the iterables are read accordingly.
                Default: all at once.

        Raises:
            PayloadError: the function or an item cannot be pickled; what has been sent is cancelled.
            TimeoutError: from the iterator; what is left is cancelled.
        """
        ahead = _count("buffersize", buffersize) or None
        end = None if timeout is None else monotonic() + timeout
        if chunksize is None and ahead is None and not self._options.max_tasks:
            return self._map_in_chunks(fn, iterables, end)
        chunksize = 1 if chunksize is None else chunksize
        if chunksize < 1:
            raise ConfigurationError("chunksize must be at least 1")
        items = zip(*iterables, strict=False)
        sent = self._send_chunks(fn, items, chunksize)
        futures: deque[Future[_Part[T]]] = deque()
        try:
            for future in islice(sent, ahead):
                futures.append(future)
        except BaseException:
            _cancel(futures)
            raise
        return _results(futures, sent, end)

    def _map_in_chunks(
        self, fn: Callable[..., T], iterables: tuple[Iterable[Any], ...], end: float | None
    ) -> Iterator[T]:
        soft, hard, workers = self._soft_timeout, self._timeout, self._options.size
        course, first = Course(workers, soft, hard), None
        try:
            for body, size in pack_chunks(fn, iterables, workers):
                make = partial(Chunk, course=course, body=body, size=size)
                chunk = self._send(body, soft, hard, b"", "", make=make)
                course.append(chunk)
                first = first or chunk
        except BaseException:
            cancel_from(first)
            raise
        course.complete()
        return hand_out(first, end)

    def _send_chunks(
        self, fn: Callable[..., T], items: Iterator[tuple[Any, ...]], chunksize: int
    ) -> Iterator[Future[_Part[T]]]:
        while chunk := list(islice(items, chunksize)):
            body = pack_call(partial(_run_chunk, fn), (chunk,), {})
            size = len(chunk)
            yield self._send(body, self._soft_timeout * size, self._timeout * size, b"", "")

    # -- the pool ------------------------------------------------------------------------------------------------

    def _started(self) -> Results:
        if self._process is not _this.process:
            # A fork has inherited us: the line and the job numbers are the parent's. We start anew.
            self._process, self._lock, self._core = _this.process, threading.Lock(), None
            self._submitter = None
        if (core := self._core) is not None and not self._closed:  # who submits looks again, under the lock
            return core
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._core is None:
                handle = handles.make(self._options, initializer=self._initializer, slot_env=self._slot_env)
                handle.start()
                core = Results(handle, self._max_pending)
                core.start()
                self._core = core
                weakref.finalize(self, core.close).atexit = False
            return self._core

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more tasks; ends when everything submitted is finished, callbacks included.

        Args:
            wait: return only then.
            cancel_futures: cancel what has not started.
        """
        if self._process is not _this.process:
            return  # the pool is our parent's
        with self._lock:
            self._closed = True
            core = self._core
            if self._submitter is not None:
                self._submitter.shutdown(wait=False)
        if core is None:
            return
        if cancel_futures:
            core.abandoned = True
            for job, future in core.futures.copy().items():
                if job not in core.running:
                    future.cancel()
        core.close()
        if wait and threading.current_thread() is not core.thread:
            core.thread.join()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """As :meth:`shutdown`; but after Ctrl-C what is not finished is cancelled."""
        core = self._core
        if core is not None and exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            core.cancel_all()
        self.shutdown()

    def stats(self) -> dict[str, Any]:
        """What the pool has done and is doing.

        Returns:
            counts of ``submitted``, ``done``, ``failed``, ``timed_out``, ``lost``, ``cancelled``; ``pending`` and
            ``running`` now; ``progress`` of running tasks by job number; ``dispatcher`` (pid) and ``workers`` (dicts
            with ``pid``, ``slot`` and ``lane``: 0 for workers, 1 for the callback process).
        """
        core = self._core
        if core is None:
            nothing: dict[str, Any] = {"pending": 0, "running": 0, "progress": {}, "dispatcher": None, "workers": []}
            return {"submitted": 0, **dict.fromkeys(COUNTS, 0), **nothing}
        return {
            **core.counts,
            "submitted": core.submitted + core.more,
            "pending": core.handle.pending,
            "running": len(core.running),
            "progress": core.progress(),
            "dispatcher": core.handle.pid,
            "workers": list(core.handle.workers),
        }


def _count(name: str, value: int | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _bytes(name: str, value: int | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 60:
        raise ConfigurationError(f"{name} must be a whole number of bytes of at least 1, not {value!r:.40}")
    return value


def _memory_limit(value: int | None) -> int:
    if not can_tell():
        raise ConfigurationError("memory_limit needs /proc, where Linux tells how much memory a process uses")
    return _bytes("memory_limit", value)


def _limit(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if type(value) is float and 0.0 < value < 1e9:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise ConfigurationError(f"{name} must be a number of seconds above 0 and below 1e9, not {value!r:.40}")
    return float(value)


def _run_chunk(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> _Part[T]:
    """Runs items one after another. Those before one that fails keep their results."""
    results: list[T] = []
    for args in chunk:
        try:
            results.append(settle(fn(*args)))
        except Exception as exc:
            if not results:
                raise
            exc.with_traceback(exc.__traceback__.tb_next if exc.__traceback__ else None)
            return results, pack_error(exc)
    return results, b""


def _results(futures: deque[Future[_Part[T]]], rest: Iterator[Future[_Part[T]]], end: float | None) -> Iterator[T]:
    try:
        while futures:
            results, error = futures.popleft().result(None if end is None else end - monotonic())
            futures.extend(islice(rest, 1))
            results.reverse()
            while results:  # not "yield from": a result that was taken is not ours to keep
                yield results.pop()
            if error:
                raise unpack_error(error)
    finally:
        _cancel(futures)


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has been closed
        loop.call_soon_threadsafe(event.set)


def _cancel_submitted(submission: Future[Future[Any]]) -> None:
    if not submission.cancelled() and submission.exception() is None:
        submission.result().cancel()


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()
