"""How workers start, and what happens when they cannot: one clear error, and no respawn loop."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import support
from support import PATIENCE

from mpworker import ProcessPool
from mpworker.errors import BootError, PayloadError

METHODS = ["fork", "forkserver", "spawn", "auto"]
state: list[object] = []


def remember(path: Path, value: object) -> None:
    support.append(path, os.getpid())
    state.append(value)


def recall() -> tuple[int, list[object]]:
    return os.getpid(), state


@pytest.mark.parametrize("method", ["fork", "spawn", "auto"])
def test_the_initializer_runs_once_in_each_worker(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, start_method=method, initializer=remember, initargs=(log, "here")) as pool:
        answers = [pool.submit(recall).result(PATIENCE) for _ in range(10)]
        assert all(answer[1] == ["here"] for answer in answers)
        assert {str(answer[0]) for answer in answers} <= set(support.lines(log))
    assert len(support.lines(log)) == len(set(support.lines(log)))


def misbehave(how: str) -> None:
    if how == "raise":
        raise LookupError("no such table")
    if how == "sys.exit":
        sys.exit("enough")
    if how == "os._exit":
        os._exit(3)
    time.sleep(20)


@pytest.mark.parametrize(
    ("method", "how", "words"),
    [
        *((method, "raise", "LookupError: no such table") for method in METHODS),
        *((method, "sys.exit", "enough") for method in ("spawn", "auto")),
        ("auto", "os._exit", "code 3"),
    ],
)
def test_a_broken_initializer_ends_the_pool_with_one_clear_error(method: str, how: str, words: str) -> None:
    with ProcessPool(2, start_method=method, initializer=misbehave, initargs=(how,)) as pool:
        futures = [pool.submit(support.give, number) for number in range(5)]
        for future in futures:
            error = future.exception(PATIENCE)
            assert isinstance(error, BootError)
            assert words in str(error)
        with pytest.raises(BootError, match=words):
            pool.submit(support.give)


@pytest.mark.parametrize("method", ["spawn", "auto"])
def test_workers_that_take_too_long_to_get_ready_end_the_pool(method: str) -> None:
    begun = time.monotonic()
    with ProcessPool(1, start_method=method, initializer=misbehave, initargs=("hang",), ready_timeout=1.5) as pool:
        error = pool.submit(support.give).exception(PATIENCE)
        assert isinstance(error, BootError)
        assert "1.5 s" in str(error)
    assert time.monotonic() - begun < 1.5 + 2 * support.SLACK


def test_an_initializer_that_cannot_be_pickled_is_refused_at_once() -> None:
    with ProcessPool(1, initializer=lambda: None) as pool, pytest.raises(PayloadError, match="the initializer"):
        pool.submit(support.give)


GUARDLESS = """
import support
from mpworker import ProcessPool
print("once more", flush=True)
pool = ProcessPool(1, start_method={method!r})
print(pool.submit(support.give, 7).result(20))
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn", "auto"])
def test_a_script_without_its_guard_is_told_so_and_ends(method: str, tmp_path: Path) -> None:
    ended = support.run_script(GUARDLESS.format(method=method), tmp_path)
    assert ended.code == 1
    assert 'if __name__ == "__main__":' in ended.err
    assert "7" not in ended.out.split()


def test_fork_needs_no_guard(tmp_path: Path) -> None:
    ended = support.run_script(GUARDLESS.format(method="fork"), tmp_path)
    assert (ended.code, ended.out.split()[-1]) == (0, "7")


MAIN = """
import sys
import support
from mpworker import ProcessPool

LOADED = sys.argv[2:]

def own(number):
    return number + 1, LOADED

class Own(Exception):
    pass

def raise_own():
    raise Own("mine")

if __name__ == "__main__":
    LOADED.append("set in the parent")
    with ProcessPool(1, start_method=sys.argv[1]) as pool:
        print(pool.submit(own, 1).result(30))
        error = pool.submit(raise_own).exception(30)
        print(type(error) is Own, error)
"""


@pytest.mark.parametrize("method", METHODS)
def test_functions_and_exceptions_of_a_script_travel(method: str, tmp_path: Path) -> None:
    ended = support.run_script(MAIN, tmp_path, method, "word")
    memory = ["word", "set in the parent"] if method == "fork" else ["word"]
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"(2, {memory})\nTrue mine\n"


