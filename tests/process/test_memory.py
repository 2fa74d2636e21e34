"""A task that uses more memory than it may is asked first, then ended; the error says how much; nobody else pays."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, SLACK, Signpost, wait_until

from mpworker import MemoryLimitExceeded, ProcessPool, WorkerLost
from mpworker.errors import ConfigurationError
from mpworker.pool import executor
from mpworker.pool.memory import resident
from mpworker.pool.quota import GRACE
from mpworker.pool.worker import task_worker

METHODS = ["fork", "forkserver", "spawn", "auto"]
MB = 1 << 20
#: A pool's limit, above what a worker has from the start, and what is more than the difference.
LIMIT, TOO_MUCH = 80 * MB, 80 * MB
#: What a task may use besides what a worker has from the start, and more than that, but not far more.
ROOM, A_BIT_MORE = 20 * MB, 30 * MB
kept: list[bytes] = []


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1) as pool:
        yield pool


def hold(size: int, seconds: float = 20.0) -> int:
    block = b"x" * size
    time.sleep(seconds)
    return len(block)


def hold_on(size: int) -> None:
    """Holds it, and does not mind being asked."""
    block, end = b"", time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(BaseException):
            block = block or b"x" * size
            time.sleep(20)


def hold_the_gil(size: int) -> None:
    usleep = ctypes.PyDLL(None).usleep  # first: between the next two lines Python hears no signal
    block = b"x" * size
    usleep(20_000_000)
    del block


def hold_in_a_child(size: int) -> None:
    text = f"import time; block = b'x' * {size}; time.sleep(20)"
    subprocess.run([sys.executable, "-c", text], check=True)


def tamper(how: str) -> None:
    if how == "block":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    else:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL if how == "default" else signal.SIG_IGN)


def let_go(size: int) -> str:
    """Frees what it has when it is asked, and goes on."""
    block = b"x" * size
    try:
        time.sleep(20)
    except MemoryError as exc:
        del block
        time.sleep(GRACE + 0.3)
        return str(exc)
    return "was not asked"


def limit_in(pool: ProcessPool) -> int:
    """What a task may use, given what the worker had when it was new. Importing this module is not the task's doing."""
    return pool.submit(size_when_new).result(PATIENCE) + ROOM


def size_when_new() -> int:
    worker = task_worker()
    assert worker is not None
    return worker._fresh


def keep(size: int) -> int:
    kept.append(b"x" * size)
    return os.getpid()


def leave_a_child(size: int, folder: Path) -> int:
    text = f"import time; block = b'x' * {size}; open({str(folder / 'child')!r}, 'w').close(); time.sleep(20)"
    subprocess.Popen([sys.executable, "-c", text])
    Signpost(folder / "child").wait()
    return os.getpid()


