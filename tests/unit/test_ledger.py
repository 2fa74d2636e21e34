"""The ledger alone: late, doubled and contradicting events, one by one; ``test_ledger_machine.py`` has all at once."""

from __future__ import annotations

import signal
from array import array
from collections import Counter
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import pytest

from mpworker.pool import facts as f
from mpworker.pool import ledger
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.jobs import NO_SLOT, Job, Lane, Span
from mpworker.pool.ledger import GUARD_GRACE, Ledger
from mpworker.pool.parcel import Outcome, open_verdict
from mpworker.states import JobState

ENDS = (Kind.DONE, Kind.ENDED)


@dataclass
class Played:
    """A worker process as the test plays it."""

    slot: int
    lane: Lane
    ready: bool = False
    inbox: list[Job] = field(default_factory=list)
    running: Job | None = None
    leaving: bool = False
    killed: int = 0
    done: int = 0


class World:
    """A ledger, a clock, and processes that do what the actions say; checks each action as it comes."""

    def __init__(self, size: int = 2, **limits: Any) -> None:
        self.ledger = Ledger(size, 60.0, 5.0, **limits)
        self.size, self.now = size, 1000.0
        self.max_tasks = limits.get("max_tasks") or inf
        self.workers: dict[int, Played] = {}
        self.frames: list[Frame] = []
        self.ends: Counter[int] = Counter()
        self.hook_ends: Counter[int] = Counter()
        self.finished = False
        self.tell(f.Begun())

    def tell(self, event: Any) -> list[Any]:
        actions = self.ledger.apply(event, self.now)
        for action in actions:
            getattr(self, f"_{type(action).__name__.lower()}")(action)
        return actions

    def _spawn(self, action: f.Spawn) -> None:
        assert action.worker not in self.workers
        assert not self.finished
        if action.slot == NO_SLOT:
            assert action.lane is Lane.TASKS
            assert not [w for w in self.workers.values() if w.slot == NO_SLOT], "two spares"
            self.workers[action.worker] = Played(action.slot, action.lane)
            return
        self._take_slot(action)
        self.workers[action.worker] = Played(action.slot, action.lane)

    def _reload(self, action: f.Reload) -> None:
        assert action.boot

    def _promote(self, action: f.Promote) -> None:
        spare = self.workers[action.worker]
        assert (spare.slot, spare.ready, spare.killed) == (NO_SLOT, False, 0)
        self._take_slot(f.Spawn(action.worker, action.slot, spare.lane))
        spare.slot = action.slot

    def _take_slot(self, action: f.Spawn) -> None:
        # One that not even SIGKILL ends is given up, and its slot with it.
        slots = {w.slot for w in self.workers.values() if w.lane == action.lane and w.killed < 2}
        assert action.slot not in slots, "two workers share a slot"
        assert action.slot < (self.size if action.lane is Lane.TASKS else 1), "more workers than asked for"

    def _assign(self, action: f.Assign) -> None:
        worker = self.workers[action.worker]
        assert worker.ready
        assert not worker.leaving
        assert worker.lane is action.job.lane
        assert worker.slot != NO_SLOT, "a spare gets a job"
        held = worker.done + len(worker.inbox) + (worker.running is not None)
        assert worker.lane is Lane.HOOKS or held < self.max_tasks, "more jobs than a worker may run"
        assert not self.ends[action.job.id], "a job that has ended is given out"
        assert not any(action.job in other.inbox or other.running is action.job for other in self.workers.values())
        worker.inbox.append(action.job)

    def _dismiss(self, action: f.Dismiss) -> None:
        worker = self.workers[action.worker]
        assert not worker.inbox
        assert worker.running is None
        worker.leaving = True

    def _signal(self, action: f.Signal) -> None:
        worker = self.workers[action.worker]
        if worker.running is not None and worker.running.id == action.job:
            worker.killed += action.signum not in (0, signal.SIGUSR1)

    def _kill(self, action: f.Kill) -> None:
        if action.worker in self.workers:  # it may be that its exit is not known to the ledger yet
            self.workers[action.worker].killed += 1

    def _asktoshrink(self, action: f.AskToShrink) -> None:
        job = self.workers[action.worker].running
        assert job is not None
        assert job.id == action.job
        assert action.used > action.limit

    def _tell(self, action: f.Tell) -> None:
        frame = action.frame
        assert not self.finished, "something follows the end"
        self.frames.append(frame)
        if frame.kind in ENDS:
            self.ends[frame.job] += 1
            assert self.ends[frame.job] == 1, "a job has two ends"
        elif frame.kind is Kind.HOOK_ENDED:
            self.hook_ends[frame.job] += 1
        assert frame.kind is not Kind.BROKEN, frame.body

    def _finish(self, action: f.Finish) -> None:
        self.finished = True

    # -- what processes do ---------------------------------------------------------------------------------------

    def submit(self, job: int, **more: Any) -> Job:
        made = Job(job, **more)
        self.tell(f.Submitted(made))
        return made

    def get_ready(self, worker: int) -> None:
        self.workers[worker].ready = True
        self.tell(f.WorkerReady(worker, 100 + worker))

    def begin(self, worker: int) -> None:
        played = self.workers[worker]
        played.running = played.inbox.pop(0)
        self.tell(f.JobStarted(worker, played.running.id, self.now))

    def end(self, worker: int, flag: Outcome = Outcome.VALUE, runtime: float = 0.00001, rss: float = 0.0) -> None:
        job, self.workers[worker].running = self.workers[worker].running, None
        self.workers[worker].done += 1
        assert job is not None
        self.tell(f.JobDone(worker, job.id, flag, b"body", runtime, rss))

    def run(self, worker: int, flag: Outcome = Outcome.VALUE, rss: float = 0.0) -> None:
        """Begins and ends one job, and both are heard together."""
        job = self.workers[worker].inbox.pop(0)
        self.workers[worker].done += 1
        self.tell(f.JobRan(worker, job.id, self.now, flag, b"body", 0.00001, rss))

    def hand_back(self, worker: int) -> None:
        self.tell(f.JobReturned(worker, self.workers[worker].inbox.pop().id))

    def exit(self, worker: int, code: int | None = None, signum: int | None = signal.SIGKILL) -> None:
        del self.workers[worker]
        self.tell(f.WorkerGone(worker, code, signum, 1 << 20))

    def step(self, worker: int) -> None:
        """One worker does the next thing that a good one does."""
        played = self.workers[worker]
        if played.killed:
            self.exit(worker)
        elif not played.ready:
            if played.slot != NO_SLOT:
                self.get_ready(worker)
        elif played.running is not None:
            self.end(worker)
        elif played.inbox:
            self.begin(worker)
        elif played.leaving:
            self.exit(worker, 0, None)

    def settle(self) -> None:
        """Lets everybody work until nothing moves any more."""
        for _ in range(10_000):
            before = len(self.frames), {key: vars(worker).copy() for key, worker in self.workers.items()}
            for worker in list(self.workers):
                self.step(worker)
            deadline = self.ledger.next_deadline()
            after = len(self.frames), {key: vars(worker).copy() for key, worker in self.workers.items()}
            if before == after:
                if deadline == inf or self.finished:
                    return
                self.now = max(self.now, deadline)
                self.tell(f.Ticked())
        raise AssertionError("it never comes to rest")

    def verdict(self, job: int) -> tuple[JobState, dict[str, Any]]:
        (frame,) = [frame for frame in self.frames if frame.kind is Kind.ENDED and frame.job == job]
        return open_verdict(frame.body)

    def kinds(self, job: int) -> list[Kind]:
        return [frame.kind for frame in self.frames if frame.job == job and frame.kind is not Kind.LOG]


