"""The service: a process beside the workers that is there for as long as the pool is."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
from support import wait_until

from mpworker.pool import handle as handles
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.handle import Handle, PoolOptions
from mpworker.pool.jobs import Lane
from mpworker.pool.parcel import pack_call


def stay(log: Path, until: int) -> None:
    support.append(log, os.getpid())
    select.select([until], [], [])


def leave(log: Path, until: int) -> None:
    support.append(log, os.getpid())


class Pool:
    """A handle that is driven by whoever waits."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.frames: list[Frame] = []

    def until(self, predicate: Callable[[], Any], what: str) -> Any:
        def probe() -> Any:
            self.handle.wait(0.01)
            self.frames += self.handle.drain()
            return predicate()

        return wait_until(probe, what=what)

    def pids(self, lane: Lane = Lane.SERVICE) -> list[int]:
        return [worker["pid"] for worker in self.handle.workers if worker["lane"] == lane]

    def said(self) -> str:
        return "\n".join(frame.body.decode() for frame in self.frames if frame.kind is Kind.LOG)

    def run(self) -> None:
        job = self.handle.next_id()
        self.handle.submit(job, pack_call(support.give, (), {}))
        self.until(lambda: any(f.kind is Kind.DONE and f.job == job for f in self.frames), "a job is done")


@contextmanager
def pool_of(method: str, log: Path, function: Callable[..., None] = stay) -> Iterator[Pool]:
    handle = handles.make(
        PoolOptions(1, start_method=method, service=True, label=" (here)"), service=("clerk", function, (log,))
    )
    handle.start()
    pool = Pool(handle)
    try:
        yield pool
    finally:
        handle.kill()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "auto"])
def test_it_is_there_and_says_what_it_is(method: str, tmp_path: Path) -> None:
    with pool_of(method, tmp_path / "log") as pool:
        pool.run()
        (pid,) = pool.until(pool.pids, "the service is listed")
        wait_until(lambda: support.lines(tmp_path / "log") == [str(pid)], what="it is called")
        assert support.look(pid).title == "mpworker: clerk (here)"  # type: ignore[union-attr]
        assert support.look(pid).parent == pool.handle.pid  # type: ignore[union-attr]
        assert pool.pids(Lane.TASKS)
        assert pool.handle.ready_workers == 1
    wait_until(lambda: not support.alive(pid), what="it ends with the pool")


@pytest.mark.parametrize("method", ["fork", "spawn", "auto"])
def test_one_that_is_killed_is_replaced_and_no_task_minds(method: str, tmp_path: Path) -> None:
    with pool_of(method, tmp_path / "log") as pool:
        (pid,) = pool.until(pool.pids, "the service is listed")
        workers = pool.until(lambda: pool.pids(Lane.TASKS), "the worker is listed")
        support.kill_ours(pid)
        (other,) = pool.until(lambda: [new for new in pool.pids() if new != pid], "another one is listed")
        wait_until(lambda: str(other) in support.lines(tmp_path / "log"), what="it is called")
        pool.run()
        assert pool.pids(Lane.TASKS) == workers
        assert "the service process has ended; it is started again in 0.4 s" in pool.said()


def test_one_that_ends_at_once_is_not_started_in_a_hurry(tmp_path: Path) -> None:
    with pool_of("fork", tmp_path / "log", leave) as pool:
        pool.until(lambda: "again in 1.6 s" in pool.said(), "the pauses grow")
        assert [f"again in {pause} s" in pool.said() for pause in (0.4, 0.8, 1.6)] == [True] * 3
        pool.run()


def test_it_is_renewed_with_the_application_at_a_restart(tmp_path: Path) -> None:
    with pool_of("auto", tmp_path / "log") as pool:
        (pid,) = pool.until(pool.pids, "the service is listed")
        pool.handle.restart(service=("scribe", stay, (tmp_path / "log",)))
        (other,) = pool.until(lambda: [new for new in pool.pids() if new != pid], "another one is listed")
        wait_until(lambda: getattr(support.look(other), "title", "") == "mpworker: scribe (here)", what="the new one")
        assert "has ended" not in pool.said()


def test_it_ends_with_a_dispatcher_that_was_killed_and_the_next_has_its_own(tmp_path: Path) -> None:
    with pool_of("auto", tmp_path / "log") as pool:
        (pid,) = pool.until(pool.pids, "the service is listed")
        support.kill_ours(pool.handle.pid or 0)
        wait_until(lambda: not support.alive(pid), what="it ends with its dispatcher")
        pool.until(lambda: [new for new in pool.pids() if new != pid], "another one is listed")
        pool.run()


def test_a_pool_that_drains_does_not_wait_for_it(tmp_path: Path) -> None:
    with pool_of("auto", tmp_path / "log") as pool:
        (pid,) = pool.until(pool.pids, "the service is listed")
        pool.handle.close()
        pool.until(lambda: pool.handle.finished, "all is over")
        wait_until(partial(lambda pid: not support.alive(pid), pid), what="so is the service")
