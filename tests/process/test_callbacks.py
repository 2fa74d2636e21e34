"""Callbacks: exactly one for each task, elsewhere, in order of completion, and whatever they do stays with them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool

METHODS = ["fork", "forkserver", "spawn", "auto"]


def both(log: Path, label: object = "") -> dict[str, Callable[[Any], object]]:
    """One line in ``log`` for each call: its process, which of the two, the type of what came, and its repr."""
    return {
        "callback": partial(support.note, log, f"ok{label}"),
        "error_callback": partial(support.note, log, f"error{label}"),
    }


@pytest.mark.parametrize("method", METHODS)
def test_one_of_the_two_is_called_in_a_process_of_its_own(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, start_method=method) as pool:
        futures = [pool.schedule(support.getpid, (number,), **both(log)) for number in range(10)]
        futures += [pool.schedule(support.fail, (str(number),), **both(log)) for number in range(10)]
        workers = {future.result(PATIENCE) for future in futures[:10]}
        dispatcher = pool.stats()["dispatcher"]
    calls = [line.split(maxsplit=3) for line in support.lines(log)]
    (process,) = {int(call[0]) for call in calls}
    assert process not in {os.getpid(), dispatcher, *workers}
    assert sorted(call[1] for call in calls) == ["error"] * 10 + ["ok"] * 10
    assert {call[3] for call in calls if call[1] == "ok"} == {repr(pid) for pid in workers}
    assert sorted(call[3] for call in calls if call[1] == "error") == [f"ValueError('{n}')" for n in range(10)]


@pytest.mark.parametrize(
    ("task", "arguments", "limits", "error"),
    [
        (support.sleep, (), {"timeout": 0.2}, "TimeLimitExceeded"),
        (support.sleep, (), {"soft_timeout": 0.2}, "SoftTimeLimitExceeded"),
        (support.die, ("exit",), {}, "WorkerLost"),
        (support.die, ("kill",), {}, "WorkerLost"),
        (support.raise_two, (), {}, "RemoteError"),
        (support.fail, ("x", SystemExit), {}, "SystemExit"),
        (support.give, (support.Unwilling("load"),), {}, "PayloadError"),
        (support.return_unwilling, ("dump",), {}, "PayloadError"),
        (support.return_unwilling, ("load",), {}, "PayloadError"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:20],
)
def test_every_way_to_fail_has_its_error_callback(
    task: Callable[..., Any], arguments: tuple[Any, ...], limits: dict[str, float], error: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with ProcessPool(1) as pool:
        pool.submit(support.give).result(PATIENCE)
        future = pool.schedule(task, arguments, **limits, **both(log))  # type: ignore[arg-type]
        assert type(future.exception(PATIENCE)).__name__ == error
    assert [line.split()[1:3] for line in support.lines(log)] == [["error", error]]


def test_only_one_may_be_given(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(1) as pool:
        pool.schedule(support.give, (1,), error_callback=partial(support.note, log, "wrong"))
        pool.schedule(support.fail, callback=partial(support.note, log, "wrong"))
        pool.schedule(support.give, (1,), callback=partial(support.note, log, "right"))
    assert [line.split()[1] for line in support.lines(log)] == ["right"]


def test_they_come_in_order_of_completion(tmp_path: Path) -> None:
    log = tmp_path / "log"
    heres, goes = ([Signpost(tmp_path / f"{name}{n}") for n in range(3)] for name in ("here", "go"))
    with ProcessPool(3) as pool:
        futures = [pool.schedule(support.meet, (heres[n], goes[n]), **both(log, n)) for n in range(3)]
        for here in heres:
            here.wait()
        for number in (2, 0, 1):
            goes[number].set()
            futures[number].result(PATIENCE)
    assert [line.split()[1] for line in support.lines(log)] == ["ok2", "ok0", "ok1"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with ProcessPool(4) as pool:
        for number in range(30):
            pool.schedule(support.give, (number,), callback=partial(enter_and_leave, tmp_path))
    assert support.lines(tmp_path / "crowd") == ["alone"] * 30


def enter_and_leave(folder: Path, value: object) -> None:
    try:
        (folder / "inside").mkdir()
        alone = "alone"
    except FileExistsError:
        alone = "crowded"
    support.append(folder / "crowd", alone)
    (folder / "inside").rmdir()


def bad(how: str, value: object) -> None:
    if how == "raise":
        raise RuntimeError("a bad callback")
    if how == "hang":
        support.sleep()
    support.die(how)


@pytest.mark.parametrize("which", ["callback", "error_callback"])
@pytest.mark.parametrize(
    ("how", "trace"),
    [
        ("raise", "RuntimeError: a bad callback"),
        ("hang", "TimeLimitExceeded"),
        ("exit", "exited with code 9"),
        ("segv", "SIGSEGV"),
    ],
)
def test_a_bad_callback_wedges_nothing_and_is_named(
    which: str, how: str, trace: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    with ProcessPool(1, callback_timeout=0.5, initializer=import_module, initargs=(__name__,)) as pool:
        task = support.give if which == "callback" else support.fail
        first = pool.schedule(task, **{which: partial(bad, how)})  # type: ignore[arg-type]
        others = [pool.schedule(support.give, (number,), **both(log)) for number in range(5)]
        assert [future.result(PATIENCE) for future in others] == list(range(5))
        assert first.done()
        wait_until(lambda: len(support.lines(log)) == 5, what="the callbacks behind the bad one run")
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"support.{task.__name__}[1]" in record.getMessage()
    assert trace in record.getMessage()


def test_a_slow_callback_keeps_no_worker_waiting(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        pool.schedule(support.give, (1,), callback=partial(hold_up, here, go))
        here.wait()
        assert [pool.submit(support.give, number).result(PATIENCE) for number in range(100)] == list(range(100))
        go.set()


def hold_up(here: Signpost, go: Signpost, value: object) -> None:
    support.meet(here, go)


def test_a_pool_without_callbacks_has_no_callback_process() -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        assert [worker["lane"] for worker in pool.stats()["workers"]] == [0]
        pool.schedule(support.give, callback=support.give).result(PATIENCE)
        wait_until(lambda: sorted(w["lane"] for w in pool.stats()["workers"]) == [0, 1], what="the callback process")