@pytest.fixture
def world() -> World:
    world = World(1)
    world.get_ready(0)
    return world


def test_a_job_is_given_out_starts_and_ends(world: World) -> None:
    world.submit(7)
    world.begin(0)
    world.end(0)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]
    assert world.ledger.late == 0


@pytest.mark.parametrize("again", ["done", "started", "returned", "expired", "progressed", "cut", "cancelled"])
def test_what_comes_after_the_end_is_counted_and_dropped(world: World, again: str) -> None:
    world.submit(7, hard=1.0, hooks=b"hooks")
    world.begin(0)
    world.end(0)
    before = len(world.frames)
    event = {
        "done": f.JobDone(0, 7, Outcome.VALUE, b"", 0.0, 0.0),
        "started": f.JobStarted(0, 7, world.now),
        "returned": f.JobReturned(0, 7),
        "expired": f.JobExpired(0, 7),
        "progressed": f.JobProgressed(0, 7, 1.0, 2.0, b""),
        "cut": f.JobCut(0, 7, b""),
        "cancelled": f.Cancelled(7, signal.SIGTERM, 0.5),
    }[again]
    assert world.tell(event) == []
    assert len(world.frames) == before
    assert world.ledger.late == 1


def test_a_worker_speaks_only_for_its_own_job() -> None:
    world = World(2)
    world.get_ready(0)
    world.get_ready(1)
    world.submit(7)
    (owner,) = [key for key, worker in world.workers.items() if worker.inbox]
    world.begin(owner)
    for event in (
        f.JobDone(1 - owner, 7, Outcome.VALUE, b"forged", 0.0, 0.0),
        f.JobStarted(1 - owner, 7, world.now),
        f.JobReturned(1 - owner, 7),
        f.JobExpired(1 - owner, 7),
        f.JobDone(99, 7, Outcome.VALUE, b"forged", 0.0, 0.0),
        f.WorkerGone(99, 1, None, None),
        f.WorkerReady(99, 1),
        f.WorkerFaulty(99, "?"),
        f.HookCalled(1 - owner, 7, 0, b"", b""),
        f.JobProgressed(1 - owner, 7, 1.0, 2.0, b""),
        f.JobCut(1 - owner, 7, b""),
    ):
        assert world.tell(event) == []
    world.end(owner)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]


