"""The fault matrix in ``callback`` and ``error_callback``: the tasks and the other callbacks never notice."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import support
from process.bench import DEATH, LATE, LIMIT, Bench, bench
from process.faults import DIES, FAULTS, LIVES, METHODS, RAISES, STALLS, cells, commit, deeds
from support import PATIENCE, wait_until

PLACES = ["callback", "error_callback"]


@pytest.fixture(scope="module", params=METHODS)
def patient(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with bench(request.param) as patient:
        yield patient


@pytest.fixture(scope="module", params=METHODS)
def hasty(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with bench(request.param, callback_timeout=LIMIT) as hasty:
        yield hasty


def run_cell(shared: Bench, place: str, name: str, folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, float]:
    """Commits a fault in a callback between other callbacks.

    Returns:
        what the pool logged of it, and how many seconds later its end was known.
    """
    pool, workers = shared.pool, shared.workers()
    log, heard = folder / "log", folder / "heard"
    note, task = partial(support.note, heard), support.give if place == "callback" else support.fail
    before = [pool.schedule(support.give, (n,), callback=partial(note, n)) for n in range(3)]
    future = pool.schedule(task, **{place: partial(commit, name, log)})
    after = [pool.schedule(support.fail, (str(n),), error_callback=partial(note, n)) for n in range(3)]

    assert [task.result(PATIENCE) for task in before] == [0, 1, 2]
    assert [str(task.exception(PATIENCE)) for task in after] == ["0", "1", "2"]
    assert (future.exception(PATIENCE) is None) == (place == "callback")
    wait_until(lambda: future.job not in pool._core.names, what="the callback has ended")
    ended = time.monotonic()
    wait_until(lambda: not pool._core.names, what="all others have ended")

    assert len(support.lines(heard)) == 6
    ((culprit, done),) = deeds(log)  # really, and once
    assert culprit not in workers
    assert shared.workers() == workers
    if FAULTS[name].ending in (DIES, STALLS):
        assert not support.alive(culprit)
    assert pool.submit(support.give, 1).result(PATIENCE) == 1
    logged = [record.getMessage() for record in caplog.records if record.name == "mpworker.callbacks"]
    assert all(f"{task.__module__}.{task.__name__}[{future.job}]" in text for text in logged), logged
    return "\n".join(logged), ended - done


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place in PLACES for name in cells(place, RAISES, DIES, LIVES)]
)
def test_a_fault_in_a_callback_stays_there(
    patient: Bench, place: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault, printed = FAULTS[name], patient.output.size
    logged, took = run_cell(patient, place, name, tmp_path, caplog)
    if fault.ending == LIVES:
        assert not logged
    elif fault.kind is not None:
        assert f"{fault.kind.__name__}: {fault.words}" in logged
    else:
        assert re.search(fault.words, logged)
        assert took < DEATH
    if name == "prints-100-MB":
        patient.printed(printed)


@pytest.mark.parametrize(("place", "name"), [(place, name) for place in PLACES for name in cells(place, STALLS)])
def test_a_callback_that_stalls_is_ended_in_time(
    hasty: Bench, place: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logged, took = run_cell(hasty, place, name, tmp_path, caplog)
    assert "TimeLimitExceeded" in logged
    assert took < LIMIT + LATE
