"""Limits hold whatever a task does: hard ones end its process group in time, soft ones interrupt it and say so."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import support
from support import PATIENCE, SLACK, Signpost, wait_until

from mpworker import ProcessPool, RemoteTraceback, SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLost

LIMIT = 0.5
MONTH = 30 * 86400.0
#: Importing this module takes its time too; a short limit should find the task itself.
READY = {"initializer": import_module, "initargs": (__name__,)}


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2, **READY) as pool:  # type: ignore[arg-type]
        yield pool


def deaf_sleep() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    support.sleep()


def hold_the_gil() -> None:
    """Sleeps in C without letting any other thread run."""
    ctypes.PyDLL(None).usleep(20_000_000)


def backtrack() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def start_session(log: Path, deaf: bool) -> None:
    """Has a child in a session of its own, which has a deaf child in another one."""
    code = "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    code += "command = [sys.executable, '-c', 'import time; time.sleep(60)'];"
    code += "child = subprocess.Popen(command, start_new_session=True); print(child.pid, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    support.append(log, f"{child.pid} {child.stdout.readline().strip()}")
    hold_the_gil() if deaf else support.sleep()


@pytest.mark.parametrize("how", ["watchdog", "dispatcher", "cancel"])
def test_sessions_of_their_own_end_with_the_task(pool: ProcessPool, how: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    future = pool.schedule(start_session, (log, how == "dispatcher"), timeout=PATIENCE if how == "cancel" else 2.0)
    wait_until(log.exists, what="they have been started")
    wait_until(lambda: support.lines(log), what="they have been noted")
    strays = [int(pid) for line in support.lines(log) for pid in line.split()]
    assert len(strays) == 2
    if how == "cancel":
        future.cancel()
    else:
        with pytest.raises(TimeLimitExceeded):
            future.result(PATIENCE)
    wait_until(lambda: not any(map(support.alive, strays)), what="nobody is left")
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def start_daemons(log: Path, how: str) -> None:
    """Two processes that have left their parents: a program, and a mere fork of this one; the first has a child."""
    command = "setsid env -i sh -c 'sleep 60 & echo $$ $!; wait' & wait $!"
    with (log.parent / "told").open("w") as told:
        subprocess.Popen(["sh", "-c", f"({command}) & exit"], stdout=told).wait()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork() == 0:
            (log.parent / "fork").write_text(str(os.getpid()))
            time.sleep(60)
        os._exit(0)
    os.waitpid(middle, 0)
    support.wait_until(lambda: (log.parent / "told").read_text().endswith("\n"), what="it has said who it is")
    support.wait_until(lambda: (log.parent / "fork").exists() and (log.parent / "fork").read_text(), what="so has this")
    support.append(log, (log.parent / "told").read_text().strip() + " " + (log.parent / "fork").read_text())
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit":
        os._exit(0)
    if how != "end":
        hold_the_gil() if how == "dispatcher" else support.sleep()


@pytest.mark.parametrize("how", ["watchdog", "dispatcher", "cancel", "crash", "exit"])
def test_daemons_end_with_the_task(pool: ProcessPool, how: str, tmp_path: Path) -> None:
    log, others = tmp_path / "log", tmp_path / "others"
    others.mkdir()
    bystanders = pool.schedule(start_daemons, (others / "log", "cancel"))
    wait_until((others / "log").exists, what="others have been started")
    future = pool.schedule(start_daemons, (log, how), timeout=2.0 if how in ("watchdog", "dispatcher") else PATIENCE)
    wait_until(lambda: log.exists() and support.lines(log), what="they have been started")
    daemons = [int(pid) for line in support.lines(log) for pid in line.split()]
    assert len(daemons) == 3
    if how == "cancel":
        future.cancel()
    else:
        with pytest.raises(WorkerLost if how in ("crash", "exit") else TimeLimitExceeded):
            future.result(PATIENCE)
    wait_until(lambda: not any(map(support.alive, daemons)), what="nobody is left")
    left = [int(pid) for line in support.lines(others / "log") for pid in line.split()]
    assert all(map(support.alive, left))
    bystanders.cancel()
    wait_until(lambda: not any(map(support.alive, left)), what="nor of the others")


def test_daemons_of_a_task_that_has_ended_live_on_until_the_pool_ends(tmp_path: Path) -> None:
    logs = [tmp_path / str(number) / "log" for number in range(5)]
    with ProcessPool(1, **READY) as pool:  # type: ignore[arg-type]
        for log in logs:
            log.parent.mkdir()
            pool.submit(start_daemons, log, "end")
            next_one = pool.schedule(os.abort)  # at once
            with pytest.raises(WorkerLost):
                next_one.result(PATIENCE)
        with pytest.raises(TimeLimitExceeded):
            pool.schedule(support.sleep, timeout=LIMIT).result(PATIENCE)
        daemons = [int(pid) for log in logs for line in support.lines(log) for pid in line.split()]
        assert len(daemons) == 15
        assert all(map(support.alive, daemons))
    wait_until(lambda: not any(map(support.alive, daemons)), what="nobody is left")


def spin() -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass


def swallow() -> None:
    for _ in range(5):
        with contextlib.suppress(BaseException):
            support.sleep()


def block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    support.sleep()


STUBBORN = [support.sleep, spin, deaf_sleep, hold_the_gil, backtrack, stop_itself, block_signals]


@pytest.mark.parametrize("task", STUBBORN, ids=lambda task: task.__name__)
def test_a_hard_limit_ends_any_task_in_time(pool: ProcessPool, task: object) -> None:
    begun = time.monotonic()
    future = pool.schedule(task, timeout=LIMIT)  # type: ignore[arg-type]
    with pytest.raises(TimeLimitExceeded) as caught:
        future.result(PATIENCE)
    assert LIMIT <= time.monotonic() - begun < LIMIT + 1 + SLACK
    assert caught.value.limit == LIMIT
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_the_time_starts_with_the_task_and_not_in_the_queue(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        first = pool.submit(support.meet, here, go)
        second = pool.schedule(support.give, (2,), timeout=0.2)
        here.wait()
        with pytest.raises(TimeoutError):
            second.result(0.5)
        go.set()
        assert first.result(PATIENCE) > 0
        assert second.result(PATIENCE) == 2


def test_the_pools_own_limits_hold_where_a_task_brings_none() -> None:
    with ProcessPool(2, timeout=0.3, soft_timeout=0.1, **READY) as pool:
        assert isinstance(pool.submit(swallow).exception(PATIENCE), TimeLimitExceeded)
        assert isinstance(pool.submit(support.sleep).exception(PATIENCE), SoftTimeLimitExceeded)
        assert pool.schedule(time.sleep, (0.5,), timeout=PATIENCE, soft_timeout=PATIENCE).result(PATIENCE) is None
        assert list(pool.map(time.sleep, [0.08] * 4, chunksize=4)) == [None] * 4


def test_a_soft_limit_interrupts_a_system_call(pool: ProcessPool) -> None:
    begun = time.monotonic()
    error = pool.schedule(support.sleep, soft_timeout=LIMIT).exception(PATIENCE)
    assert isinstance(error, SoftTimeLimitExceeded)
    assert error.limit == LIMIT
    assert LIMIT <= time.monotonic() - begun < LIMIT + 1 + SLACK
    assert "time.sleep(seconds)" in str(error.__cause__)


@pytest.mark.parametrize(
    ("stage", "limit"),
    # Where the result is pickled the task is over, and nobody is there to be told of a soft limit.
    [("unpickle the call", "soft_timeout"), ("unpickle the call", "timeout"), ("pickle the result", "timeout")],
)
def test_limits_also_hold_where_values_travel(pool: ProcessPool, stage: str, limit: str) -> None:
    task, arguments = support.return_unwilling, ("dump", "slow")
    if stage == "unpickle the call":
        task, arguments = support.give, (support.Unwilling("load", "slow"),)
    error = pool.schedule(task, arguments, **{limit: 0.3}).exception(PATIENCE)  # type: ignore[arg-type]
    assert type(error) is (SoftTimeLimitExceeded if limit == "soft_timeout" else TimeLimitExceeded)


def clean_up(path: Path) -> int:
    try:
        support.sleep()
    except SoftTimeLimitExceeded:
        support.append(path, "cleaned up")
    return os.getpid()


def test_a_soft_limit_lets_the_task_clean_up_and_keeps_its_process(pool: ProcessPool, tmp_path: Path) -> None:
    pid = pool.schedule(clean_up, (tmp_path / "log",), soft_timeout=0.2, timeout=PATIENCE).result(PATIENCE)
    assert support.lines(tmp_path / "log") == ["cleaned up"]
    assert pool.submit(support.give, 1).result(PATIENCE) == 1
    assert support.alive(pid)
    assert pid in {worker["pid"] for worker in pool.stats()["workers"]}


def test_a_swallowed_soft_limit_still_ends_at_the_hard_one(pool: ProcessPool) -> None:
    begun = time.monotonic()
    error = pool.schedule(swallow, soft_timeout=0.2, timeout=LIMIT).exception(PATIENCE)
    assert isinstance(error, TimeLimitExceeded)
    assert LIMIT <= time.monotonic() - begun < LIMIT + 1 + SLACK


def test_a_soft_limit_never_reaches_the_next_task(pool: ProcessPool) -> None:
    # The limit falls just where the task ends: either it strikes the task or nobody.
    futures = []
    for _ in range(60):
        futures.append(pool.schedule(time.sleep, (0.01,), soft_timeout=0.01))
        futures.append(pool.submit(support.give, 1))
    for future in futures[0::2]:
        assert isinstance(future.exception(PATIENCE), SoftTimeLimitExceeded | None)
    assert [future.result(PATIENCE) for future in futures[1::2]] == [1] * 60


def tamper(how: str) -> None:
    if how == "default":
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    elif how == "ignore":
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


@pytest.mark.parametrize("how", ["default", "ignore", "block"])
def test_a_task_cannot_disarm_the_soft_limit_of_the_next(how: str) -> None:
    with ProcessPool(1, **READY) as pool:  # type: ignore[arg-type]
        assert pool.submit(tamper, how).result(PATIENCE) is None
        error = pool.schedule(support.sleep, (5,), soft_timeout=0.2).exception(PATIENCE)
        assert isinstance(error, SoftTimeLimitExceeded)


def test_a_hard_limit_that_meets_the_end_of_the_task_gives_one_outcome(pool: ProcessPool) -> None:
    futures = [pool.schedule(time.sleep, (0.02,), timeout=0.02) for _ in range(20)]
    after = [pool.submit(support.give, number) for number in range(20)]
    for future in futures:
        assert isinstance(future.exception(PATIENCE), TimeLimitExceeded | None)
    assert [future.result(PATIENCE) for future in after] == list(range(20))


def start_family(folder: Path) -> None:
    """A shell with a child, and a fork; their pids go to files."""
    subprocess.Popen(["sh", "-c", f"echo $$ > {folder}/shell; sleep 20 & echo $! > {folder}/sleep; wait"])
    child = os.fork()
    if not child:
        support.sleep()
    (folder / "fork").write_text(str(child))
    support.sleep()


@pytest.mark.parametrize("how", ["limit", "cancel"])
def test_a_tasks_own_children_end_with_it(pool: ProcessPool, tmp_path: Path, how: str) -> None:
    future = pool.schedule(start_family, (tmp_path,), timeout=2.0 if how == "limit" else None)
    paths = [tmp_path / name for name in ("shell", "sleep", "fork")]
    pids = [
        int(wait_until(lambda path=path: path.exists() and path.read_text().strip(), what=path.name)) for path in paths
    ]
    if how == "cancel":
        assert future.cancel()
    else:
        assert isinstance(future.exception(PATIENCE), TimeLimitExceeded)
    for pid in pids:
        wait_until(lambda pid=pid: not support.alive(pid), 5.0, f"process {pid} of the task ends")


def test_the_error_says_where_the_task_was(pool: ProcessPool) -> None:
    error = pool.schedule(support.sleep, timeout=0.2).exception(PATIENCE)
    assert isinstance(error, TimeLimitExceeded)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "support.py" in str(error.__cause__)
    assert "time.sleep(seconds)" in str(error.__cause__)
    assert "pool/worker.py" not in str(error.__cause__)


def test_limits_hold_while_the_parent_is_stopped(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
import support
from mpworker import ProcessPool
if __name__ == "__main__":
    with ProcessPool(1) as pool:
        posts = support.Signpost(Path("here")), support.Signpost(Path("never"))
        future = pool.schedule(support.meet, posts, timeout=1)
        print(type(future.exception(30)).__name__)
"""
    process = support.start_script(script, tmp_path)
    pid = int(Signpost(tmp_path / "here").wait())
    process.send_signal(signal.SIGSTOP)
    try:
        wait_until(lambda: not support.alive(pid), 2 + SLACK, "the task ends though nobody in the parent runs")
    finally:
        process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert out == "TimeLimitExceeded\n"


@pytest.mark.parametrize("limits", [{"timeout": MONTH}, {"soft_timeout": MONTH}, {"timeout": 1e9 - 1}])
def test_a_limit_of_a_month_is_a_limit_like_any_other(limits: dict[str, float]) -> None:
    with ProcessPool(1, ready_timeout=MONTH, callback_timeout=MONTH) as pool:
        # Longer than the watchdog's first look, so that somebody waits for that limit.
        assert pool.schedule(time.sleep, (0.3,), **limits).result(PATIENCE) is None  # type: ignore[arg-type]
        dispatcher = pool.stats()["dispatcher"]
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        assert pool.stats()["dispatcher"] == dispatcher


def test_a_limit_shorter_than_a_tick_still_ends_it(pool: ProcessPool) -> None:
    assert isinstance(pool.schedule(support.sleep, timeout=1e-9).exception(PATIENCE), TimeLimitExceeded)
    assert isinstance(pool.schedule(support.sleep, soft_timeout=1e-9).exception(PATIENCE), SoftTimeLimitExceeded)


def test_the_interpreter_used_by_the_tests_is_the_one_of_the_workers(pool: ProcessPool) -> None:
    assert pool.submit(eval, "__import__('sys').executable").result(PATIENCE) == sys.executable