def test_a_death_costs_the_running_job_and_the_others_keep_their_order(world: World) -> None:
    world.submit(1)
    world.begin(0)
    world.end(0)
    for job in range(2, 30):
        world.submit(job)
    world.begin(0)
    lost = 2
    assert world.workers[0].inbox == [] or lost not in [job.id for job in world.workers[0].inbox]
    world.exit(0, None, signal.SIGSEGV)
    state, told = world.verdict(lost)
    assert state is JobState.LOST
    assert (told["pid"], told["signal"], told["exitcode"], told["by_pool"]) == (100, signal.SIGSEGV, None, False)
    world.settle()
    assert [frame.job for frame in world.frames if frame.kind is Kind.STARTED] == list(range(1, 30))


def test_the_dispatchers_own_limit_climbs_the_ladder(world: World) -> None:
    world.submit(7, hard=2.0)
    world.begin(0)
    assert world.ledger.next_deadline() == world.now + 2.0 + GUARD_GRACE
    world.now += 2.0 + GUARD_GRACE
    assert f.Kill(0, signal.SIGTERM) in world.tell(f.Ticked())
    world.now = world.ledger.next_deadline()
    assert f.Kill(0, signal.SIGKILL) in world.tell(f.Ticked())
    world.exit(0)
    assert world.verdict(7)[0] is JobState.TIMED_OUT


def test_whoever_cannot_be_killed_is_heard_out_before_its_jobs_go_elsewhere(world: World) -> None:
    """An uninterruptible wait in the kernel: what it had done before must not be done again."""
    world.submit(7, hard=2.0)
    world.begin(0)
    for _ in range(2):
        world.now = world.ledger.next_deadline()
        world.tell(f.Ticked())
    world.now = world.ledger.next_deadline()
    assert world.ledger.apply(f.Ticked(), world.now) == [f.Abandon(0)]
    assert world.ledger.apply(f.Ticked(), world.now) == []
    world.exit(0)
    assert world.verdict(7)[0] is JobState.TIMED_OUT


def test_what_a_dead_worker_had_begun_is_lost_and_the_rest_runs_elsewhere(world: World) -> None:
    """Nobody could read how those had ended, such as behind garbage."""
    span = Span(1, 0.0, 0.0, array("I", [1] * 4), b"abcd")
    for number in range(100, 130):  # now it is known that they are quick, and several go together
        world.submit(number)
        world.run(0)
    (given,) = world.ledger.apply(f.BundleSubmitted(span), world.now)
    assert given.job.ids == span.ids
    actions = world.ledger.apply(f.WorkerGone(0, 70, None, None, begun=[129, 5, 1, 2]), world.now)
    told = {action.frame.job: open_verdict(action.frame.body) for action in actions if type(action) is f.Tell}
    assert [(job, state) for job, (state, _) in sorted(told.items())] == [(1, JobState.LOST), (2, JobState.LOST)]
    assert {(facts["exitcode"], facts["runtime"]) for _, facts in told.values()} == {(70, None)}
    assert {type(job) for job in world.ledger.jobs.values()} <= {Job}
    assert sorted(world.ledger.jobs) == [3, 4]