def test_a_script_that_is_a_module_of_a_package_works(tmp_path: Path) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sub.py").write_text(MAIN)
    start = "import runpy, sys\nsys.argv[1:] = ['auto']\n"
    ended = support.run_script(f"{start}runpy.run_module('pack.sub', run_name='__main__', alter_sys=True)\n", tmp_path)
    assert (ended.code, ended.out) == (0, "(2, [])\nTrue mine\n"), ended.err


def test_native_threads_of_the_application_turn_auto_into_spawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = """
import logging, threading, support
from mpworker import ProcessPool
if __name__ == "__mp_main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    with ProcessPool(1) as pool:
        print(pool.submit(support.give, 1).result(30))
"""
    ended = support.run_script(script, tmp_path)
    assert (ended.code, ended.out) == (0, "1\n")
    (line,) = [line for line in ended.err.splitlines() if "spawn" in line]
    assert "has 2 threads" in line


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_without_streams_nothing_is_printed_into_a_line(method: str, tmp_path: Path) -> None:
    """As after ``>&- <&-``: the lowest free descriptors are those of the standard streams."""
    script = """
import os, sys
from mpworker import ProcessPool
def talk():
    print("to nobody", flush=True)
    os.write(1, b"nor this")
    return os.getpid()
if __name__ == "__main__":
    os.close(0)
    os.close(1)
    with ProcessPool(2, start_method=sys.argv[1]) as pool:
        pids = {pool.submit(talk).result(30) for _ in range(10)}
        print(pids <= {worker["pid"] for worker in pool.stats()["workers"]}, file=sys.stderr)
"""
    ended = support.run_script(script, tmp_path, method)
    assert (ended.code, ended.err) == (0, "True\n")


@pytest.mark.parametrize(("deaths", "says"), [(2, "1"), (9, "BootError")])
def test_a_process_killed_while_it_loads_the_application_is_replaced_twice(
    deaths: int, says: str, tmp_path: Path
) -> None:
    script = """
import os, signal, sys, support
from pathlib import Path
from mpworker import ProcessPool
from mpworker.errors import BootError
if __name__ == "__mp_main__":
    support.append(Path("loads"), os.getpid())
    if len(support.lines(Path("loads"))) <= int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    with ProcessPool(1) as pool:
        try:
            print(pool.submit(support.give, 1).result(30))
        except BootError as exc:
            print("BootError", exc)
"""
    ended = support.run_script(script, tmp_path, str(deaths))
    assert ended.out.startswith(says), ended.err
    assert len(support.lines(tmp_path / "loads")) == 3


@pytest.mark.parametrize("method", METHODS)
def test_developers_hear_no_warning(method: str, tmp_path: Path) -> None:
    script = """
import sys, support
from mpworker import ProcessPool
if __name__ == "__main__":
    with ProcessPool(1, start_method=sys.argv[1]) as pool:
        print(pool.schedule(support.give, (1,), callback=support.give).result(30))
"""
    ended = support.run_script(script, tmp_path, method, PYTHONDEVMODE="1", PYTHONWARNINGS="error::ResourceWarning")
    assert (ended.code, ended.out, ended.err) == (0, "1\n", "")


@pytest.mark.parametrize("method", METHODS)
def test_a_parent_that_ignores_its_children_has_a_pool_all_the_same(method: str, tmp_path: Path) -> None:
    script = """
import logging, signal, sys, support
from mpworker import ProcessPool
if __name__ == "__main__":
    logging.basicConfig()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # inherited by all that it starts
    with ProcessPool(1, start_method=sys.argv[1]) as pool:
        print(pool.submit(support.give, 1).result(30))
"""
    ended = support.run_script(script, tmp_path, method)
    assert (ended.code, ended.out, ended.err) == (0, "1\n", "")


