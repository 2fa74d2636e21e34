"""Processes that are stopped for longer than a limit, and go on: what passed its limit ends, nothing else breaks."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, TimeLimitExceeded

LIMIT = 0.5


def everybody_of(pool: ProcessPool) -> list[int]:
    dispatcher = pool.stats()["dispatcher"]
    return [dispatcher, *support.children_of(dispatcher, "mpworker: ")]


@pytest.mark.parametrize("who", ["dispatcher", "all"])
def test_a_node_that_was_stopped_goes_on(who: str, tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    limited_here = Signpost(tmp_path / "limited")
    with ProcessPool(2) as pool:
        pool.schedule(support.give, callback=partial(support.note, log, "first")).result(PATIENCE)
        wait_until(lambda: len(support.lines(log)) == 1, what="the callback process is there")
        patient = pool.submit(support.meet, here, go)
        here.wait()
        limited = pool.schedule(support.meet, (limited_here, Signpost(tmp_path / "never")), timeout=LIMIT)
        victim = int(limited_here.wait())
        processes = everybody_of(pool)
        stopped = processes if who == "all" else processes[:1]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            waiting = [pool.schedule(support.give, (n,), callback=partial(support.note, log, n)) for n in range(20)]
            if who == "dispatcher":  # it is not needed for that
                wait_until(lambda: not support.alive(victim), what="the watchdog ends the task")
            time.sleep(2.0)  # what the test is about: longer than the limit, the grace and the dispatcher's patience
            assert not limited.done()
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert isinstance(limited.exception(PATIENCE), TimeLimitExceeded)
        assert [future.result(PATIENCE) for future in waiting] == list(range(20))
        assert not patient.done()
        go.set()
        assert patient.result(PATIENCE) in processes
        wait_until(lambda: len(support.lines(log)) == 21, what="every callback has run, once")
        stats = pool.stats()
        assert (stats["dispatcher"], stats["timed_out"], stats["lost"]) == (processes[0], 1, 0)
