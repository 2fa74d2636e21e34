"""A task tells how far it is; telling never holds it up, however much it tells and whoever does not listen."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

import mpworker
from mpworker import ProcessPool, SoftTimeLimitExceeded
from mpworker.pool import worker
from mpworker.pool.futures import TaskFuture

#: Words, of 200 bytes and more, that no line takes.
FLOOD = 5000


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as pool:
        yield pool


def tell_then_wait(here: Signpost, go: Signpost) -> None:
    mpworker.progress(1, 4, "m\udcffeasuring" + "." * 1000)
    support.meet(here, go)
    for number in range(2, 5):  # sooner than anything is sent again
        mpworker.progress(number, 4)


def test_progress_is_seen_while_it_runs_and_the_last_word_at_its_end(pool: ProcessPool, tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    future = pool.submit(tell_then_wait, here, go)
    assert future.progress is None
    here.wait()
    progress = wait_until(lambda: future.progress, what="its progress")
    assert progress == (1.0, 4.0, "m?easuring" + "." * 190)
    assert (progress.done, progress.total) == (1.0, 4.0)
    assert pool.stats()["progress"] == {future.job: progress}
    go.set()
    future.result(PATIENCE)
    assert future.progress == (4.0, 4.0, "")
    assert pool.stats()["progress"] == {}
    silent = pool.submit(support.give)
    silent.result(PATIENCE)
    assert silent.progress is None


def test_outside_a_task_it_does_nothing(pool: ProcessPool) -> None:
    mpworker.progress(1, 2)
    assert ProcessPool(1).stats()["progress"] == {}
    error = pool.submit(mpworker.progress, "one", 2).exception(PATIENCE)  # type: ignore[arg-type]
    assert isinstance(error, ValueError)
    assert isinstance(pool.submit(mpworker.progress, 10**400, 1).exception(PATIENCE), ValueError)


def tell_from_a_thread() -> None:
    thread = threading.Thread(target=mpworker.progress, args=(1, 3, "thread"))
    thread.start()
    thread.join()


async def tell_from_a_coroutine() -> None:
    await asyncio.to_thread(mpworker.progress, 2, 3, "coroutine")


def test_any_thread_may_tell(pool: ProcessPool) -> None:
    for task, told in ((tell_from_a_thread, (1, 3, "thread")), (tell_from_a_coroutine, (2, 3, "coroutine"))):
        future: TaskFuture[object] = pool.submit(task)
        future.result(PATIENCE)
        assert future.progress == told


def tell_for_ever(seconds: float) -> int:
    end, calls = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        mpworker.progress(calls, 0, "x" * 500)
        calls += 1
    return calls


def test_a_tight_loop_is_not_held_up_and_hears_its_soft_limit(pool: ProcessPool) -> None:
    seen: list[object] = []
    on_event = pool._core._on_event  # type: ignore[union-attr]
    pool._core._on_event = lambda frame: (seen.append(frame.kind.name), on_event(frame))[1]  # type: ignore
    assert pool.submit(tell_for_ever, 0.5).result(PATIENCE) > 1000
    assert seen.count("PROGRESS") <= 7
    assert isinstance(
        pool.schedule(tell_for_ever, (20.0,), soft_timeout=0.15).exception(PATIENCE), SoftTimeLimitExceeded
    )
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_dispatcher_that_does_not_listen_holds_up_nobody(pool: ProcessPool, tmp_path: Path) -> None:
    """Far more than its line takes, with the rate limit taken away; afterwards the line is as good as before."""
    here, go, told = (Signpost(tmp_path / name) for name in ("here", "go", "told"))
    dispatcher = pool.stats()["dispatcher"]
    future = pool.submit(flood, here, go, told)
    here.wait()
    os.kill(dispatcher, signal.SIGSTOP)
    try:
        go.set()
        told.wait()
    finally:
        os.kill(dispatcher, signal.SIGCONT)
    assert future.result(PATIENCE) == FLOOD
    assert future.progress is not None
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def flood(here: Signpost, go: Signpost, told: Signpost) -> int:
    support.meet(here, go)
    worker._PROGRESS_PAUSE, pause = 0.0, worker._PROGRESS_PAUSE
    for done in range(FLOOD):
        mpworker.progress(done, FLOOD, "x" * 200)
    worker._PROGRESS_PAUSE = pause
    told.set()
    return FLOOD
