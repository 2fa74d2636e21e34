"""What the kernel tells of memory, and how it is read: at a modest pace, without accusing the wrong one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from math import inf
from pathlib import Path

import pytest

from mpworker.pool import memory
from mpworker.pool import sampler as sampling
from mpworker.pool.facts import MemoryUsed
from mpworker.pool.jobs import Job, Lane, Worker
from mpworker.pool.memory import OomCounter
from mpworker.pool.sampler import Sampler

NOW = time.monotonic()


def test_a_process_has_a_size() -> None:
    assert memory.can_tell()
    assert 1 << 20 < memory.resident() < 1 << 36
    assert memory.resident(os.getpid()) == pytest.approx(memory.resident(), rel=0.2)
    assert memory.resident(1 << 30) == 0


def test_everybody_is_found_with_group_start_and_size() -> None:
    begun = sampling._since_boot()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as child:
        found = {pid: rest for pid, *rest in memory.members()}
        group, started, size = found[child.pid]
        assert group == child.pid
        assert begun - 0.02 <= started <= sampling._since_boot()
        assert size >= 0
        assert found[os.getpid()][0] == os.getpgrp()
        child.communicate(b"\n", timeout=30)


class Kernel:
    """What ``/proc`` would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: dict[object, int] = {}
        #: pid, group, start, size
        self.others: list[tuple[int, int, float, int]] = []
        self.scans = 0
        monkeypatch.setattr(sampling, "resident", lambda pid="self": self.sizes.get(pid, 0))
        monkeypatch.setattr(sampling, "members", self.members)
        monkeypatch.setattr(sampling, "_since_boot", lambda: NOW)

    def members(self) -> Iterator[tuple[int, int, float, int]]:
        self.scans += 1
        return iter([*((pid, pid, 0.0, size) for pid, size in self.sizes.items()), *self.others])  # type: ignore[misc]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def running(worker: int, job: int, limit: int, age: float) -> tuple[Worker, Job]:
    return Worker(worker, worker, Lane.TASKS, pid=100 + worker), Job(job, memory=limit, started=NOW - age)


def test_the_group_counts_but_not_who_was_there_before_the_job(kernel: Kernel) -> None:
    kernel.sizes = {100: 50, 101: 70}
    kernel.others = [(7, 100, NOW - 1.0, 20), (8, 100, NOW - 9.0, 400), (9, 55, NOW - 1.0, 800)]
    found = Sampler().look([running(0, 1, 1000, age=5.0), running(1, 2, 1000, age=5.0)], NOW)
    assert found == [MemoryUsed(0, 1, 70), MemoryUsed(1, 2, 70)]


def test_young_jobs_cost_no_look_at_all_processes(kernel: Kernel) -> None:
    kernel.sizes = {100: 50}
    assert Sampler().look([running(0, 1, 1000, age=0.1)], NOW) == [MemoryUsed(0, 1, 50)]
    assert not kernel.scans


def test_nobody_is_accused_of_what_others_held_a_while_ago(kernel: Kernel) -> None:
    sampler, jobs = Sampler(), [running(0, 1, 60, age=5.0)]
    kernel.sizes, kernel.others = {100: 50}, [(7, 100, NOW, 20)]
    now = time.monotonic()
    assert sampler.look(jobs, now) == [MemoryUsed(0, 1, 70)]
    assert sampler.look(jobs, time.monotonic()) == []
    assert kernel.scans == 1
    kernel.sizes = {100: 61}
    assert sampler.look(jobs, time.monotonic()) == [MemoryUsed(0, 1, 81)]
    kernel.sizes, kernel.others = {100: 50}, []
    assert sampler.look(jobs, now + 10.0) == [MemoryUsed(0, 1, 50)]


def test_a_process_that_is_gone_has_no_figure(kernel: Kernel) -> None:
    assert Sampler().look([running(0, 1, 1000, age=0.1)], NOW) == []


@pytest.mark.parametrize(("size", "pause"), [(10, sampling.CALM), (600, sampling.ALERT)])
def test_who_is_near_the_limit_is_looked_at_more_often(kernel: Kernel, size: int, pause: float) -> None:
    sampler = Sampler()
    kernel.sizes = {100: size}
    begun = time.monotonic()
    sampler.look([running(0, 1, 1000, age=0.1)], begun)
    assert begun + pause <= sampler.due <= time.monotonic() + 2 * pause


def test_looking_at_many_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))  # each look at the clock costs a second
    sampler = Sampler()
    monkeypatch.setattr(sampling.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sampling, "members", lambda: iter(()))
    sampler.look([running(0, 1, 1000, age=0.1)], NOW)
    assert sampler.due >= 1.0 / 0.02


# -- the out-of-memory killer ----------------------------------------------------------------------------------------


def test_each_strike_is_one_death() -> None:
    count = 5
    counter = OomCounter(lambda: count)
    assert not counter.claims(NOW)
    count = 7
    assert [counter.claims(NOW) for _ in range(3)] == [True, True, False]


def test_a_strike_of_long_ago_is_forgotten_but_not_that_of_just_now() -> None:
    count = 5
    counter = OomCounter(lambda: count)
    count = 6
    counter.forget(NOW)
    assert not counter.claims(NOW)
    count = 8  # two at once: the first one is replaced before the second is found
    assert counter.claims(NOW)
    counter.forget(NOW + 0.1)
    assert counter.claims(NOW + 0.2)
    count = 9
    counter.forget(NOW + 60.0)
    assert not counter.claims(NOW + 60.0)


def test_where_the_kernel_does_not_count_nothing_is_claimed() -> None:
    counter = OomCounter(lambda: None)
    counter.forget(inf)
    assert not counter.claims(NOW)


@pytest.mark.parametrize(
    ("text", "kills"),
    [
        ("low 0\nhigh 0\nmax 3\noom 2\noom_kill 4\noom_group_kill 1\n", 4),
        ("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3),
        ("oom_kill_disable 0\nunder_oom 0\n", None),
        ("oom_kill many\n", None),
        (None, None),
    ],
)
def test_the_counts_of_both_kinds_of_control_groups_are_read(tmp_path: Path, text: str, kills: int | None) -> None:
    path = tmp_path / "memory.events"
    if text is not None:
        path.write_text(text)
    assert memory._kills_in(path) == kills


def test_the_nearest_counter_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = tmp_path / "near", tmp_path / "far"
    monkeypatch.setattr(memory, "_group_files", lambda: iter([near]))
    monkeypatch.setattr(memory, "_MACHINE", far)
    assert memory.kills_counter()() is None
    far.write_text("nr_free 1\noom_kill 7\n")
    assert memory.kills_counter()() == 7
    near.write_text("oom_kill 2\n")
    read = memory.kills_counter()
    assert read() == 2
    near.write_text("oom_kill 3\n")
    assert read() == 3