def test_a_restart_replaces_everybody_once_his_job_is_done() -> None:
    world = World(2)
    world.tell(f.Begun())
    world.get_ready(0)
    world.get_ready(1)
    world.submit(1)
    (busy,) = (worker for worker, played in world.workers.items() if played.inbox)
    idle = 1 - busy
    world.begin(busy)
    assert world.tell(f.Restarting(b"new"))[0] == f.Reload(b"new")
    assert world.workers[idle].leaving
    assert not world.workers[busy].leaving
    world.submit(2)
    assert not world.workers[busy].inbox
    world.exit(idle, 0, None)
    (new,) = set(world.workers) - {0, 1}
    world.get_ready(new)
    assert [job.id for job in world.workers[new].inbox] == [2]
    world.end(busy)
    assert world.workers[busy].leaving


def test_a_restart_ends_whoever_loads_what_was_there_before() -> None:
    world = World(1)
    world.tell(f.Begun())
    (young,) = world.workers
    assert f.Kill(young, signal.SIGTERM) in world.tell(f.Restarting(b""))
    world.tell(f.Draining())
    assert world.tell(f.Restarting(b"new")) == []


def test_the_watchdogs_word_comes_before_the_exit(world: World) -> None:
    world.submit(7, hard=2.0)
    world.begin(0)
    world.now += 2.0
    world.tell(f.JobExpired(0, 7, "line 12"))
    world.exit(0, None, signal.SIGTERM)
    assert world.verdict(7) == (JobState.TIMED_OUT, {"state": "timed_out", "limit": 2.0, "stack": "line 12"})


@pytest.mark.parametrize("first", ["cancel", "limit"])
def test_the_first_reason_stands(world: World, first: str) -> None:
    world.submit(7, hard=2.0)
    world.begin(0)
    events = [f.Cancelled(7, signal.SIGTERM, 0.5), f.JobExpired(0, 7)]
    for event in events if first == "cancel" else reversed(events):
        world.tell(event)
    world.exit(0)
    assert world.verdict(7)[0] is (JobState.CANCELLED if first == "cancel" else JobState.TIMED_OUT)


def test_an_end_that_crosses_its_cancel_is_a_cancelled_job(world: World) -> None:
    world.submit(7)
    world.begin(0)
    world.tell(f.Cancelled(7, signal.SIGTERM, 0.5))
    world.end(0)
    assert world.verdict(7)[0] is JobState.CANCELLED


def test_cancelling_a_job_in_an_inbox_takes_it_back(world: World) -> None:
    world.submit(7)
    (signalled,) = [a for a in world.tell(f.Cancelled(7, signal.SIGTERM, 0.5)) if isinstance(a, f.Signal)]
    assert signalled == f.Signal(0, 7, signal.SIGTERM)
    world.hand_back(0)
    assert world.verdict(7)[0] is JobState.CANCELLED
    assert world.kinds(7) == [Kind.ENDED]


def test_a_job_that_comes_back_starts_elsewhere() -> None:
    world = World(2)
    world.get_ready(0)
    world.submit(7)
    world.get_ready(1)
    world.hand_back(0)
    world.settle()
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]


def test_a_ready_worker_that_does_not_start_its_job_is_killed_and_the_job_starts_elsewhere(world: World) -> None:
    world.submit(7)
    stuck = world.workers[0]
    world.now = world.ledger.next_deadline()
    world.tell(f.Ticked())
    assert stuck.killed == 1
    world.exit(0)
    world.settle()
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]


def test_workers_that_never_get_ready_break_the_pool_after_a_few_tries() -> None:
    ledger = Ledger(1, 60.0, 5.0)
    now, told = 0.0, ledger.apply(f.Begun(), 0.0)
    actions = told
    for _ in range(40):
        spawned = [action for action in actions if isinstance(action, f.Spawn)]
        if spawned:
            actions = ledger.apply(f.WorkerGone(spawned[0].worker, 1, None, None), now)
        elif (now := ledger.next_deadline()) < inf:
            actions = ledger.apply(f.Ticked(), now)
        else:
            break
        told = told + actions
        if any(isinstance(action, f.Finish) for action in actions):
            break
    assert 1 < sum(isinstance(action, f.Spawn) for action in told) < 10
    assert now > 0.0, "it waited between the tries"
    (broken,) = [action.frame for action in told if isinstance(action, f.Tell) and action.frame.kind is Kind.BROKEN]
    assert b"code 1" in broken.body


