"""Futures, and the thread that turns the events of a handle into their results.

Owns the futures of one pool. Holds no reference to the pool itself, so that a forgotten pool can be collected. Never
runs a callback of a task: those belong to the callback process.

"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import weakref
from concurrent.futures import Future, InvalidStateError
from typing import Any, NamedTuple, TypeVar

from mpworker.errors import BootError
from mpworker.pool import handle as handles
from mpworker.pool.callbacks import log_hook_failure
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.handle import Handle
from mpworker.pool.page import results
from mpworker.pool.parcel import open_outcome

logger = logging.getLogger("mpworker.pool")
T = TypeVar("T")
COUNTS = ("done", "failed", "timed_out", "lost", "cancelled")
#: Submissions that may wait for company while others are unfinished.
_COMPANY = 128
_live: weakref.WeakSet[Results] = weakref.WeakSet()
#: Held while a future gets its condition, and while one that has none changes its state. Nothing else is locked inside.
_gate = threading.RLock()


class Progress(NamedTuple):
    """What a task has last said of itself, by :func:`mpworker.progress`."""

    done: float
    total: float
    message: str


class TaskFuture(Future[T]):
    """A future whose :meth:`cancel` also ends a task that runs: its worker is killed and replaced.

    Its condition, the most expensive part of a future, is made when somebody first asks for it, and the lists that it
    guards with it. Until then nobody waits and no callback has been added, so that its state may change under the gate
    alone.
    """

    # As the base class sets them.
    _state = "PENDING"
    _result: Any = None
    _exception: BaseException | None = None
    _waiters: list[Any]
    _done_callbacks: list[Any]
    _made: threading.Condition | None = None
    #: how far the task is, as far as is known here; ``None`` if it has said nothing
    progress: Progress | None = None

    def __init__(self, core: Results, job: int) -> None:
        self._core = core
        #: the job's number in its pool
        self.job = job

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        with _gate:
            if (condition := self._made) is None:
                self._waiters, self._done_callbacks = [], []
                condition = self._made = threading.Condition()
            return condition

    def result(self, timeout: float | None = None) -> Any:
        """As in the base class; a value that is there is returned without a lock."""
        if self._state == "FINISHED" and self._exception is None:
            return self._result
        return super().result(timeout)

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
        self._invoke_callbacks()
        self.set_running_or_notify_cancel()
        if self._core.owner == os.getpid():  # not in a fork, whose future this is not
            self._core.handle.cancel(self.job, signal.SIGTERM)
            self._core.wake()
        return True

    def _invoke_callbacks(self) -> None:
        # The base class lets SystemExit through, which result() raises again in a callback if the task has raised it.
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException as exc:
                if not isinstance(exc, Exception) and threading.current_thread() is not self._core.thread:
                    raise
                logger.exception("a callback of %r has failed", self)

    def begin(self) -> None:
        """The task runs, unless the future has been cancelled meanwhile."""
        with _gate:
            if self._made is None:
                self._state = "RUNNING"
                return
        with self._condition:
            if self._state == "PENDING":
                self._state = "RUNNING"

    def cut(self, body: bytes) -> None:
        """Its worker will not begin the rest of its items. Only a chunk of a map has any."""

    def settle_unwatched(self, succeeded: bool, value: Any) -> bool:
        """Takes the outcome if nobody has asked for the condition: no wait to end, no callback to run."""
        with _gate:
            if self._made is not None:
                return False
            self._result, self._exception = (value, None) if succeeded else (None, value)
            self._state = "FINISHED"
            return True

    def settle(self, succeeded: bool, value: Any) -> None:
        """Takes the outcome, unless the future has been cancelled meanwhile."""
        self.begin()
        with contextlib.suppress(InvalidStateError):
            if succeeded:
                self.set_result(value)
            else:
                self.set_exception(value)


class Results:
    """One pool's futures and the thread behind them."""

    def __init__(self, handle: Handle, max_pending: int | None) -> None:
        self.handle = handle
        self.owner = os.getpid()
        self.futures: dict[int, TaskFuture[Any]] = {}
        #: of jobs with callbacks, for the log
        self.names: dict[int, str] = {}
        self.submitted = 0
        self.counts = dict.fromkeys(COUNTS, 0)
        self.running: set[int] = set()
        self.broken: RuntimeError | None = None
        self.ended = False
        self.slots = threading.BoundedSemaphore(max_pending) if max_pending else None
        #: what is cut off from now on is cancelled
        self.abandoned = False
        #: tasks that this thread has sent, and those of them that are unfinished
        self.more = 0
        self._more: set[int] = set()
        self._chunks = 0  # not settled: what is cut off from them will be sent
        self._closing = False
        self._counting = threading.RLock()  # the collector of garbage may close the pool anywhere
        self._asleep = False  # the thread waits, or is about to; who appends to the outbox wakes it
        self._few = 2 * handle.options.size
        self._much = 4 * handle.options.size + 4 * _COMPANY
        self._calling = False  # it may be in a callback, which may take long
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._poll, self._polled = select.poll(), (-1, 0)
        self.thread = threading.Thread(target=self._run, name="mpworker-results", daemon=True)

    def start(self) -> None:
        """Starts the thread; from here on the interpreter waits for this pool's work before it exits."""
        try:
            self.thread.start()
        except BaseException:  # the system, or an interpreter that is about to end, refuses
            self.handle.kill()
            os.close(self._wake_reader)
            os.close(self._wake_writer)
            raise
        if not _live:
            atexit.register(_end_live_pools)
        _live.add(self)

    def send(self) -> None:
        """Sends what has been submitted: at once while little is unfinished, else together with what follows."""
        handle = self.handle
        if handle.loose >= _COMPANY or handle.pending <= self._few or self._calling:
            handle.flush()
        if self._asleep and not self._plenty():
            self.wake()

    def _plenty(self) -> bool:
        """The dispatcher has so much that what is loose may wait for company until something of that is finished."""
        return self.handle.pending - self.handle.loose > self._much

    def wake(self) -> None:
        """Makes the thread look at the outbox, if something is left in it."""
        if self._asleep and self.handle.waiting:
            self._asleep = False
            with contextlib.suppress(OSError):
                os.write(self._wake_writer, b"!")

    def cancel_all(self) -> None:
        """Cancels what is not finished, also what runs, and what will be cut off."""
        self.abandoned = True
        for future in list(self.futures.values()):
            future.cancel()

    def close(self) -> None:
        """Nothing more will be submitted; the thread ends when all is done."""
        if os.getpid() == self.owner:
            with self._counting:
                self._closing = True
                waits = self._chunks > 0
            if not waits:
                self.handle.close()
                self.wake()

    def begin_chunk(self) -> None:
        """A chunk is sent; until it has ended, more may be."""
        with self._counting:
            self._chunks += 1

    def end_chunk(self) -> None:
        with self._counting:
            self._chunks -= 1
            due = self._closing and not self._chunks
        if due:
            self.handle.close()

    def send_more(self, future: TaskFuture[Any], body: bytes, soft: float, hard: float) -> None:
        """From this thread: what had been submitted and was cut off. It waits for no room, and takes none."""
        self.more += 1
        if self.slots is not None:
            self._more.add(future.job)
        self.futures[future.job] = future
        self.handle.submit(future.job, body, soft=soft, hard=hard, held=True)
        if self.abandoned:  # whoever said so may not have seen this one
            future.cancel()

    def _frees_slot(self, job: int) -> bool:
        if job in self._more:
            self._more.remove(job)
            return False
        return job not in self.names  # a task with callbacks is unfinished until one of them has run

    def _run(self) -> None:
        try:
            while self.handle.fileno() >= 0:
                self._wait()
                self._hear()
        except BaseException as exc:
            logger.critical("the thread that reads results has failed", exc_info=True)
            self.broken = BootError(f"the thread that reads results has failed: {exc!r}")
            self.handle.kill()
        finally:
            self.broken = self.broken or RuntimeError("cannot schedule new futures: the pool has been shut down")
            self.ended = True
            self.fail_all()
            os.close(self._wake_reader)
            os.close(self._wake_writer)

    def _hear(self) -> None:
        for frame in self.handle.drain(starts=False):  # no local of :meth:`_run`: the last one may be large
            self._on_event(frame)

    def _wait(self) -> None:
        line = self.handle.fileno()
        self._asleep = True
        wanted = select.POLLIN if self.handle.flush(gather=not self._plenty()) else select.POLLIN | select.POLLOUT
        if self._polled != (line, wanted):  # a new dispatcher, a full line
            self._poll = select.poll()
            self._poll.register(line, wanted)
            self._poll.register(self._wake_reader, select.POLLIN)
            self._polled = line, wanted
        for descriptor, mask in self._poll.poll():
            if descriptor == self._wake_reader:
                os.read(descriptor, 4096)
            elif mask & select.POLLOUT:
                self.handle.flush()
        self._asleep = False

    def _on_event(self, frame: Frame) -> None:
        kind = frame.kind
        if kind is Kind.STARTED:
            self.running.add(frame.job)
            if (future := self.futures.get(frame.job)) is not None:
                future.begin()
        elif kind is Kind.RESULTS:
            self._on_results(frame)
        elif kind is Kind.DONE or kind is Kind.ENDED:
            self._on_end(frame)
        elif kind is Kind.PROGRESS:
            if (future := self.futures.get(frame.job)) is not None:
                future.progress = Progress(frame.a, frame.b, frame.body.decode(errors="replace"))
        elif kind is Kind.CUT:
            if (future := self.futures.get(frame.job)) is not None:
                future.cut(frame.body)
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
        if self.slots is not None and self._frees_slot(frame.job):
            self.slots.release()
        future = self.futures.pop(frame.job, None)
        if future is not None and not future.settle_unwatched(succeeded, value):
            self._settle(future, succeeded, value)

    def _on_results(self, frame: Frame) -> None:
        took, futures, running = self.handle.took, self.futures, self.running
        ended: list[tuple[TaskFuture[Any] | None, bool, Any]] = []
        done = freed = 0
        for job, flag, _, _, body in results(frame):
            if took(job):
                if running:
                    running.discard(job)
                succeeded, value = open_outcome(flag, body)
                done += succeeded
                freed += self.slots is not None and self._frees_slot(job)
                ended.append((futures.pop(job, None), succeeded, value))
        self.counts["done"] += done
        self.counts["failed"] += len(ended) - done
        if self.slots is not None and freed:
            self.slots.release(freed)
        watched: list[tuple[TaskFuture[Any], bool, Any]] = []
        with _gate:
            for future, succeeded, value in ended:
                if future is None:
                    pass
                elif type(future) is not TaskFuture or future._made is not None or not succeeded:
                    watched.append((future, succeeded, value))
                else:  # as settle_unwatched
                    future._result = value
                    future._state = "FINISHED"
        for future, succeeded, value in watched:
            if not future.settle_unwatched(succeeded, value):
                self._settle(future, succeeded, value)

    def _settle(self, future: TaskFuture[Any], succeeded: bool, value: Any) -> None:
        self._calling = True  # callbacks of the future run here
        self.handle.flush()
        future.settle(succeeded, value)
        self._calling = False

    def _on_hook_ended(self, frame: Frame) -> None:
        if self.slots is not None and frame.job in self.names:
            self.slots.release()
        name = self.names.pop(frame.job, "?")
        succeeded, error = open_outcome(frame.flag, frame.body)
        if not succeeded:
            log_hook_failure(f"{name}[{frame.job}]", error)

    def progress(self) -> dict[int, Progress]:
        """Of each running job that has told its progress."""
        futures = {job: self.futures.get(job) for job in list(self.running)}
        return {job: future.progress for job, future in futures.items() if future and future.progress}

    def fail_all(self) -> None:
        """The thread has ended: nobody else will settle these."""
        assert self.broken is not None
        while self.futures:
            self.futures.popitem()[1].settle(False, self.broken)
        with contextlib.suppress(ValueError):  # whoever waits for a slot shall hear that there will be none
            while self.slots is not None:
                self.slots.release()


def _end_live_pools() -> None:
    """At interpreter exit: pending work is finished first, as ``concurrent.futures`` does; but not after Ctrl-C."""
    cores = [core for core in _live if core.owner == os.getpid() and core.thread.is_alive()]
    try:
        for core in cores:
            core.close()
        if _interrupted():
            raise KeyboardInterrupt
        for core in cores:
            core.thread.join()
    except KeyboardInterrupt:
        for core in cores:
            core.cancel_all()
        for core in cores:
            core.thread.join()


def _interrupted() -> bool:
    """Whether the interpreter ends because of Ctrl-C, and not of the end of a session in which that was used before."""
    return getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1")
