"""Fault x place x start method: one task ends, with the right error and in time; those around it never notice.

The faults, and the cells that make no sense, are in :mod:`process.faults`. Here are the places that a task passes
through; callbacks and initializers have files of their own beside this one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import support
from process.bench import DEATH, LATE, LIMIT, Bench, bench
from process.faults import (
    DIES,
    FAULTS,
    LIVES,
    MEMORY,
    METHODS,
    PLACES,
    RAISES,
    SENSELESS,
    STALLS,
    Cargo,
    cells,
    commit,
    deeds,
)
from support import PATIENCE, wait_until

from mpworker import MemoryLimitExceeded, RemoteTraceback, TimeLimitExceeded, WorkerLost
from mpworker.errors import PayloadError


@pytest.fixture(scope="module", params=METHODS)
def shared(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with bench(request.param) as shared:
        yield shared


def send(shared: Bench, place: str, name: str, log: Path) -> Future[Any]:
    fault = FAULTS[name]
    limits: dict[str, Any] = {"timeout": LIMIT if fault.ending == STALLS and not fault.kind else PATIENCE}
    if fault.kind is MemoryLimitExceeded:
        limits["memory_limit"] = MEMORY
    if name == "swallows-the-soft-limit":
        limits["soft_timeout"] = LIMIT / 3
    if place == "task":
        return shared.pool.schedule(commit, (name, log), **limits)
    if place == "arguments":
        return shared.pool.schedule(support.give, (Cargo("load", name, log),), **limits)
    # Made in the worker: on its way there it must not be pickled.
    return shared.pool.schedule(Cargo, ("dump" if place == "result" else "load", name, log), **limits)


def check_error(place: str, name: str, error: BaseException | None) -> None:
    fault = FAULTS[name]
    if fault.ending == LIVES:
        assert error is None
    elif fault.ending == STALLS and fault.kind is not None:
        assert isinstance(error, fault.kind)
        assert re.search(fault.words, str(error))
    elif fault.ending == STALLS:
        assert isinstance(error, TimeLimitExceeded)
        assert error.limit == LIMIT
    elif name == "writes-garbage" and error is None:
        pass  # it was done, and so were others behind it, before the garbage was read: who wrote it is not known
    elif fault.ending == DIES:
        assert isinstance(error, WorkerLost)
        assert re.search(fault.words, str(error))
    elif place == "task":
        assert type(error) is fault.kind
        assert fault.words in str(error)
        assert isinstance(error.__cause__, RemoteTraceback)
        assert "in commit" in str(error.__cause__)
    else:
        assert fault.kind is not None
        assert isinstance(error, PayloadError)
        assert f"pickled{' in the worker' if place == 'arguments' else ''}" in str(error)
        assert f"{fault.kind.__name__}: {fault.words}" in str(error)


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place in ("arguments", "task", "result") for name in cells(place)]
)
def test_a_fault_in_a_worker_costs_its_own_task(shared: Bench, place: str, name: str, tmp_path: Path) -> None:
    pool, log, printed = shared.pool, tmp_path / "log", shared.output.size
    before = [pool.submit(support.give, number) for number in range(10)]
    begun = time.monotonic()
    future = send(shared, place, name, log)
    after = [pool.submit(support.give, number) for number in range(10)]
    error = future.exception(PATIENCE)
    ended = time.monotonic()
    check_error(place, name, error)
    assert [task.result(PATIENCE) for task in before + after] == [*range(10), *range(10)]

    ((culprit, done),) = deeds(log)  # really, and once
    if FAULTS[name].ending == STALLS:
        assert begun + LIMIT * (FAULTS[name].kind is None) <= ended < done + LIMIT + LATE
    elif FAULTS[name].ending == DIES:
        assert ended < done + DEATH
    if FAULTS[name].ending in (RAISES, LIVES):
        assert culprit in shared.workers()
    else:
        assert not support.alive(culprit)
        assert culprit not in shared.workers()
    if name in ("forks", "daemonizes"):
        assert support.alive(future.result())
    if name == "prints-100-MB":
        shared.printed(printed)


@pytest.mark.parametrize("name", cells("parent"))
def test_a_fault_while_the_parent_unpickles_costs_that_result(shared: Bench, name: str, tmp_path: Path) -> None:
    pool, log, workers = shared.pool, tmp_path / "log", shared.workers()
    before = [pool.submit(support.give, number) for number in range(10)]
    future = send(shared, "parent", name, log)
    after = [pool.submit(support.give, number) for number in range(10)]
    check_error("parent", name, future.exception(PATIENCE))
    assert [task.result(PATIENCE) for task in before + after] == [*range(10), *range(10)]
    assert [deed.pid for deed in deeds(log)] == [os.getpid()]
    assert shared.workers() == workers
    if FAULTS[name].ending == LIVES:  # a process of ours, so it is ours to end
        support.kill_ours(future.result())
        with contextlib.suppress(ChildProcessError):
            os.waitpid(future.result(), 0)


def test_whoever_survives_a_daemon_can_still_be_told_dead(shared: Bench, tmp_path: Path) -> None:
    """A grandchild holds the lines of its worker, which therefore do not end when that dies."""
    pool, log = shared.pool, tmp_path / "log"
    grandchild = pool.submit(commit, "daemonizes", log).result(PATIENCE)
    ((worker, _),) = deeds(log)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: all(process["pid"] != worker for process in pool.stats()["workers"]), DEATH, "it is known")
    assert worker not in shared.workers()
    assert support.alive(grandchild)
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_the_table_names_only_cells_that_exist() -> None:
    assert set(SENSELESS) <= {(place, name) for place in PLACES for name in FAULTS}
    assert all(reason and "\n" not in reason for reason in SENSELESS.values())
