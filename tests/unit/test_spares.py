"""A worker that will have to go gets a successor in time, which has no slot and no job before the other is gone."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from unit.test_ledger import World

from mpworker.pool import facts as f
from mpworker.pool.frames import Kind
from mpworker.pool.jobs import NO_SLOT
from mpworker.pool.lanes import LEAD, WORN


def made(world: World, **jobs: Any) -> World:
    """Its first workers are ready."""
    for worker in list(world.workers):
        world.get_ready(worker)
    return world


def spares(world: World) -> list[int]:
    return [key for key, played in world.workers.items() if played.slot == NO_SLOT]


def run_one(world: World, job: int, runtime: float = 1.0, rss: float = 0.0) -> None:
    world.submit(job)
    (worker,) = [key for key, played in world.workers.items() if played.inbox]
    world.begin(worker)
    world.end(worker, runtime=runtime, rss=rss)


def test_before_its_last_job_a_worker_gets_a_successor() -> None:
    world = made(World(1, max_tasks=9))
    for job in range(1, 4):
        run_one(world, job, runtime=LEAD / 5)
        assert not spares(world)
    run_one(world, 4, runtime=LEAD / 5)
    (spare,) = spares(world)
    for job in range(5, 9):
        run_one(world, job, runtime=LEAD / 5)
    world.submit(9)
    world.submit(10)
    world.begin(0)
    world.end(0)
    assert world.workers[0].leaving
    assert [played.slot for played in world.workers.values()] == [0, NO_SLOT]
    del world.workers[0]
    assert world.tell(f.WorkerGone(0, 0, None, None)) == [f.Promote(spare, 0)]
    world.get_ready(spare)
    assert [job.id for job in world.workers[spare].inbox] == [10]


def test_tiny_jobs_need_it_earlier() -> None:
    world = made(World(1, max_tasks=100))
    run_one(world, 1, runtime=LEAD / 1000)
    assert len(spares(world)) == 1


def test_with_one_job_for_each_there_is_one_from_the_start() -> None:
    assert len(spares(made(World(3, max_tasks=1)))) == 1


@pytest.mark.parametrize("rss", [1000 * WORN, 1000 * WORN + 1, 1001])
@pytest.mark.parametrize("together", [False, True])
def test_memory_calls_for_one_too(rss: float, together: bool) -> None:
    world = made(World(1, max_memory=1000))
    world.submit(1)
    if together:
        world.run(0, rss=rss)
    else:
        world.begin(0)
        world.end(0, rss=rss)
    assert len(spares(world)) == (rss > 1000 * WORN)
    assert world.workers[0].leaving == (rss > 1000)


def test_the_first_who_leaves_is_followed_and_there_are_never_two_spares() -> None:
    world = made(World(3, max_tasks=1))
    (spare,) = spares(world)
    for job in range(1, 4):
        world.submit(job)
    for worker in range(3):
        world.begin(worker)
        world.end(worker)
    for worker in (2, 0, 1):
        world.exit(worker, 0, None)
    # The first one to go is followed by the spare, the others by fresh ones.
    assert world.workers[spare].slot == 2
    assert sorted(played.slot for played in world.workers.values()) == [0, 1, 2]


@pytest.mark.parametrize("limits", [{"max_tasks": 2, "warm": False}, {"max_memory": 100, "warm": False}, {}])
def test_without_a_reason_there_is_none(limits: dict[str, Any]) -> None:
    world = made(World(1, **limits))
    for job in range(1, 6):
        run_one(world, job, rss=99.0)
        world.settle()
        assert not spares(world)


def test_a_spare_stands_in_for_one_that_has_died() -> None:
    world = made(World(2, max_tasks=1))
    (spare,) = spares(world)
    world.exit(1)
    assert world.workers[spare].slot == 1


def test_a_spare_that_dies_costs_nothing_and_another_one_comes() -> None:
    world = made(World(1, max_tasks=2))
    run_one(world, 1)
    (spare,) = spares(world)
    world.exit(spare, None, signal.SIGKILL)
    assert not spares(world)
    run_one(world, 2)
    world.settle()
    run_one(world, 3)
    world.settle()
    assert world.kinds(3) == [Kind.STARTED, Kind.DONE]


def test_a_spare_whose_line_is_broken_is_no_successor() -> None:
    world = made(World(1, max_tasks=1))
    (spare,) = spares(world)
    world.tell(f.WorkerFaulty(spare, "it closed its line"))
    run_one(world, 1)
    world.exit(0, 0, None)
    assert world.workers[spare].slot == NO_SLOT
    assert 0 in [played.slot for played in world.workers.values()]
    world.settle()
    assert spare not in world.workers


@pytest.mark.parametrize("end", [f.Draining, f.Stopping])
def test_it_leaves_with_the_others(end: type) -> None:
    world = made(World(2, max_tasks=1))
    assert spares(world)
    world.tell(end())
    world.settle()
    assert world.finished
    assert not world.workers


def test_a_pool_that_drains_prepares_nobody_in_vain() -> None:
    world = made(World(1, max_tasks=2))
    world.submit(1)
    world.tell(f.Draining())
    world.begin(0)
    world.end(0)
    assert not spares(world)
    world.settle()
    assert world.finished
