"""Memory limits in the ledger: asked first, killed when that did not help, and never for what others have left."""

from __future__ import annotations

import signal
from math import inf

import pytest
from unit.test_ledger import World

from mpworker.pool import facts as f
from mpworker.pool.frames import Kind
from mpworker.pool.jobs import Lane
from mpworker.pool.quota import FAR_ABOVE, GRACE
from mpworker.states import JobState

LIMIT = 1000


@pytest.fixture(params=["its own", "the pool's"])
def world(request: pytest.FixtureRequest) -> World:
    """One worker that runs job 7, which may use ``LIMIT``."""
    world = World(1, memory_limit=0 if request.param == "its own" else LIMIT)
    world.get_ready(0)
    if request.param == "its own":
        world.tell(f.MemoryLimited(7, LIMIT))
    world.submit(7)
    world.begin(0)
    return world


def use(world: World, used: int, worker: int = 0, job: int = 7) -> list[object]:
    return world.tell(f.MemoryUsed(worker, job, used))


def test_only_jobs_with_a_limit_are_looked_at() -> None:
    world = World(2)
    world.get_ready(0)
    world.get_ready(1)
    world.submit(1)
    world.tell(f.MemoryLimited(2, LIMIT))
    world.submit(2)
    for worker in (0, 1):
        world.begin(worker)
    quota = world.ledger.quota
    assert [(job.id, job.memory) for _, job in quota.running()] == [(2, LIMIT)]
    owner = next(key for key, played in world.workers.items() if played.running and played.running.id == 2)
    world.end(owner)
    assert quota.running() == []
    assert not quota.watched


def test_without_any_limit_nobody_is() -> None:
    world = World(1)
    world.get_ready(0)
    world.submit(1)
    world.begin(0)
    assert not world.ledger.quota.watched


def test_a_jobs_own_limit_stands_before_the_pools() -> None:
    world = World(1, memory_limit=5)
    world.get_ready(0)
    world.tell(f.MemoryLimited(7, LIMIT))
    assert world.submit(7).memory == LIMIT
    assert world.submit(8).memory == 5
    assert world.submit(9, lane=Lane.HOOKS).memory == 0


def test_a_job_below_its_limit_is_left_alone(world: World) -> None:
    assert use(world, LIMIT) == []
    world.end(0)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]


def test_it_is_asked_once_and_killed_when_the_grace_is_over(world: World) -> None:
    assert use(world, LIMIT + 1) == [f.AskToShrink(0, 7, LIMIT, LIMIT + 1)]
    world.now += GRACE - 0.01
    assert use(world, LIMIT + 2) == []
    world.now += 0.01
    use(world, LIMIT + 3)
    assert world.workers[0].killed == 1
    assert use(world, LIMIT + 4) == []
    world.exit(0)
    told = {"state": "failed", "memory_limit": LIMIT, "used": LIMIT + 3}
    assert world.verdict(7) == (JobState.FAILED, told)
    world.settle()
    assert world.kinds(7) == [Kind.STARTED, Kind.ENDED]


def test_one_far_above_its_limit_is_asked_first_too_but_given_no_time(world: World) -> None:
    far = int(LIMIT * FAR_ABOVE) + 1
    assert use(world, far) == [f.AskToShrink(0, 7, LIMIT, far)]
    use(world, far)
    assert world.workers[0].killed == 1


def test_one_that_comes_below_may_go_on_and_is_asked_again(world: World) -> None:
    use(world, LIMIT + 1)
    world.now += GRACE / 2
    use(world, LIMIT)
    world.now += GRACE
    assert use(world, LIMIT + 1) == [f.AskToShrink(0, 7, LIMIT, LIMIT + 1)]
    assert not world.workers[0].killed
    world.end(0)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]


def test_what_earlier_jobs_left_is_not_counted(world: World) -> None:
    world.end(0)
    world.tell(f.MemoryLimited(8, LIMIT))
    world.submit(8)
    world.tell(f.MemoryKept(0, 5 * LIMIT))
    world.begin(0)
    assert use(world, 6 * LIMIT, job=8) == []
    assert use(world, 6 * LIMIT + 1, job=8) == [f.AskToShrink(0, 8, LIMIT, LIMIT + 1)]


def test_once_it_is_freed_it_excuses_nobody(world: World) -> None:
    world.tell(f.MemoryKept(0, 5 * LIMIT))
    world.end(0)
    world.tell(f.MemoryLimited(8, LIMIT))
    world.submit(8)
    world.tell(f.MemoryKept(0, 0))
    world.begin(0)
    assert use(world, LIMIT + 1, job=8) == [f.AskToShrink(0, 8, LIMIT, LIMIT + 1)]


def test_a_figure_for_a_job_that_has_ended_is_late(world: World) -> None:
    use(world, LIMIT + 1)
    world.end(0)
    world.now += GRACE
    assert use(world, LIMIT + 1) == []
    assert world.ledger.late == 1


def test_an_end_that_crosses_the_kill_is_the_kills(world: World) -> None:
    use(world, LIMIT + 1)
    world.now += GRACE
    use(world, LIMIT + 1)
    world.end(0)
    assert world.verdict(7)[0] is JobState.FAILED
    world.exit(0)
    assert world.kinds(7) == [Kind.STARTED, Kind.ENDED]


def test_one_that_the_asking_itself_has_ended_was_too_big_all_the_same(world: World) -> None:
    use(world, LIMIT + 1)
    world.exit(0, None, signal.SIGUSR1)
    assert world.verdict(7) == (JobState.FAILED, {"state": "failed", "memory_limit": LIMIT, "used": LIMIT + 1})


def test_a_dead_workers_job_is_not_looked_at_any_more(world: World) -> None:
    world.exit(0)
    assert world.ledger.quota.running() == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_death_is_told_with_memory_run_time_and_cause(world: World, killed: bool) -> None:
    use(world, LIMIT - 1)
    world.now += 2.5
    if killed:
        world.tell(f.WorkerFaulty(0, "it closed its line"))
        world.now = min(world.ledger.next_deadline(), inf)
        world.tell(f.Ticked())
    begun = world.ledger.jobs[7].started
    del world.workers[0]
    world.tell(f.WorkerGone(0, None, 9, 5000, oom=True))
    state, told = world.verdict(7)
    assert state is JobState.LOST
    assert (told["rss"], told["max_rss"], told["runtime"]) == (LIMIT - 1, 5000, world.now - begun)
    assert told["oom_killed"] == (not killed)
