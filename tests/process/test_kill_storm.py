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
        for turn in range(5 if method == "spawn" else 8):
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


@pytest.mark.parametrize("method", METHODS)
def test_no_tiny_job_runs_twice_because_the_dispatcher_was_killed(method: str, tmp_path: Path) -> None:
    """They travel in bundles, and what has begun is in pages that outlive the dispatcher."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choose, log, jobs = random.Random(seed), tmp_path / "log", []
    with ProcessPool(2, start_method=method, timeout=PATIENCE) as pool:
        pool.submit(support.give, 0).result(PATIENCE)
        for _ in range(3):
            batch = [pool.submit(support.append, log, number) for number in range(len(jobs), len(jobs) + 1500)]
            jobs += batch
            batch[choose.randrange(1000)].exception(PATIENCE)
            support.kill_ours(pool.stats()["dispatcher"])
        errors = [job.exception(PATIENCE) for job in jobs]
    ran = Counter(map(int, support.lines(log)))
    assert set(ran.values()) == {1}
    assert {type(error) for error in errors} <= {WorkerLost, type(None)}
    assert not [number for number, error in enumerate(errors) if error is None and number not in ran]
    assert errors.count(None) > len(jobs) // 2