def test_the_same_events_give_the_same_actions() -> None:
    def run() -> list[str]:
        world, told = World(2), []
        world.get_ready(0)
        for job in range(1, 6):
            told += world.tell(f.Submitted(Job(job, hooks=b"h")))
        world.begin(0)
        del world.workers[0]
        told += world.tell(f.WorkerGone(0, 1, None, None))
        told += world.tell(f.Draining())
        return [f"{type(action).__name__} {getattr(action, 'worker', '')}" for action in told]

    assert run() == run()


def test_a_pause_holds_jobs_back_and_its_end_lets_them_go(world: World) -> None:
    world.tell(f.Paused(True))
    world.submit(7)
    assert not world.workers[0].inbox
    world.tell(f.Paused(False))
    assert [job.id for job in world.workers[0].inbox] == [7]


def test_a_parent_that_does_not_read_is_told_of_no_progress_but_of_cuts(world: World) -> None:
    world.submit(7)
    world.begin(0)
    for full in (False, True, False):
        world.tell(f.Paused(full))
        told = [action.frame for action in world.tell(f.JobProgressed(0, 7, 1.0, 2.0, b"text"))]
        assert told == ([] if full else [Frame(Kind.PROGRESS, 7, 0, 1.0, 2.0, b"", b"text")])
        told = [action.frame for action in world.tell(f.JobCut(0, 7, b"report"))]
        assert told == [Frame(Kind.CUT, 7, body=b"report")]  # nobody else knows of what is cut off


def test_no_task_starts_while_outcomes_pile_up_before_the_callback_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "HOOKS_HIGH_WATER", 3000)
    for job in range(1, 9):
        world.submit(job, hooks=b"hooks")
    while world.workers[0].inbox:
        world.begin(0)
        world.end(0, runtime=1.0)
    assert sum(world.ends.values()) == 3
    world.settle()
    assert world.ends == world.hook_ends == dict.fromkeys(range(1, 9), 1)


@pytest.mark.parametrize("hooks", [b"", b"hooks"])
@pytest.mark.parametrize("how", ["cancelled", "flushed"])
@pytest.mark.parametrize("ready", [False, True])
def test_a_job_that_ended_while_it_waited_keeps_no_draining_pool_alive(hooks: bytes, how: str, ready: bool) -> None:
    world = World(2)
    if ready:
        world.tell(f.Paused(True))
        for worker in list(world.workers):
            world.get_ready(worker)
    for job in range(1, 6):
        world.submit(job, hooks=hooks)
    for job in range(1, 6) if how == "cancelled" else ():
        world.tell(f.Cancelled(job, signal.SIGTERM, 0.5))
    world.tell(f.FlushAsked(1))
    world.tell(f.Draining())
    world.settle()
    assert world.finished
    assert world.hook_ends == (dict.fromkeys(range(1, 6), 1) if hooks else {})


def test_who_takes_back_what_has_not_started_has_heard_of_what_has() -> None:
    world = World(1)
    world.get_ready(0)
    world.submit(1)
    world.tell(f.FlushAsked(7))
    assert all(frame.kind is not Kind.FLUSHED for frame in world.frames)
    world.begin(0)
    assert [frame.kind for frame in world.frames[-2:]] == [Kind.STARTED, Kind.FLUSHED]


@pytest.mark.parametrize("ready", [0, 1])
def test_stopping_while_workers_start_is_no_boot_failure(ready: int) -> None:
    world = World(7)
    for worker in range(ready):
        world.get_ready(worker)
    world.submit(1, hooks=b"hooks")
    world.tell(f.Stopping())
    world.settle()
    assert world.frames[-1].kind is Kind.BYE
    assert world.ends == world.hook_ends == {1: 1}


