"""A process that dies costs the one task it was running; the error tells which process, how, and how big it was."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, WorkerLost
from mpworker.errors import BootError
from mpworker.pool import fleet, handle
from mpworker.pool.jobs import Lane

METHODS = ["fork", "forkserver", "spawn", "auto"]
SIZE = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(SIZE) as pool:
        pool.submit(support.give).result(PATIENCE)
        yield pool


def full(pool: ProcessPool) -> list[int]:
    """The workers' pids, once there are as many as asked for, all alive."""

    def ready() -> list[int] | None:
        pids = [worker["pid"] for worker in pool.stats()["workers"] if worker["lane"] == 0]
        return pids if len(pids) == SIZE and all(map(support.alive, pids)) else None

    return wait_until(ready, what=f"the pool has {SIZE} living workers again: {pool.stats()}")


@pytest.mark.parametrize(
    ("how", "exitcode", "signum"),
    [("exit", 9, None), ("kill", None, signal.SIGKILL), ("segv", None, signal.SIGSEGV), ("term", None, signal.SIGTERM)],
)
def test_a_death_costs_one_task(pool: ProcessPool, how: str, exitcode: int | None, signum: int | None) -> None:
    before = [pool.submit(support.give, number) for number in range(20)]
    future = pool.submit(support.die, how)
    after = [pool.submit(support.give, number) for number in range(20)]
    error = future.exception(PATIENCE)
    assert isinstance(error, WorkerLost)
    assert (error.exitcode, error.signal, error.by_pool) == (exitcode, signum, False)
    assert error.pid is not None
    assert not support.alive(error.pid)
    assert error.max_rss is not None
    assert 1 << 20 < error.max_rss < 1 << 34
    assert ("out of memory?" in str(error)) == (signum == signal.SIGKILL)
    assert [task.result(PATIENCE) for task in before + after] == [*range(20), *range(20)]
    assert error.pid not in full(pool)


