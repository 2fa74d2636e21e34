"""However a pool ends, no process stays: asked to, forgotten, at the interpreter's exit, or with its parent."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest
import support
from support import MARK, PATIENCE, SLACK, Signpost, wait_until

from mpworker import ProcessPool

METHODS = ["fork", "forkserver", "spawn", "auto"]


def pids_of(pool: ProcessPool) -> list[int]:
    stats = pool.stats()
    return [stats["dispatcher"], *support.children_of(stats["dispatcher"])]


def gone(pids: list[int]) -> Callable[[], bool]:
    return lambda: not any(map(support.alive, pids))


@pytest.mark.parametrize("method", METHODS)
def test_shutdown_finishes_everything_and_leaves_nothing(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = ProcessPool(2, start_method=method)
    hook = partial(support.note, log, "ok")
    futures = [pool.schedule(support.give, (number,), callback=hook) for number in range(50)]
    assert futures[0].result(PATIENCE) == 0
    pids = pids_of(pool)
    pool.shutdown()
    assert [future.result(0) for future in futures] == list(range(50))
    assert len(support.lines(log)) == 50
    assert gone(pids)()


def test_nothing_can_be_submitted_afterwards() -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
    for call in (lambda: pool.submit(support.give), lambda: pool.map(support.give, [1])):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call()
    pool.shutdown()
    unused = ProcessPool(1)
    unused.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        unused.submit(support.give)


def test_shutdown_without_waiting_finishes_all_the_same(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    pool = ProcessPool(1)
    futures = [pool.submit(support.meet, here, go), pool.submit(support.give, 2)]
    here.wait()
    pids = pids_of(pool)
    pool.shutdown(wait=False)
    assert not futures[0].done()
    go.set()
    assert futures[0].result(PATIENCE) > 0
    assert futures[1].result(PATIENCE) == 2
    wait_until(gone(pids), what="the processes end")


def test_cancel_futures_cancels_what_has_not_started(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    pool = ProcessPool(1)
    running = pool.submit(support.meet, here, go)
    waiting = [pool.submit(support.append, tmp_path / "ran", number) for number in range(10)]
    here.wait()
    wait_until(running.running, what="the parent knows that it runs")
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in waiting)
    assert not running.done()
    go.set()
    assert running.result(PATIENCE) > 0
    pool.shutdown()
    assert not (tmp_path / "ran").exists()


def test_with_finishes_also_after_an_exception() -> None:
    futures = []
    with contextlib.suppress(ZeroDivisionError), ProcessPool(1) as pool:
        futures.append(pool.submit(support.give, 1))
        raise ZeroDivisionError
    assert futures[0].result(0) == 1


def test_a_forgotten_pool_finishes_its_work_and_ends(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    pool = ProcessPool(1)
    running, waiting = pool.submit(support.meet, here, go), pool.submit(support.give, 2)
    here.wait()
    pids = pids_of(pool)
    del pool
    gc.collect()
    assert not running.done()
    go.set()
    assert waiting.result(PATIENCE) == 2
    wait_until(gone(pids), what="the processes of a pool that nobody knows end")


SCRIPT = """
import os, sys
from functools import partial
from pathlib import Path
import support
from mpworker import ProcessPool
here = Path(__file__).parent

def slow(number):
    support.append(here / "ran", number)
    return number

def main(method, how):
    pool = ProcessPool(2, start_method=method)
    if how == "exit":
        for number in range(20):
            pool.schedule(slow, (number,), callback=partial(support.note, here / "log", "ok"))
        raise SystemExit(3)
    pool.schedule(support.sleep, callback=support.give)
    pool.schedule(support.give, callback=support.sleep)
    pool.submit(support.meet, support.Signpost(here / "here"), support.Signpost(here / "never"))
    if how == "forked" and os.fork() == 0:  # keeps every line of its parent open
        Path(here / "fork").write_text(str(os.getpid()))
        support.sleep(60)
        os._exit(0)
    support.sleep(60)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize("method", METHODS)
def test_the_interpreters_exit_finishes_what_is_pending(method: str, tmp_path: Path) -> None:
    mark = support.new_mark()
    ended = support.run_script(SCRIPT, tmp_path, method, "exit", **{MARK: mark})
    assert (ended.code, ended.out, ended.err) == (3, "", "")
    assert sorted(support.lines(tmp_path / "ran"), key=int) == [str(number) for number in range(20)]
    assert len(support.lines(tmp_path / "log")) == 20
    assert not support.processes(mark)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["alone", "forked"])
def test_sigkill_of_the_parent_leaves_no_process(method: str, how: str, tmp_path: Path) -> None:
    mark = support.new_mark()
    process = support.start_script(SCRIPT, tmp_path, method, how, **{MARK: mark})
    fork = 0
    try:
        Signpost(tmp_path / "here").wait()
        if how == "forked":
            fork = int(wait_until(lambda: _text(tmp_path / "fork"), what="the fork"))
        seen = support.processes(mark)
        assert len(seen) >= 4
        process.kill()
        process.wait(PATIENCE)
        # A process that has a title has no mark any more, and none by descent once its parent is gone: by pid, too.
        ours = seen.keys() - {fork}
        wait_until(lambda: not any(map(support.alive, ours)), 2.0 + SLACK, "everything ends with its parent")
        assert not support.processes(mark).keys() - {fork}
        assert not fork or support.alive(fork)
    finally:
        if fork:
            os.kill(fork, signal.SIGKILL)
        _close(process)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _close(process: subprocess.Popen[str]) -> None:
    """Ends the script; what it said is shown if the test has failed."""
    print(support.table(support.processes()))
    process.kill()
    print(*process.communicate(timeout=PATIENCE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_and_sigterm_leave_nothing(number: int, tmp_path: Path) -> None:
    mark = support.new_mark()
    process = support.start_script(SCRIPT, tmp_path, "auto", "alone", **{MARK: mark})
    try:
        Signpost(tmp_path / "here").wait()
        os.killpg(process.pid, number)
        process.wait(PATIENCE)
        wait_until(lambda: not support.processes(mark), 2.0, "everything ends")
    finally:
        _close(process)


def test_a_fork_of_the_parent_does_not_end_the_pool(tmp_path: Path) -> None:
    """A child that exits runs exit hooks and collects garbage: neither may speak for its parent."""
    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        pid = os.fork()
        if not pid:
            try:
                pool.shutdown()
            finally:
                os._exit(0)
        wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], what="the fork ends")
        assert pool.submit(support.give, 2).result(PATIENCE) == 2


def test_pools_beside_each_other_end_apart(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as first:
        future = first.submit(support.meet, here, go)
        here.wait()
        with ProcessPool(1, start_method="fork") as second:
            assert second.submit(support.give, 2).result(PATIENCE) == 2
        assert not future.done()
        go.set()
        assert future.result(PATIENCE) > 0


def test_a_cancelled_future_does_not_hold_up_shutdown(tmp_path: Path) -> None:
    here = Signpost(tmp_path / "here")
    with ProcessPool(1) as pool:
        future = pool.submit(support.meet, here, Signpost(tmp_path / "never"))
        here.wait()
        future.cancel()
    with pytest.raises(CancelledError):
        future.result(0)
