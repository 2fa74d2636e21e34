"""A worker that has done its share is followed by one that is ready; a slot never belongs to two living processes."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, current_slot

METHODS = ["fork", "forkserver", "spawn", "auto"]


def spares_of(pool: ProcessPool) -> list[int]:
    return support.children_of(pool.stats()["dispatcher"], "mpworker: spare")


def tell() -> tuple[int, int | None, str | None, str]:
    title = support.look(os.getpid())
    return os.getpid(), current_slot(), os.environ.get("MPWORKER_SLOT"), title.title if title else ""


@pytest.mark.parametrize("method", METHODS)
def test_the_successor_is_there_before_the_old_one_leaves(method: str) -> None:
    with ProcessPool(1, start_method=method, max_tasks_per_worker=2) as pool:
        told = [pool.submit(tell).result(PATIENCE)]
        for _ in range(2):
            (spare,) = wait_until(lambda: spares_of(pool), what="there is a spare")
            # It is no worker yet, and counts as none.
            assert [worker["pid"] for worker in pool.stats()["workers"]] == [told[-1][0]]
            told += [pool.submit(tell).result(PATIENCE) for _ in range(2)]
            assert told[-1][0] == spare
    pids = [pid for pid, *_ in told]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [2, 2, 1]
    assert {told_by[1:] for told_by in told} == {(0, "0", "mpworker: worker 0")}


def take(folder: Path) -> None:
    """Fails if another living process has this slot. What it opens is closed when the process has gone."""
    global held
    held = os.open(folder / os.environ["MPWORKER_SLOT"], os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    support.append(folder / "log", f"{os.getpid()} {current_slot()}")


def linger(*_: object) -> None:
    time.sleep(0.002)


held = -1


@pytest.mark.parametrize("method", METHODS)
def test_no_slot_has_two_processes_at_a_time(method: str, tmp_path: Path) -> None:
    with ProcessPool(2, start_method=method, max_tasks_per_worker=2, initializer=take, initargs=(tmp_path,)) as pool:
        assert list(pool.map(linger, range(12))) == [None] * 12
        assert pool.stats()["failed"] == 0
    log = [line.split() for line in support.lines(tmp_path / "log")]
    assert len(log) >= 6
    assert len({pid for pid, _ in log}) == len(log)
    assert {slot for _, slot in log} == {"0", "1"}


def test_with_variables_for_slots_nobody_is_started_before_the_other_has_gone() -> None:
    with ProcessPool(1, max_tasks_per_worker=1, slot_env=lambda slot: {"PORT": 8000 + slot}) as pool:
        pids = set()
        for _ in range(3):
            pids.add(pool.submit(support.getpid).result(PATIENCE))
            assert not spares_of(pool)
        assert len(pids) == 3


def test_a_spare_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    with ProcessPool(1, max_tasks_per_worker=1) as pool:
        pool.submit(support.give).result(PATIENCE)
        for number in range(3):
            (spare,) = wait_until(lambda: spares_of(pool), what="there is a spare")
            os.kill(spare, signal.SIGKILL)
            assert pool.submit(support.give, number).result(PATIENCE) == number


def test_a_spare_takes_the_place_of_one_that_has_died(tmp_path: Path) -> None:
    here = Signpost(tmp_path / "here")
    with ProcessPool(1, max_tasks_per_worker=1) as pool:
        lost = pool.submit(support.meet, here, Signpost(tmp_path / "go"))
        pid = int(here.wait())
        (spare,) = wait_until(lambda: spares_of(pool), what="there is a spare")
        os.kill(pid, signal.SIGKILL)
        assert lost.exception(PATIENCE) is not None
        assert pool.submit(support.getpid).result(PATIENCE) == spare


def test_a_spare_ends_with_its_dispatcher() -> None:
    with ProcessPool(1, max_tasks_per_worker=1) as pool:
        pool.submit(support.give).result(PATIENCE)
        (spare,) = wait_until(lambda: spares_of(pool), what="there is a spare")
        os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        wait_until(partial(is_gone, spare), what="the spare ends")


def is_gone(pid: int) -> bool:
    return not support.alive(pid)


def swell(size: int) -> int:
    assert len(b"x" * size) == size
    return os.getpid()


def test_a_worker_that_nears_its_memory_limit_has_a_successor_too() -> None:
    with ProcessPool(1, max_memory_per_worker=100 << 20) as pool:
        first = pool.submit(swell, 1 << 20).result(PATIENCE)
        size = 30 << 20
        while not spares_of(pool):
            assert pool.submit(swell, size).result(PATIENCE) == first
            size += 2 << 20
        (spare,) = spares_of(pool)
        while (pid := pool.schedule(swell, (size,), memory_limit=1 << 40).result(PATIENCE)) == first:
            size += 5 << 20
        assert pid == spare