def test_fewer_workers_are_fewer_workers() -> None:
    """The busy ones have the high slots, so the low ones leave; nobody may come in their place."""
    world = World(4)
    for worker in range(4):
        world.get_ready(worker)
    world.submit(1)
    world.submit(2)
    for worker in [key for key, played in world.workers.items() if played.inbox]:
        world.begin(worker)
    world.tell(f.Resized(2))
    for _ in range(5):
        for worker in [key for key, played in world.workers.items() if played.running is None]:
            world.step(worker)
    assert len(world.workers) == 2
    world.size = 4
    world.tell(f.Resized(4))
    assert len(world.workers) == 4


def test_a_job_that_is_submitted_twice_runs_once(world: World) -> None:
    world.submit(7)
    world.submit(7)
    world.begin(0)
    world.submit(7)
    world.end(0)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]
    assert not world.workers[0].inbox


@pytest.mark.parametrize("lane", [Lane.TASKS, Lane.HOOKS])
def test_replacements_that_cannot_start_do_not_end_a_pool_that_works(lane: Lane) -> None:
    world = World(2)
    world.get_ready(0)
    if lane is Lane.HOOKS:
        world.get_ready(1)
        world.submit(9, hooks=b"hooks")
        world.step(next(key for key, played in world.workers.items() if played.inbox))
        world.step(next(key for key, played in world.workers.items() if played.running))
    world.submit(7)
    (busy,) = [key for key, played in world.workers.items() if played.inbox]
    world.begin(busy)
    tries = 0
    while world.now < 1100.0:
        for starting in [key for key, played in world.workers.items() if not played.ready]:
            world.exit(starting, None, None)
            tries += 1
        world.now = max(world.now + 0.1, min(world.ledger.next_deadline(), world.now + 1.0))
        world.tell(f.Ticked())
    assert 5 < tries < 60, "it goes on trying, and not too often"
    world.end(busy)
    assert world.kinds(7) == [Kind.STARTED, Kind.DONE]
    assert lane is Lane.TASKS or world.hook_ends == {9: 1}


@pytest.mark.parametrize("hooks", [b"", b"hooks"])
@pytest.mark.parametrize("flag", [Outcome.VALUE, Outcome.ERROR])
@pytest.mark.parametrize("limits", [{}, {"max_tasks": 2}, {"max_memory": 100}])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_start_and_an_end_mean_the_same_together(
    hooks: bytes, flag: Outcome, limits: dict[str, int], cancelled: bool
) -> None:
    worlds = World(1, **limits), World(1, **limits)
    for world, together in zip(worlds, (False, True), strict=True):
        world.get_ready(0)
        jobs = [world.submit(number, hooks=hooks, hard=5.0) for number in (1, 2)]
        if cancelled:
            world.tell(f.Cancelled(1, signal.SIGTERM, 0.5))
        if together:
            world.run(0, flag, 200.0)
        else:
            world.begin(0)
            world.end(0, flag, rss=200.0)
        assert jobs[0].state.terminal
    apart, joined = ([(x.kind, x.job, x.flag, x.body) for x in world.frames] for world in worlds)
    assert [x for x in apart if x[0] is not Kind.STARTED] == [x for x in joined if x[0] is not Kind.STARTED]
    assert [w.inbox[0].id if w.inbox else 0 for w in worlds[0].workers.values()] == [
        w.inbox[0].id if w.inbox else 0 for w in worlds[1].workers.values()
    ]


def test_a_task_that_began_just_before_its_worker_became_surplus_keeps_its_time() -> None:
    """The word that it began crosses the request to give it back; its worker leaves when it is done, however late."""
    world = World(2)
    for worker in (0, 1):
        world.get_ready(worker)
        world.submit(worker + 1)
    world.tell(f.Resized(1))
    world.begin(0)
    world.begin(1)
    assert world.ledger.next_deadline() == inf
    world.now += 1e6
    assert world.tell(f.Ticked()) == []
    world.end(0)
    world.end(1)
    assert [world.kinds(job) for job in (1, 2)] == [[Kind.STARTED, Kind.DONE]] * 2


def test_what_a_leaving_worker_neither_begins_nor_gives_back_is_begun_elsewhere() -> None:
    world = World(1, max_memory=100)
    world.get_ready(0)
    world.submit(1)
    world.begin(0)
    for job in range(2, 40):
        world.submit(job)
    world.end(0)
    assert len(world.workers[0].inbox) > 1, "they travel in a batch"
    world.begin(0)
    world.end(0, rss=200.0)  # it has grown too big; and now it says nothing any more
    world.now = world.ledger.next_deadline()
    assert world.now < inf
    assert f.Kill(0, signal.SIGTERM) in world.tell(f.Ticked())
    world.exit(0)
    world.settle()
    assert world.ends == dict.fromkeys(range(1, 40), 1)


