"""SIGKILL for whoever it hits, again and again, under load: every job ends once, and the pool is whole afterwards."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import pytest
import support
from support import PATIENCE, wait_until

from mpworker import ProcessPool, WorkerLost

SIZE = 3
METHODS = ["fork", "forkserver", "spawn", "auto"]


def ours() -> dict[int, support.Process]:
    return {pid: process for pid, process in support.processes().items() if process.title.startswith("mpworker: ")}


@pytest.mark.parametrize("method", METHODS)
def test_every_job_ends_once(method: str, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choose, log, killed = random.Random(seed), tmp_path / "log", Counter[str]()
    with ProcessPool(SIZE, start_method=method) as pool:
        jobs = [pool.submit(support.note, log, -1, None)]
        jobs[0].result(PATIENCE)
        for turn in range(10):
            batch = [pool.submit(support.note, log, f"{turn}.{number}", None) for number in range(10)]
            jobs += batch
            wait(batch, PATIENCE, FIRST_COMPLETED)
            for process in choose.choices(list(ours().values()), k=choose.randrange(1, 3)):
                support.kill_ours(process.pid)
                killed[" ".join(process.title.split()[:2])] += 1
        errors = [job.exception(PATIENCE) for job in jobs]
        assert {type(error) for error in errors} <= {WorkerLost, type(None)}, killed
        assert wait_until(lambda: len(pool.stats()["workers"]) == SIZE, what="the pool is at full size")
        stats = pool.stats()
        assert (stats["done"], stats["lost"]) == (errors.count(None), len(jobs) - errors.count(None))
    finished = Counter(line.split()[1] for line in support.lines(log))
    assert errors.count(None) <= len(finished)
    wait_until(lambda: not ours(), what="nothing is left")