def rest(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def check(error: BaseException | None, limit: int) -> None:
    assert isinstance(error, MemoryLimitExceeded)
    assert isinstance(error, MemoryError)
    assert error.limit == limit
    assert error.used is not None
    assert limit < error.used < limit + 4 * TOO_MUCH
    assert f"used {error.used / MB:.0f} MiB, limit {limit / MB:.0f} MiB" in str(error)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_asked_inside_the_task_and_the_worker_lives_on(method: str) -> None:
    with ProcessPool(1, start_method=method) as pool:
        limit, pid = limit_in(pool), pool.submit(os.getpid).result(PATIENCE)
        error = pool.schedule(hold, (A_BIT_MORE,), memory_limit=limit).exception(PATIENCE)
        check(error, limit)
        assert "in hold" in str(error.__cause__)  # type: ignore[union-attr]
        assert pool.submit(os.getpid).result(PATIENCE) == pid
        assert pool.stats()["failed"] == 1


@pytest.mark.parametrize("task", [hold_on, hold_the_gil], ids=lambda task: task.__name__)
def test_who_does_not_listen_is_killed(pool: ProcessPool, task: object, tmp_path: Path) -> None:
    limit, pid, begun = limit_in(pool), pool.submit(os.getpid).result(PATIENCE), time.monotonic()
    log = tmp_path / "log"
    hooks = {"callback": partial(support.note, log, "ok"), "error_callback": partial(support.note, log, "error")}
    future = pool.schedule(task, (A_BIT_MORE,), memory_limit=limit, **hooks)  # type: ignore[arg-type]
    check(future.exception(PATIENCE), limit)
    assert GRACE < time.monotonic() - begun < GRACE + 1 + SLACK
    assert not support.alive(pid)
    assert pool.submit(support.give, 1).result(PATIENCE) == 1
    wait_until(lambda: support.lines(log), what="the callback runs")
    assert [line.split()[1:3] for line in support.lines(log)] == [["error", "MemoryLimitExceeded"]]


@pytest.mark.parametrize("how", ["default", "ignore", "block"])
def test_an_earlier_task_cannot_disarm_it(pool: ProcessPool, how: str) -> None:
    limit = limit_in(pool)
    tampered = pool.schedule(tamper, (how,), memory_limit=limit)
    check(pool.schedule(hold, (A_BIT_MORE,), memory_limit=limit).exception(PATIENCE), limit)
    assert tampered.result(PATIENCE) is None


def test_far_above_the_limit_there_is_no_time(pool: ProcessPool) -> None:
    limit_in(pool)  # so that it is asked in the task, and not while it imports this module
    begun = time.monotonic()
    check(pool.schedule(hold_on, (ROOM,), memory_limit=5 * MB).exception(PATIENCE), 5 * MB)
    assert time.monotonic() - begun < GRACE / 2 + SLACK


def test_what_the_task_has_started_counts_too_and_ends_with_it(pool: ProcessPool) -> None:
    limit = limit_in(pool)
    check(pool.schedule(hold_in_a_child, (TOO_MUCH,), memory_limit=limit).exception(PATIENCE), limit)
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_task_that_frees_its_memory_may_go_on(pool: ProcessPool) -> None:
    limit = limit_in(pool)
    told = pool.schedule(let_go, (A_BIT_MORE,), memory_limit=limit).result(PATIENCE)
    assert f"limit {limit / MB:.0f} MiB" in told


async def sleep_in_a_loop(size: int) -> int:
    block = b"x" * size
    await asyncio.sleep(20)
    return len(block)


def test_a_coroutine_hears_it_where_it_is(pool: ProcessPool) -> None:
    limit = limit_in(pool)
    with pytest.raises(MemoryLimitExceeded) as caught:
        asyncio.run(pool.run(sleep_in_a_loop, A_BIT_MORE, memory_limit=limit))
    check(caught.value, limit)
    assert "in sleep_in_a_loop" in str(caught.value.__cause__)


def test_what_earlier_tasks_left_is_not_the_next_ones_fault(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        limit = limit_in(pool)
        pids = {
            pool.submit(keep, TOO_MUCH).result(PATIENCE),
            pool.submit(leave_a_child, TOO_MUCH, tmp_path).result(PATIENCE),
            pool.schedule(rest, (0.7,), memory_limit=limit).result(PATIENCE),
        }
        assert len(pids) == 1
        check(pool.schedule(hold, (TOO_MUCH,), memory_limit=limit).exception(PATIENCE), limit)


@pytest.mark.parametrize("method", METHODS)
def test_a_pools_limit_holds_for_every_task(method: str) -> None:
    limit = LIMIT + (resident() if method == "fork" else 0)  # whatever this process has imported by now
    with ProcessPool(1, start_method=method, max_memory_per_worker=limit) as pool:
        pid = pool.submit(os.getpid).result(PATIENCE)
        check(pool.submit(hold, 3 * TOO_MUCH).exception(PATIENCE), limit)
        assert pool.submit(os.getpid).result(PATIENCE) != pid


def test_a_worker_that_leaks_is_replaced_and_no_task_fails_for_it() -> None:
    with ProcessPool(1, max_memory_per_worker=LIMIT) as pool:
        pids = [pool.submit(keep, 15 * MB).result(PATIENCE) for _ in range(5)]
        pids.append(pool.submit(rest, 0.3).result(PATIENCE))
        assert pids[0] == pids[1] != pids[-1]
        assert pool.schedule(hold, (TOO_MUCH, 0.3), memory_limit=1 << 40).result(PATIENCE) == TOO_MUCH


def test_a_limit_survives_the_dispatcher(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        limit = limit_in(pool)
        started = pool.submit(support.meet, here, go)
        waiting = pool.schedule(hold, (A_BIT_MORE,), memory_limit=limit)
        here.wait()
        wait_until(started.running, what="the parent knows that it started")
        os.kill(pool.stats()["dispatcher"], signal.SIGKILL)
        error = started.exception(PATIENCE)
        assert isinstance(error, WorkerLost)
        assert error.runtime is not None
        check(waiting.exception(PATIENCE), limit)


def test_each_of_several_has_its_own_limit() -> None:
    with ProcessPool(3, max_memory_per_worker=LIMIT) as pool:
        others = [pool.submit(rest, 0.2) for _ in range(6)]
        hogs = [pool.submit(hold, TOO_MUCH) for _ in range(2)]
        for hog in hogs:
            check(hog.exception(PATIENCE), LIMIT)
        assert all(future.result(PATIENCE) for future in others)


def test_a_death_is_told_with_memory_and_run_time(pool: ProcessPool, tmp_path: Path) -> None:
    here = Signpost(tmp_path / "here")
    future = pool.schedule(announce_and_rest, (here,), memory_limit=1 << 40)
    os.kill(pid := int(here.wait()), signal.SIGKILL)
    error = future.exception(PATIENCE)
    assert isinstance(error, WorkerLost)
    assert error.pid == pid
    assert error.rss is not None
    assert error.max_rss is not None
    assert MB < error.rss <= error.max_rss + MB
    assert error.runtime is not None
    assert 0.3 <= error.runtime < 0.3 + SLACK
    assert not error.oom_killed
    assert str(error).endswith("out of memory?")


def announce_and_rest(here: Signpost) -> None:
    time.sleep(0.3)  # so that it has been looked at
    here.set(os.getpid())
    support.sleep()


def test_a_death_without_a_limit_is_told_with_its_run_time(pool: ProcessPool) -> None:
    error = pool.submit(support.die, "exit").exception(PATIENCE)
    assert isinstance(error, WorkerLost)
    assert (error.rss, error.oom_killed) == (None, False)
    assert error.runtime is not None


@pytest.mark.parametrize("value", [0, -1, 1.5, "1GB", True, 1 << 70])
def test_a_limit_that_is_none_is_one_clear_line(pool: ProcessPool, value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^memory_limit must be a whole number of bytes") as caught:
        pool.schedule(support.give, memory_limit=value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"^max_memory_per_worker must be a whole number of bytes"):
        ProcessPool(1, max_memory_per_worker=value)  # type: ignore[arg-type]


def test_where_the_kernel_does_not_tell_a_limit_is_refused(pool: ProcessPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "can_tell", lambda: False)
    with pytest.raises(ConfigurationError, match="memory_limit needs /proc"):
        pool.schedule(support.give, memory_limit=LIMIT)
    assert ProcessPool(1, max_memory_per_worker=LIMIT)._options.memory_limit == 0