def test_a_worker_killed_from_outside_is_named(pool: ProcessPool, tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    future = pool.submit(support.meet, here, go)
    pid = int(here.wait())
    os.kill(pid, signal.SIGKILL)
    error = future.exception(PATIENCE)
    assert isinstance(error, WorkerLost)
    assert (error.pid, error.signal, error.by_pool) == (pid, signal.SIGKILL, False)
    assert str(pid) in str(error)


def test_the_replacement_is_there_at_once(pool: ProcessPool) -> None:
    full(pool)
    begun = time.monotonic()
    pool.submit(support.die, "exit").exception(PATIENCE)
    full(pool)
    assert time.monotonic() - begun < 0.2 + support.SLACK


def test_idle_workers_that_die_cost_nothing(pool: ProcessPool) -> None:
    for _ in range(3):
        for pid in full(pool):
            os.kill(pid, signal.SIGKILL)
        assert [pool.submit(support.give, number).result(PATIENCE) for number in range(10)] == list(range(10))


def test_many_deaths_in_a_row_are_no_boot_failure(pool: ProcessPool) -> None:
    deadly = [pool.submit(support.die, "exit") for _ in range(20)]
    harmless = [pool.submit(support.give, number) for number in range(20)]
    assert all(isinstance(task.exception(PATIENCE), WorkerLost) for task in deadly)
    assert [task.result(PATIENCE) for task in harmless] == list(range(20))


@pytest.mark.parametrize("method", METHODS)
def test_each_start_method_attributes_a_death_and_goes_on(method: str) -> None:
    with ProcessPool(SIZE, start_method=method) as pool:
        futures = [pool.submit(support.give, number) for number in range(10)]
        error = pool.submit(support.die, "exit").exception(PATIENCE)
        assert isinstance(error, WorkerLost)
        assert (error.exitcode, error.signal) == (9, None)
        assert [task.result(PATIENCE) for task in futures] == list(range(10))
        assert len(full(pool)) == SIZE


@pytest.mark.parametrize("method", METHODS)
def test_killing_the_dispatcher_loses_only_what_had_started(method: str, tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, start_method=method) as pool:
        started = pool.submit(support.meet, here, go)
        waiting = [pool.submit(support.give, number) for number in range(50)]
        worker, dispatcher = int(here.wait()), pool.stats()["dispatcher"]
        wait_until(started.running, what="the parent knows that it started")
        os.kill(dispatcher, signal.SIGKILL)
        error = started.exception(PATIENCE)
        assert isinstance(error, WorkerLost)
        assert error.pid == worker
        assert [task.result(PATIENCE) for task in waiting] == list(range(50))
        assert pool.stats()["dispatcher"] != dispatcher
        wait_until(lambda: not support.alive(worker), 2.0, "the old worker ends with its dispatcher")
        assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_job_lost_with_the_dispatcher_still_gets_its_error_callback(tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(1) as pool:
        hooks = {"callback": partial(support.note, log, "ok"), "error_callback": partial(support.note, log, "error")}
        started = pool.schedule(support.meet, (here, go), **hooks)
        here.wait()
        wait_until(started.running, what="the parent knows that it started")
        os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        assert isinstance(started.exception(PATIENCE), WorkerLost)
    assert [line.split()[1:3] for line in support.lines(log)] == [["error", "WorkerLost"]]


def hold_up(here: Signpost, go: Signpost, value: object) -> None:
    support.meet(here, go)


def test_callbacks_that_wait_survive_the_dispatcher(tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(1) as pool:
        first = pool.schedule(support.give, (0,), callback=partial(hold_up, here, go))
        others = [pool.schedule(support.give, (n,), callback=partial(support.note, log, n)) for n in range(5)]
        here.wait()
        assert [task.result(PATIENCE) for task in [first, *others]] == [0, *range(5)]
        os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        go.set()
    assert [line.split()[1] for line in support.lines(log)] == ["0", "1", "2", "3", "4"]


def test_a_dispatcher_killed_again_and_again_is_replaced() -> None:
    with ProcessPool(1) as pool:
        for number in range(5):
            assert pool.submit(support.give, number).result(PATIENCE) == number
            dispatcher = pool.stats()["dispatcher"]
            os.kill(dispatcher, signal.SIGKILL)
            wait_until(lambda old=dispatcher: pool.stats()["dispatcher"] != old, what="there is a new one")


def test_dispatchers_killed_before_they_have_a_worker_are_replaced_too() -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        killed: set[int] = set()
        for _ in range(handle._MAX_RESTARTS + 2):
            wait_until(lambda: pool.stats()["dispatcher"] not in killed, what="there is a new one")
            killed.add(pool.stats()["dispatcher"])
            os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        assert pool.submit(support.give, 2).result(PATIENCE) == 2


@pytest.mark.parametrize("refusals", [2, 99])
def test_a_dispatcher_that_cannot_be_started_is_tried_again_for_a_while(
    refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, tries = fleet.launch, iter(range(refusals))

    def refuse() -> object:
        if next(tries, None) is not None:
            raise BlockingIOError(errno.EAGAIN, "no process can be had")
        return launch()

    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        monkeypatch.setattr(handle, "_START_PAUSE", 0.01)
        monkeypatch.setattr(fleet, "launch", refuse)
        os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        if refusals < handle._START_TRIES:
            assert pool.submit(support.give, 2).result(PATIENCE) == 2
        else:
            with pytest.raises(BootError, match="no new one can be started"):
                pool.submit(support.give, 2).result(PATIENCE)


def test_killing_the_dispatcher_while_the_pool_drains(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    pool = ProcessPool(1)
    started = pool.submit(support.meet, here, go)
    waiting = [pool.submit(support.give, number) for number in range(5)]
    here.wait()
    wait_until(started.running, what="the parent knows that it started")
    pool.shutdown(wait=False)
    os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
    assert isinstance(started.exception(PATIENCE), WorkerLost)
    assert [task.result(PATIENCE) for task in waiting] == list(range(5))
    pool.shutdown(wait=True)


@pytest.mark.parametrize("method", ["fork", "forkserver", "auto"])
def test_killing_the_template_costs_nothing(method: str) -> None:
    with ProcessPool(SIZE, start_method=method) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        workers = full(pool)
        (template,) = set(support.children_of(pool.stats()["dispatcher"])) - set(workers)
        os.kill(template, signal.SIGKILL)
        os.kill(workers[0], signal.SIGKILL)
        assert [pool.submit(support.give, number).result(PATIENCE) for number in range(10)] == list(range(10))
        wait_until(lambda: workers[0] not in full(pool), what="it is dead, and replaced")


def test_a_template_that_hangs_is_replaced() -> None:
    with ProcessPool(SIZE) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        workers = full(pool)
        (template,) = set(support.children_of(pool.stats()["dispatcher"])) - set(workers)
        os.kill(template, signal.SIGSTOP)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        assert pool.submit(support.give, 2).result(PATIENCE) == 2
        assert not support.alive(template)


def test_killing_the_callback_process_costs_the_running_callback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(1) as pool:
        pool.schedule(support.give, (0,), callback=partial(hold_up, here, go))
        others = [pool.schedule(support.give, (n,), callback=partial(support.note, log, n)) for n in range(5)]
        pid = int(here.wait())
        assert [task.result(PATIENCE) for task in others] == list(range(5))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(support.lines(log)) == 5, what="the other callbacks run")
    assert {line.split()[0] for line in support.lines(log)} != {str(pid)}
    assert "support.give[1]" in caplog.text
    assert "SIGKILL" in caplog.text


def test_a_worker_is_replaced_after_so_many_tasks() -> None:
    with ProcessPool(1, max_tasks_per_worker=3) as pool:
        pids = [pool.submit(os.getpid).result(PATIENCE) for _ in range(9)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3]
        futures = [pool.submit(os.getpid) for _ in range(30)]
        pids = [future.result(PATIENCE) for future in futures]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3] * 10


def swell(size: int) -> int:
    bytearray(b"x") * size
    return os.getpid()


def test_a_worker_that_grew_too_big_is_replaced() -> None:
    with ProcessPool(1, max_memory_per_worker=200 << 20) as pool:
        small = [pool.submit(swell, 1 << 20).result(PATIENCE) for _ in range(3)]
        big = pool.schedule(swell, (250 << 20,), memory_limit=1 << 40).result(PATIENCE)  # for once it may
        assert set(small) == {big}
        assert pool.submit(os.getpid).result(PATIENCE) != big


@pytest.mark.parametrize("failing", ["line", "process"])
def test_a_worker_that_cannot_be_started_leaves_no_descriptor(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no more of these")

    target = {"line": (fleet.socket, "socketpair"), "process": (fleet.subprocess, "Popen")}
    monkeypatch.setattr(*target[failing], refuse)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="no more of these"):
        fleet.Fleet().spawn(1, 0, Lane.TASKS, b"")
    assert set(os.listdir("/proc/self/fd")) <= before
