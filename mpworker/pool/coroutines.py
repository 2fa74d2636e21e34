"""The one event loop of a worker, for tasks that are coroutines: made when the first one comes, kept for all others.

Owns how a soft limit gets into a coroutine that waits. Never imports :mod:`asyncio` before a coroutine is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Generator
from types import CoroutineType, FrameType, coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("mpworker.pool")

#: Seconds for what is left in the loop when its process leaves.
_FAREWELL = 0.5
#: by pid: a fork inherits one that it must neither use nor close
_loops: dict[int, _Loop] = {}


def settle(value: Any) -> Any:
    """The result of a call: if it is a coroutine, it is run to its end, and what that returns or raises counts.

    What it leaves running in the loop goes on when the next coroutine runs, as a thread would; if it fails, what it has
    started is cancelled.
    """
    if not isinstance(value, CoroutineType):
        return value
    try:
        if (loop := _loops.get(os.getpid())) is None or loop.is_closed():
            loop = _loops[os.getpid()] = _Loop()
        return loop.run(value)
    finally:
        value.close()  # if it was interrupted before it began


def running() -> bool:
    """Whether this process' loop is in the middle of a coroutine: then it cannot run another one to its end."""
    return (loop := _loops.get(os.getpid())) is not None and loop.is_running()


def interrupt(frame: FrameType | None, error: Callable[[], BaseException]) -> bool:
    """From a signal handler: gets an exception into the coroutine that runs.

    Args:
        frame: what the signal has interrupted.
        error: makes the exception.

    Returns:
        ``False`` if the handler shall raise it right where it is.
    """
    loop = _loops.get(os.getpid())
    return loop is not None and loop.interrupt(frame, error)


def close() -> None:
    """Before the process ends: what is left in the loop is cancelled, and gets a moment to clean up."""
    if (loop := _loops.pop(os.getpid(), None)) is not None and not loop.is_closed():
        loop.say_goodbye()


class _Loop:
    def __init__(self) -> None:
        import asyncio

        self.runner = asyncio.Runner()
        self._all_tasks, self._current_task = asyncio.all_tasks, asyncio.current_task
        self._main: asyncio.Task[Any] | None = None
        self._coroutine: CoroutineType[Any, Any, Any] | None = None
        #: what the coroutine shall hear when it wakes up next
        self._due: Callable[[], BaseException] | None = None

    def is_closed(self) -> bool:
        """A task may have done that: the loop is the current one of its thread."""
        return self.runner.get_loop().is_closed()

    def is_running(self) -> bool:
        return self.runner.get_loop().is_running()

    def say_goodbye(self) -> None:
        # Not runner.close(): that waits for whatever does not mind being cancelled, and for threads.
        import asyncio

        loop = self.runner.get_loop()
        with contextlib.suppress(BaseException):
            if left := self._all_tasks(loop):
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.wait(left, timeout=_FAREWELL))
            loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), _FAREWELL))

    def run(self, coroutine: CoroutineType[Any, Any, Any]) -> Any:
        loop = self.runner.get_loop()
        before = self._all_tasks(loop)
        self._due, self._coroutine = None, coroutine
        main = self._main = loop.create_task(self._driven(coroutine))
        try:
            while True:
                try:
                    return loop.run_until_complete(main)
                except (SystemExit, KeyboardInterrupt) as exc:
                    if main.done() or not any(_ended_with(task, exc) for task in before):
                        raise
                    logger.error("what an earlier task had left in the event loop ended with %r", exc)
        except BaseException as exc:
            self._main = None
            for task in self._all_tasks(loop) - before:
                task.cancel()
            loop.call_soon(loop.stop)  # one turn, in which they hear of it
            loop.run_forever()
            if main.done() and not main.cancelled():
                main.exception()  # it has been heard, also where it came out of the loop itself
            if main.cancelled():  # by itself: as it stands, it would cancel whoever awaits the outcome
                raise RuntimeError("the coroutine was cancelled from within") from exc
            raise
        finally:
            self._main = self._coroutine = None

    def interrupt(self, frame: FrameType | None, error: Callable[[], BaseException]) -> bool:
        main = self._main
        if main is None:
            return False
        loop = self.runner.get_loop()
        current = self._current_task(loop)
        if current is main and _is_below(frame, self._coroutine):
            return False
        # It waits, or another task runs: cancelling it also ends what it waits for, and _steps() says why.
        loop.call_soon_threadsafe(self._cancel, main, error)
        return current is None or current is main or not _is_below(frame, current.get_coro())

    def _cancel(self, main: asyncio.Task[Any], error: Callable[[], BaseException]) -> None:
        if main is self._main:  # else it has ended meanwhile
            self._due = error
            main.cancel()

    async def _driven(self, inner: CoroutineType[Any, Any, Any]) -> Any:
        return await self._steps(inner)

    @coroutine
    def _steps(self, inner: CoroutineType[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """``yield from inner``, but that our own cancelling arrives as the exception that it stands for."""
        step, value = inner.send, None
        while True:
            try:
                waited = step(value)
            except StopIteration as end:
                return end.value
            try:
                step, value = inner.send, (yield waited)
            except BaseException as exc:
                step, value = inner.throw, exc
            if self._due is not None and self._main is not None:
                self._main.uncancel()
                error, self._due = self._due(), None
                if type(value) is not type(error):  # else what it waited for was interrupted itself
                    step, value = inner.throw, error


def _ended_with(task: asyncio.Task[Any], exc: BaseException) -> bool:
    return task.done() and not task.cancelled() and task.exception() is exc


def _is_below(frame: FrameType | None, coroutine: Any) -> bool:
    """Whether a frame is that of a coroutine, or was called from it: what is raised there reaches it."""
    top = getattr(coroutine, "cr_frame", None)
    while frame is not None:
        if frame is top:
            return True
        frame = frame.f_back
    return False