def test_a_worker_that_begins_a_task_before_it_has_ended_another_is_ended(world: World) -> None:
    world.submit(1)
    world.begin(0)
    for job in range(2, 40):
        world.submit(job, hard=1.0)
    world.end(0)
    first, second = (job.id for job in world.workers[0].inbox[:2])
    world.tell(f.JobStarted(0, first, world.now))
    world.tell(f.JobStarted(0, second, world.now))
    world.now += GUARD_GRACE
    assert f.Kill(0, signal.SIGTERM) in world.tell(f.Ticked())
    world.exit(0, None, signal.SIGTERM)
    state, told = world.verdict(first)
    assert (state, told["by_pool"]) == (JobState.LOST, True)
    assert "before it had ended" in told["why"]
    world.settle()
    assert world.kinds(second) == [Kind.STARTED, Kind.DONE]


@pytest.mark.parametrize("at", [inf, nan, 1e300])
def test_no_worker_talks_itself_out_of_its_limit(world: World, at: float) -> None:
    world.submit(7, hard=2.0)
    world.tell(f.JobStarted(0, 7, at))
    assert world.ledger.next_deadline() == world.now + 2.0 + GUARD_GRACE


def test_a_leaving_worker_whose_line_is_broken_is_ended() -> None:
    """Nobody will hear of the task that it still runs."""
    world = World(1, max_tasks=1)
    world.get_ready(0)
    world.submit(1)
    world.begin(0)
    world.tell(f.Resized(0))
    world.tell(f.WorkerFaulty(0, "garbage"))
    world.now += GUARD_GRACE
    assert f.Kill(0, signal.SIGTERM) in world.tell(f.Ticked())
    world.exit(0)
    assert world.verdict(1)[0] is JobState.LOST


def test_a_worker_that_asks_to_leave_ends_its_job_and_runs_no_other(world: World) -> None:
    world.submit(1)
    world.begin(0)
    world.submit(2)
    world.tell(f.WorkerWorn(0))
    world.tell(f.WorkerWorn(0))
    while world.workers[0].inbox:
        world.hand_back(0)
    world.end(0)
    assert world.kinds(1)[-1] is Kind.DONE
    assert world.workers[0].leaving
    world.exit(0, 0, None)
    (other,) = world.workers
    world.get_ready(other)
    world.begin(other)
    world.end(other)
    assert world.kinds(2)[-1] is Kind.DONE
    assert not [frame for frame in world.frames if frame.kind is Kind.LOG]


def test_a_pool_that_is_stopped_before_its_application_is_loaded_starts_nobody_for_nothing() -> None:
    """But for the callbacks of what it was asked to do."""
    ledger = Ledger(3, 60.0, 5.0)
    ledger.apply(f.Submitted(Job(1, hooks=b"hooks")), 0.0)
    ledger.apply(f.Stopping(), 0.0)
    spawned = [action for action in ledger.apply(f.Begun(), 0.0) if isinstance(action, f.Spawn)]
    assert [action.lane for action in spawned] == [Lane.HOOKS]


def test_a_word_of_somebody_who_was_given_up_ends_no_pool(world: World) -> None:
    assert world.tell(f.WorkerUnready(99, "it cannot be loaded")) == []
    assert not world.finished


@pytest.mark.parametrize("runtime", [nan, inf, -1.0, 0.0, 5e-324])
def test_no_run_time_that_a_worker_makes_up_stops_the_work(world: World, runtime: float) -> None:
    for job in range(1, 30):
        world.submit(job)
    for _ in range(3):
        world.begin(0)
        world.end(0, runtime=runtime)
    world.settle()
    assert world.ends == dict.fromkeys(range(1, 30), 1)


def test_after_the_end_nothing_is_decided(world: World) -> None:
    world.tell(f.Draining())
    world.settle()
    assert world.finished
    assert world.tell(f.Submitted(Job(1))) == []
    assert world.tell(f.WorkerGone(0, 0, None, None)) == []
