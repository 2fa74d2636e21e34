"""The fault matrix in the initializer: one clear error for every task, in time; or workers that work."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import support
from process.bench import LATE, SIZE, bench
from process.faults import DIES, FAULTS, LIVES, METHODS, RAISES, STALLS, cells, commit, deeds
from support import PATIENCE, SLACK, wait_until

from mpworker.errors import BootError
from mpworker.pool.lanes import MAX_BOOT_FAILURES

#: Seconds that a worker may take to get ready, where it never does.
READY = 0.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cells("initializer", RAISES, DIES, STALLS))
def test_a_fault_in_the_initializer_ends_the_pool_with_one_clear_error(method: str, name: str, tmp_path: Path) -> None:
    fault, log, options = FAULTS[name], tmp_path / "log", {}
    if fault.ending == STALLS:
        options["ready_timeout"] = READY
    elif fault.ending == DIES:  # so many deaths are the end: no pause between the first ones and the last
        options["size"] = MAX_BOOT_FAILURES
    begun = time.monotonic()
    with bench(method, start=False, initializer=commit, initargs=(name, log), **options) as broken:
        tasks = [broken.pool.submit(support.give, number) for number in range(5)]
        errors = [task.exception(PATIENCE) for task in tasks]
        took = time.monotonic() - begun
    (error,) = {str(error) for error in errors}
    assert {type(error) for error in errors} == {BootError}
    if fault.ending == STALLS:
        assert re.search(rf"not (ready within {READY} s|loaded in time)", error)
        assert took < READY + LATE
    elif fault.ending == RAISES:
        assert fault.kind is not None
        assert f"failed: {fault.kind.__name__}: {fault.words}" in error
        assert 1 <= len(deeds(log)) <= SIZE
    else:
        assert re.search(fault.words, error)
    assert took < 5.0 + SLACK


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", cells("initializer", LIVES))
def test_an_initializer_may_leave_things_behind(method: str, name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with bench(method, initializer=commit, initargs=(name, log)) as made:
        assert [made.pool.submit(support.give, number).result(PATIENCE) for number in range(10)] == list(range(10))
        # A process counts as a worker from its first word on, which comes before its initializer.
        wait_until(lambda: {deed.pid for deed in deeds(log)} == made.workers(), what="it ran in each")
        assert len(deeds(log)) == SIZE
        if name == "prints-100-MB":
            made.printed(0)