def test_a_script_with_one_thread_gets_a_new_template(tmp_path: Path) -> None:
    """Its dispatcher is a fork of it, which has inherited both ends of the line to the template."""
    script = """
import os, signal, support
from pathlib import Path
from mpworker import ProcessPool
if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with ProcessPool(1, start_method="fork", max_tasks_per_worker=1) as pool:
        print(pool.submit(support.give, 1).result(30))
        for pid in support.children_of(pool.stats()["dispatcher"]):
            if Path(f"/proc/{pid}/comm").read_text() == "template" + chr(10):
                os.kill(pid, signal.SIGKILL)
        print([pool.submit(support.give, number).result(30) for number in range(4)])
"""
    ended = support.run_script(script, tmp_path)
    assert (ended.code, ended.out) == (0, "1\n[0, 1, 2, 3]\n"), ended.err
    assert "cannot be had again" in ended.err


#: A native thread that ends by itself when the process forks, as those of OpenBLAS do.
BLAS = """
import _thread, os, threading
begun, end = threading.Event(), threading.Event()
def work():
    begun.set()
    end.wait()
def stop():
    end.set()
    while len(os.listdir("/proc/self/task")) > 1:
        pass
_thread.start_new_thread(work, ())
begun.wait()
os.register_at_fork(before=stop)
"""


def test_a_thread_that_ends_at_a_fork_is_no_reason_against_it_where_children_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "blas.py").write_text(BLAS)
    script = """
import signal, sys, threading
sys.path.insert(0, ".")
import blas
from mpworker.pool.forking import risk_of_forking
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
assert threading.active_count() == 1
print(repr(risk_of_forking()))
"""
    ended = support.run_script(script, tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "''\n", "")


@pytest.mark.parametrize("method", ["auto", "fork"])
def test_where_orphans_cannot_be_adopted_workers_are_spawned(method: str, tmp_path: Path) -> None:
    """As on macOS, or where a filter of system calls refuses it."""
    (tmp_path / "sitecustomize.py").write_text("from mpworker.pool import linux\nlinux._prctl = lambda *_: False\n")
    script = """
import logging, sys, support
from mpworker import ProcessPool
if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    with ProcessPool(1, start_method=sys.argv[1]) as pool:
        print(pool.submit(support.give, 1).result(30))
"""
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ended = support.run_script(script, tmp_path, method, PYTHONPATH=paths)
    assert (ended.code, ended.out) == (0, "1\n"), ended.err
    (line,) = ended.err.splitlines()
    assert "start method spawn" in line


def test_auto_forks_from_a_clean_process() -> None:
    """A lock held by a thread of this process is free in the workers."""
    with held, ProcessPool(1) as pool:
        assert pool.submit(take_lock).result(PATIENCE) is True


held = threading.Lock()


def take_lock() -> bool:
    return held.acquire(timeout=1.0)


def test_threads_that_end_by_themselves_when_the_process_forks_do_not_matter(tmp_path: Path) -> None:
    """As those of OpenBLAS do, which numpy brings."""
    (tmp_path / "blas.py").write_text(BLAS)
    script = """
import logging, sys
from mpworker import ProcessPool
def loaded():
    return sys.modules["blas"].begun.is_set()
if __name__ == "__mp_main__":
    import blas
if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    with ProcessPool(1) as pool:
        print(pool.submit(loaded).result(30))
"""
    ended = support.run_script(script, tmp_path)
    assert (ended.code, ended.out) == (0, "True\n"), ended.err
    assert "spawn" not in ended.err


BESIDE = """
import multiprocessing, os
from mpworker import ProcessPool

def pids(pool):
    return sorted(process.pid for process in pool._pool)

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as theirs:
        theirs.map(abs, range(100))
        before = pids(theirs)
        with ProcessPool(2, start_method="fork", max_tasks_per_worker=20) as ours:
            assert list(ours.map(abs, range(100))) == list(range(100))
        assert theirs.map(abs, range(100)) == list(range(100))
        assert pids(theirs) == before, "workers of theirs have been ended with ours"
        theirs.close()
        theirs.join()
    print("both have ended")
"""


def test_a_pool_of_multiprocessing_lives_on_beside_it(tmp_path: Path) -> None:
    """A worker that is a fork must not take its parent's children for its own when it leaves."""
    ended = support.run_script(BESIDE, tmp_path)
    assert ended.out == "both have ended\n", ended.err
