"""``cancel()`` ends its task wherever that is, and never harms another one."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, TaskCancelled

METHODS = ["fork", "forkserver", "spawn", "auto"]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def count_calls(path: Path) -> None:
    support.append(path, "ran")


@pytest.mark.parametrize("method", METHODS)
def test_a_queued_task_never_runs_and_a_running_one_ends(method: str, tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, start_method=method) as pool:
        running = pool.submit(support.meet, here, go)
        queued = pool.submit(count_calls, tmp_path / "queued")
        next_one = pool.submit(support.give, "next")
        pid = int(here.wait())
        assert queued.cancel()
        assert queued.cancelled()
        with pytest.raises(CancelledError):
            queued.result(0)
        assert running.cancel()
        assert running.cancelled()
        wait_until(lambda: not support.alive(pid), 2.0, "the process of the cancelled task ends")
        assert next_one.result(PATIENCE) == "next"
        wait_until(lambda: pool.stats()["cancelled"] == 2, what="both are counted")
    assert not (tmp_path / "queued").exists()


def test_a_finished_task_cannot_be_cancelled(pool: ProcessPool) -> None:
    for future in (pool.submit(support.give, 1), pool.submit(support.fail)):
        wait([future], PATIENCE)
        assert not future.cancel()
        assert not future.cancelled()
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_cancelling_twice_is_the_same_as_once(pool: ProcessPool, tmp_path: Path) -> None:
    here = Signpost(tmp_path / "here")
    future = pool.submit(support.meet, here, Signpost(tmp_path / "never"))
    here.wait()
    assert future.cancel()
    assert future.cancel()
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_those_who_wait_are_told(pool: ProcessPool, tmp_path: Path) -> None:
    here, told = Signpost(tmp_path / "here"), []
    future = pool.submit(support.meet, here, Signpost(tmp_path / "never"))
    future.add_done_callback(told.append)
    here.wait()
    future.cancel()
    assert wait([future], PATIENCE).done == {future}
    assert told == [future]


def deaf(here: Signpost, go: Signpost) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    support.meet(here, go)


def stopped(here: Signpost, go: Signpost) -> None:
    here.set(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("task", [deaf, stopped], ids=lambda task: task.__name__)
def test_a_task_that_does_not_want_to_end_ends(pool: ProcessPool, tmp_path: Path, task: object) -> None:
    here = Signpost(tmp_path / "here")
    future = pool.submit(task, here, Signpost(tmp_path / "never"))  # type: ignore[arg-type]
    pid = int(here.wait())
    assert future.cancel()
    wait_until(lambda: not support.alive(pid), 1 + support.SLACK, "it is killed")
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_cancelled_task_has_its_error_callback(tmp_path: Path) -> None:
    here, log = Signpost(tmp_path / "here"), tmp_path / "log"
    with ProcessPool(1) as pool:
        hooks = {"callback": partial(support.note, log, "ok"), "error_callback": partial(support.note, log, "error")}
        running = pool.schedule(support.meet, (here, Signpost(tmp_path / "never")), **hooks)
        queued = pool.schedule(support.give, **hooks)
        here.wait()
        queued.cancel()
        running.cancel()
    assert [line.split()[1:3] for line in support.lines(log)] == [["error", TaskCancelled.__name__]] * 2


def test_cancels_hit_only_their_own(tmp_path: Path) -> None:
    """200 cancels, at any moment of 200 short tasks' lives, beside 200 tasks that nobody cancels."""
    ran, log = tmp_path / "ran", tmp_path / "log"
    luck = random.Random(2)
    with ProcessPool(2) as pool:
        victims, others = [], []
        for number in range(200):
            hooks = {
                "callback": partial(support.note, log, number),
                "error_callback": partial(support.note, log, number),
            }
            victims.append(pool.schedule(support.append, (ran, number), **hooks))
            others.append(pool.submit(support.give, number))
        order = list(victims)
        luck.shuffle(order)
        agreed = {future for future in order if future.cancel()}
        assert [future.result(PATIENCE) for future in others] == list(range(200))
        for future in victims:
            assert future.cancelled() == (future in agreed)
            assert future in agreed or future.result(PATIENCE) is None
        stats = wait_until(lambda: pool.stats() if not pool.stats()["pending"] else None, what="all have ended")
        assert stats["submitted"] == 400
        assert stats["done"] + stats["cancelled"] == 400
    called = [line.split()[1] for line in support.lines(log)]
    assert sorted(called, key=int) == [str(number) for number in range(200)]
    times = support.lines(ran)
    assert len(times) == len(set(times))
    assert {str(number) for number, future in enumerate(victims) if future not in agreed} <= set(times)


def test_cancels_of_running_tasks_never_reach_the_next_one() -> None:
    """The cancel comes when the task is just ending, so the signal is late as often as not."""
    luck = random.Random(3)
    with ProcessPool(2) as pool:
        for number in range(40):
            victim, follower = pool.submit(support.sleep, 0.005), pool.submit(support.give, number)
            wait_until(lambda victim=victim: victim.running() or victim.done(), what="it runs")
            if luck.random() < 0.7:
                victim.cancel()
            assert follower.result(PATIENCE) == number
            assert victim.cancelled() or victim.result(PATIENCE) == 0.005
        assert pool.stats()["lost"] == 0
