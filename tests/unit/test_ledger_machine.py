"""The ledger as a state machine: any order of events, of honest workers and of liars, keeps every promise.

The machine plays the parent and every process. It believes what a worker says of the jobs that the worker holds, as the
ledger must, and nothing else. What the ledger decides is checked action by action, against the model alone: nothing
here looks inside the ledger.
"""

from __future__ import annotations

import functools
import os
import random
import signal
from array import array
from collections import Counter
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mpworker.pool import facts as f
from mpworker.pool import ledger as ledger_module
from mpworker.pool import page
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.jobs import NO_SLOT, Job, Lane, Span
from mpworker.pool.lanes import START_GRACE, UNKILLABLE
from mpworker.pool.ledger import GUARD_GRACE, Ledger
from mpworker.pool.page import results
from mpworker.pool.parcel import Outcome, open_verdict

READY_TIMEOUT, CALLBACK_LIMIT, MEMORY = 60.0, 5.0, 1000
GHOST = 9999  # a worker that there has never been
FATAL = (signal.SIGTERM, signal.SIGKILL)
LUCK = st.integers(0, 1000)


@dataclass(eq=False)
class Played:
    """A worker process as the test plays it."""

    id: int
    slot: int
    lane: Lane
    ready: bool = False
    inbox: list[Job] = field(default_factory=list)
    running: Job | None = None
    guard: float = inf
    begun: int = 0
    #: jobs that it was asked to give back
    asked: set[int] = field(default_factory=set)
    leaving: bool = False
    #: rungs of the kill ladder, and when the last one was
    kills: int = 0
    killed_at: float = inf
    #: its own watchdog has signalled its group
    shot: bool = False
    #: it has said so, because of the limit
    expired: bool = False
    #: it says nothing any more, or has contradicted itself
    faulty: bool = False
    #: it has been seen to hold more memory than it may
    over: bool = False
    #: stopped: only SIGKILL ends it
    frozen: bool = False
    #: in an uninterruptible wait: nothing ends it
    unkillable: bool = False

    @property
    def doomed(self) -> bool:
        return bool(self.kills or self.shot or self.faulty)

    def holds(self, job: int) -> bool:
        return any(job == held.id for held in [*self.inbox, *filter(None, [self.running])])

    def takes_out(self, job: int) -> Job | None:
        """The job, out of its inbox."""
        for held in self.inbox:
            if held.id == job:
                self.inbox.remove(held)
                return held
        return None


class World:
    """A ledger, a clock, the parent's requests and the processes."""

    def __init__(self, size: int, *, resumed: bool = False, **limits: Any) -> None:
        self.ledger = Ledger(size, READY_TIMEOUT, CALLBACK_LIMIT, **limits)
        self.max_tasks = limits.get("max_tasks", 0)
        if resumed:
            self.ledger.resume()
        self.size, self.cap, self.now = size, size, 1000.0
        self.workers: dict[int, Played] = {}
        self.frames: list[Frame] = []
        self.jobs: dict[int, Job] = {}  # submitted, of either lane
        self.started: set[int] = set()
        self.ends: Counter[int] = Counter()
        self.hook_ends: Counter[int] = Counter()
        self.hook_calls: Counter[int] = Counter()
        self.called: set[int] = set()
        self.cuts: Counter[int] = Counter()  # not told to the parent
        self.cancelled: set[int] = set()
        self.tokens: list[int] = []
        self.history: list[Any] = []
        self.ever_ready, self.begun, self.paused = resumed, False, False
        self.closing = self.stopping = self.finished = self.broken = False
        self._together = False
        self._done: set[int] = set()  # DONE may be told of these
        self._due: list[Job] = []  # these must have ended when the event has been taken in
        self._may_break = False
        self._looks: list[int] = []
        self._abandoned: list[int] = []
        self.sound = True  # no check has failed

    # -- what happens --------------------------------------------------------------------------------------------

    def tell(self, *events: Any) -> list[Any]:
        """Something becomes known; the actions that follow are checked and done."""
        self._together, self._done, self._due = len(events) > 1, set(), []
        self._may_break, self.sound = not self.ever_ready, False
        over = self.finished
        for event in () if over else events:
            self._believe(event)
            self.history.append(event)
        apply = self.ledger.apply_all if self._together else lambda some, now: self.ledger.apply(some[0], now)
        actions = apply(events, self.now)
        assert not (over and actions), f"something follows the end: {actions}"
        for action in actions:
            getattr(self, f"_{type(action).__name__.lower()}")(action)
        if not self.broken:
            for job in self._due:
                count = self.ends[job.id] if job.lane is Lane.TASKS else self.hook_ends[job.of or job.id]
                assert count, f"job {job.id} has come to its end, and nobody is told"
            assert not any(self.cuts.values()), "the parent does not hear what is its own again, or of what is not"
        if any(isinstance(event, f.Ticked) for event in events):
            self._check_guards()
        for worker in [key for key, played in self.workers.items() if self._given_up(played)]:
            del self.workers[worker]
        self.sound = True
        looks, self._looks = self._looks, []
        for number in looks:  # into its page
            worker = self.workers.get(number)
            stuck = worker is None or worker.frozen or worker.unkillable
            if worker is not None and not stuck and worker.inbox and worker.running is None:
                self.tell(f.JobStarted(number, worker.inbox[0].id, self.now))
        abandoned, self._abandoned = self._abandoned, []
        for number in abandoned:
            self.tell(f.WorkerGone(number, None, signal.SIGKILL, None))
        return actions

    def _check_guards(self) -> None:
        assert self.finished or self.ledger.next_deadline() > self.now, "it asks for the same moment again"
        for worker in self.workers.values():
            if worker.running is not None and worker.guard <= self.now and not self.finished:
                assert worker.kills or worker.shot, f"job {worker.running.id} outlives its hard limit"

    def _given_up(self, worker: Played) -> bool:
        """The ledger counts it as gone, although its process is there."""
        return worker.kills > 1 and self.now >= worker.killed_at + UNKILLABLE

    def _living(self, lane: Lane = Lane.TASKS) -> list[Played]:
        there = [worker for worker in self.workers.values() if worker.lane is lane and not self._given_up(worker)]
        return [worker for worker in there if worker.slot != NO_SLOT]  # a spare works only once it has a slot

    # -- what the ledger must believe of an event ----------------------------------------------------------------

    def _believe(self, event: Any) -> None:
        getattr(self, f"_on_{type(event).__name__.lower()}", lambda _: None)(event)

    def _on_begun(self, event: f.Begun) -> None:
        self.begun = True

    def _on_submitted(self, event: f.Submitted) -> None:
        self.jobs.setdefault(event.job.id, event.job)

    def _on_cancelled(self, event: f.Cancelled) -> None:
        if event.signum != signal.SIGUSR1:  # that is the soft limit
            self.cancelled.add(event.job)

    def _on_resized(self, event: f.Resized) -> None:
        self.size = event.size
        self.cap = max(event.size, len(self._living()))

    def _on_flushasked(self, event: f.FlushAsked) -> None:
        self.tokens.append(event.token)

    def _on_paused(self, event: f.Paused) -> None:
        self.paused = event.on

    def _on_draining(self, event: f.Draining) -> None:
        self.closing = True

    def _on_stopping(self, event: f.Stopping) -> None:
        self.closing = self.stopping = True

    def _on_workerready(self, event: f.WorkerReady) -> None:
        if (worker := self.workers.get(event.worker)) is not None:
            worker.ready = True
            self.ever_ready |= worker.lane is Lane.TASKS

    def _on_jobstarted(self, event: f.JobStarted) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or not any(held.id == event.job for held in worker.inbox):
            return
        if worker.running is not None:  # before it has said what became of that: it makes no sense any more
            worker.faulty = True
            return
        worker.running = worker.takes_out(event.job)
        assert worker.running is not None
        worker.begun += 1
        self.started.add(event.job)
        if worker.running.hard:
            at = event.at if event.at <= self.now else self.now  # nobody starts in the future
            worker.guard = at + worker.running.hard + GUARD_GRACE

    def _on_jobdone(self, event: f.JobDone | f.JobRan) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            self._due.append(worker.running)
            self._done.add(event.job)
            worker.running, worker.guard = None, inf

    def _on_jobran(self, event: f.JobRan) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and (job := worker.takes_out(event.job)) is not None:
            worker.begun += 1  # also while another is seen to run: this result has waited for company
            self.started.add(event.job)
            self._due.append(job)
            self._done.add(event.job)
        else:
            self._on_jobdone(event)

    def _on_jobsran(self, event: f.JobsRan) -> None:
        for job in event.jobs:
            self._on_jobran(f.JobRan(event.worker, job, self.now, 0, b"", 0.0, 0.0))

    def _on_bundlesubmitted(self, event: f.BundleSubmitted) -> None:
        for job in event.span.ids:
            self.jobs.setdefault(job, Job(job))

    def _on_jobreturned(self, event: f.JobReturned) -> None:
        if (worker := self.workers.get(event.worker)) is not None:
            worker.takes_out(event.job)

    def _on_jobexpired(self, event: f.JobExpired) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            worker.shot = worker.expired = True

    def _on_jobcut(self, event: f.JobCut) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            self.cuts[event.job] += 1

    def _on_memoryused(self, event: f.MemoryUsed) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            worker.over = True

    def _on_hookcalled(self, event: f.HookCalled) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None and worker.running is not None and worker.running.id == event.job:
            self.called.add(event.job)

    def _on_workerfaulty(self, event: f.WorkerFaulty) -> None:
        if (worker := self.workers.get(event.worker)) is not None:
            worker.faulty = True

    def _on_workergone(self, event: f.WorkerGone) -> None:
        worker = self.workers.pop(event.worker, None)
        if worker is not None and worker.running is not None:
            self._due.append(worker.running)
        if worker is not None:  # how these have ended is not known, and they must not run again
            self._due += [job for job in worker.inbox if job.id in event.begun]

    # -- what the ledger decides ---------------------------------------------------------------------------------

    def _spawn(self, action: f.Spawn) -> None:
        assert action.worker not in self.workers
        assert self.begun
        assert not self.finished
        if action.slot == NO_SLOT:
            assert action.lane is Lane.TASKS
            spares = [w for w in self.workers.values() if w.slot == NO_SLOT and not self._given_up(w)]
            assert self._together or not spares, "two spares"
        else:
            self._take(action.slot, action.lane)
        self.workers[action.worker] = Played(action.worker, action.slot, action.lane)

    def _reload(self, action: f.Reload) -> None:
        assert action.boot

    def _promote(self, action: f.Promote) -> None:
        if (spare := self.workers.get(action.worker)) is not None:
            assert (spare.slot, spare.kills) == (NO_SLOT, 0)
            self._take(action.slot, spare.lane)
            spare.slot, spare.ready = action.slot, False  # whatever it has said before

    def _take(self, slot: int, lane: Lane) -> None:
        living = self._living(lane)
        assert slot not in {worker.slot for worker in living}, "two workers share a slot"
        asked = self.size if lane is Lane.TASKS else 1
        assert self._together or len(living) < asked, "more workers than asked for"
        assert self._together or not (self.stopping and lane is Lane.TASKS), "who shall that one serve?"

    def _asktoshrink(self, action: f.AskToShrink) -> None:
        assert action.used > action.limit

    def _assign(self, action: f.Assign) -> None:
        given, worker = action.job, self.workers.get(action.worker)
        bundle = isinstance(given, Span)
        jobs = [Job(number, hard=given.hard) for number in given.ids] if bundle else [given]
        if worker is None:
            assert self._together, "a job is given to somebody who is gone"
            return
        assert worker.ready
        assert worker.slot != NO_SLOT, "a spare gets a job"
        assert not worker.leaving
        going = worker.kills or worker.expired or worker.faulty  # not shot: an end may cross the signal
        assert self._together or not going, "a job is given to somebody who is about to go"
        others = [other for other in self.workers.values() if not self._given_up(other)]
        for job in jobs:
            assert worker.lane is job.lane
            assert not self.ends[job.id], "a job that has ended is given out"
            assert job.id not in self.started, "a job that has started is given out again"
            assert self._together or not (self.paused and job.lane is Lane.TASKS), "the parent does not read"
            assert not any(other.holds(job.id) for other in others), "twice"
        worker.inbox += jobs
        held = worker.begun + len(worker.inbox)
        assert not self.max_tasks or worker.lane is Lane.HOOKS or held <= self.max_tasks, "it is used up"

    def _look(self, action: f.Look) -> None:
        self._looks.append(action.worker)

    def _dismiss(self, action: f.Dismiss) -> None:
        if (worker := self.workers.get(action.worker)) is not None:
            assert not worker.inbox
            assert worker.running is None, "somebody who works is asked to leave"
            worker.leaving = True

    def _signal(self, action: f.Signal) -> None:
        worker = self.workers.get(action.worker)
        if worker is None:
            return
        if worker.running is not None and worker.running.id == action.job:
            worker.shot |= action.signum in FATAL
        elif worker.holds(action.job):
            worker.asked.add(action.job)

    def _abandon(self, action: f.Abandon) -> None:
        self._abandoned.append(action.worker)

    def _kill(self, action: f.Kill) -> None:
        worker = self.workers.get(action.worker)
        if worker is None:  # it may be that its exit is not known to the ledger yet
            return
        if worker.running is not None and not self._together:
            asked = self.stopping or worker.running.id in self.cancelled or worker.over
            assert asked or worker.guard <= self.now or worker.doomed, (
                f"job {worker.running.id} is killed without cause"
            )
        assert action.signum == (signal.SIGKILL if worker.kills or worker.expired else signal.SIGTERM)
        worker.kills += 1 if action.signum == signal.SIGTERM else 2
        worker.killed_at = self.now

    def _tell(self, action: f.Tell) -> None:
        frame = action.frame
        assert not self.finished, "something follows the end"
        self.frames.append(frame)
        kind, job = frame.kind, frame.job
        if kind in (Kind.DONE, Kind.ENDED):
            assert job in self.jobs
            self.ends[job] += 1
            assert self.ends[job] == 1, "a job has two ends"
            if kind is Kind.DONE:
                assert job in self._done, "a job is done that nobody has done"
            else:
                assert open_verdict(frame.body)[0].terminal
        elif kind is Kind.RESULTS:
            for ran in results(frame):
                assert ran.job in self._done, "a job is done that nobody has done"
                self.ends[ran.job] += 1
                assert self.ends[ran.job] == 1, "a job has two ends"
        elif kind is Kind.SOFT:
            assert not self.ends[job], "a word after the end"
        elif kind in (Kind.STARTED, Kind.PROGRESS, Kind.CUT):
            assert job in self.started, "a job is said to run that does not"
            assert not self.ends[job], "a word after the end"
            self.cuts[job] -= kind is Kind.CUT
        elif kind is Kind.HOOK_ENDED:
            self.hook_ends[job] += 1
        elif kind is Kind.HOOK_QUEUED:
            assert job in self.called, "a callback that nobody has asked for"
            self.hook_calls[job] += 1
            assert self.hook_calls[job] == 1
        elif kind is Kind.BROKEN:
            assert self._may_break, f"a pool that works ends: {frame.body!r}"
            self.broken = True

    def _finish(self, action: f.Finish) -> None:
        assert self.frames[-1].kind is (Kind.BROKEN if self.broken else Kind.BYE)
        self.finished = True

    # -- what good processes do ----------------------------------------------------------------------------------

    def next_words(self, worker: Played, count: int, runtime: float, rss: float) -> list[Any]:
        """What a good worker says next, in one go: it works through its inbox."""
        words: list[Any] = []
        running, inbox = worker.running, [job for job in worker.inbox if job.id not in worker.asked]
        for _ in range(count):
            if running is not None:
                words.append(f.JobDone(worker.id, running.id, Outcome.VALUE, b"body", runtime, rss))
                running = None
            elif inbox:
                running = inbox.pop(0)
                words.append(f.JobStarted(worker.id, running.id, self.now))
        return words

    def step(self, worker: Played) -> bool:
        """One process does what comes next; ``False`` if that is nothing."""
        if worker.unkillable:
            return False
        if worker.kills > 1 or ((worker.kills or worker.shot) and not worker.frozen):
            self.tell(f.WorkerGone(worker.id, None, signal.SIGKILL, 1 << 20))
        elif worker.frozen or worker.faulty or worker.slot == NO_SLOT:
            return False
        elif not worker.ready:
            self.tell(f.WorkerReady(worker.id, 100 + worker.id))
        elif worker.asked:
            job = worker.asked.pop()
            if any(held.id == job for held in worker.inbox):
                self.tell(f.JobReturned(worker.id, job))
        elif words := self.next_words(worker, 1, 0.00001, 0.0):
            self.tell(*words)
        elif worker.leaving:
            self.tell(f.WorkerGone(worker.id, 0, None, 1 << 20))
        else:
            return False
        return True

    def settle(self) -> None:
        """Lets everybody work, and time pass, until nothing moves any more."""
        for _ in range(3000 + 20 * len(self.jobs)):
            if self.finished:
                return
            moved = [self.step(worker) for worker in list(self.workers.values())]
            if any(moved):
                continue
            deadline = self.ledger.next_deadline()
            if deadline == inf:
                return
            self.now = max(self.now, deadline)
            self.tell(f.Ticked())
        raise AssertionError("it never comes to rest")


def several_ran(worker: int, jobs: list[int], now: float, rss: float) -> f.JobsRan:
    """What the dispatcher makes of a RESULTS frame."""
    records = b"".join(page._RECORD.pack(job, 4, Outcome.VALUE, now, 1e-5) for job in jobs)
    frame = Frame(Kind.RESULTS, extra=page._WHO.pack(worker, rss) + records, body=b"body" * len(jobs))
    return f.JobsRan(worker, *page.check(frame, "it"), frame)


def open_rule(*needs: str, **strategies: Any) -> Any:
    """A rule for as long as there is a pool; whatever it does, the others do some of their work afterwards.

    Args:
        needs: what must be true of some worker.
    """

    def sensible(self: Machine) -> bool:
        return not self.world.finished and (not needs or self.pick(0, *needs) is not None)

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def and_go_on(self: Machine, after: int, **values: Any) -> None:
            function(self, **values)
            choose = random.Random(after)
            if not self.world.closing:  # there is always something to do
                more = {"hard": choose.choice((0.0, 0.0, 0.5, 30.0)), "hooks": choose.choice((b"", b"hooks"))}
                if events := self.new_jobs(choose.choice((0, 0, 1, 2, 5)), **more):
                    self.world.tell(*events)
            for _ in range(choose.choice((0, 1, 2, 3, 5, 8, 24))):
                if (worker := self.pick(choose.randrange(1000))) is not None:
                    self.world.step(worker)

        return precondition(sensible)(rule(after=LUCK, **strategies)(and_go_on))

    return decorate


class Machine(RuleBasedStateMachine):
    """Requests, work, deaths, silence, stops, lies, echoes; then an end that must come."""

    @initialize(
        size=st.integers(1, 4),
        limits=st.sampled_from(
            [
                {},
                {},
                {"max_tasks": 1},
                {"max_tasks": 3},
                {"max_tasks": 3, "warm": False},
                {"max_memory": MEMORY},
                {"max_memory": MEMORY, "memory_limit": MEMORY},
            ]
        ),
        start=st.sampled_from(["ready", "ready", "ready", "resumed", "new"]),
        high_water=st.sampled_from([64 << 20, 64 << 20, 3000]),
    )
    def start(self, size: int, limits: dict[str, int], start: str, high_water: int) -> None:
        self.high_water, ledger_module.HOOKS_HIGH_WATER = ledger_module.HOOKS_HIGH_WATER, high_water
        self.next_job = 1
        self.world = World(size, resumed=start == "resumed", **limits)
        if start == "ready":
            self.world.tell(f.Begun())
            for worker in range(size):
                self.world.tell(f.WorkerReady(worker, 100 + worker))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            try:
                if self.world.sound:
                    self.bring_to_an_end()
            finally:
                ledger_module.HOOKS_HIGH_WATER = self.high_water

    def pick(self, luck: int, *conditions: str) -> Played | None:
        """Somebody who fulfils the conditions: names of attributes, with a ``!`` before those that must be false."""

        def fits(worker: Played) -> bool:
            return all(bool(getattr(worker, name.lstrip("!"))) != name.startswith("!") for name in conditions)

        fitting = [worker for worker in self.world.workers.values() if fits(worker)]
        return fitting[luck % len(fitting)] if fitting else None

    # -- the parent ----------------------------------------------------------------------------------------------

    def new_jobs(self, count: int, **more: Any) -> list[f.Submitted]:
        first, self.next_job = self.next_job, self.next_job + count
        return [f.Submitted(Job(number, **more)) for number in range(first, self.next_job)]

    @precondition(lambda self: not self.world.closing)
    @open_rule(
        count=st.integers(1, 8),
        hard=st.sampled_from([0.0, 0.0, 0.5, 30.0]),
        hooks=st.sampled_from([b"", b"hooks"]),
        together=st.booleans(),
    )
    def submit(self, count: int, hard: float, hooks: bytes, together: bool) -> None:
        events = self.new_jobs(count, hard=hard, hooks=hooks, body=b"body" * 100)
        for group in [events] if together else [[event] for event in events]:
            self.world.tell(*group)

    @precondition(lambda self: not self.world.closing)
    @open_rule(count=st.integers(1, 40), hard=st.sampled_from([0.0, 0.5]))
    def submit_a_bundle(self, count: int, hard: float) -> None:
        first, self.next_job = self.next_job, self.next_job + count
        self.world.tell(f.BundleSubmitted(Span(first, 0.0, hard, array("I", [4] * count), b"body" * count)))

    @open_rule(
        "ready",
        "inbox",
        "!doomed",
        "!frozen",
        luck=LUCK,
        count=st.integers(1, 40),
        rss=st.sampled_from([0.0, 2.0 * MEMORY]),
    )
    def run_several(self, luck: int, count: int, rss: float) -> None:
        """Results that have waited for company, of jobs that may be of a bundle, or not."""
        if (worker := self.pick(luck, "ready", "inbox", "!doomed", "!frozen")) is not None:
            self.world.tell(several_ran(worker.id, [job.id for job in worker.inbox[:count]], self.world.now, rss))

    @open_rule(
        "running", luck=LUCK, used=st.sampled_from([1, MEMORY + 1, 9 * MEMORY]), kept=st.sampled_from([0, MEMORY])
    )
    def use_memory(self, luck: int, used: int, kept: int) -> None:
        if (worker := self.pick(luck, "running")) is not None and worker.running is not None:
            self.world.tell(f.MemoryKept(worker.id, kept), f.MemoryUsed(worker.id, worker.running.id, used))

    @open_rule("running", luck=LUCK)
    def ask_to_leave(self, luck: int) -> None:
        if (worker := self.pick(luck, "running")) is not None:
            self.world.tell(f.WorkerWorn(worker.id))

    @precondition(lambda self: not self.world.closing)
    @open_rule(count=st.integers(1, 3))
    def submit_callbacks(self, count: int) -> None:
        for event in self.new_jobs(count, lane=Lane.HOOKS, hard=CALLBACK_LIMIT, hooks=b"hooks"):
            self.world.tell(event)

    @open_rule(luck=LUCK)
    def submit_twice(self, luck: int) -> None:
        over = {*self.world.ends, *self.world.hook_ends}
        jobs = [job for job in self.world.jobs.values() if job.id not in over]
        if jobs:
            same = jobs[luck % len(jobs)]
            self.world.tell(f.Submitted(Job(same.id, same.lane, hard=same.hard, hooks=same.hooks)))

    @open_rule(
        luck=LUCK,
        signum=st.sampled_from([signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, 0]),
        grace=st.sampled_from([0.0, 0.5]),
    )
    def cancel(self, luck: int, signum: int, grace: float) -> None:
        going = [job for job in range(1, self.next_job) if not self.world.ends[job]]
        jobs = going if going and luck % 4 else [*range(self.next_job + 1), (1 << 62) + 1]
        self.world.tell(f.Cancelled(jobs[luck % len(jobs)], signum, grace))

    @open_rule(size=st.sampled_from([0, 1, 1, 2, 2, 3, 3, 4, 5]))
    def resize(self, size: int) -> None:
        self.world.tell(f.Resized(size))

    @open_rule(on=st.sampled_from([False, False, False, True]))
    def pause(self, on: bool) -> None:
        self.world.tell(f.Paused(on))

    @open_rule(boot=st.sampled_from([b"", b"new"]))
    def restart(self, boot: bytes) -> None:
        self.world.tell(f.Restarting(boot))

    @open_rule(really=st.integers(0, 5))
    def flush(self, really: int) -> None:
        if really == 0:
            self.world.tell(f.FlushAsked(len(self.world.tokens) + 1))

    @precondition(lambda self: not self.world.begun or self.world.stopping)
    @open_rule()
    def begin(self) -> None:
        self.world.tell(f.Begun())

    @open_rule(how=st.sampled_from([f.Draining, f.Stopping]), really=st.integers(0, 9))
    def close(self, how: type, really: int) -> None:
        if really == 0 or self.world.closing:
            self.world.tell(how())

    @open_rule(luck=LUCK, close=st.sampled_from([f.Draining, f.Stopping, None, None]))
    def ask_at_once(self, luck: int, close: type | None) -> None:
        """Requests that have piled up."""
        job = luck % (self.next_job + 1)
        events = [
            *([] if self.world.closing else self.new_jobs(3, hooks=b"hooks", hard=2.0)),
            f.Cancelled(job, signal.SIGTERM, 0.5),
        ]
        events += [f.FlushAsked(len(self.world.tokens) + 1)] if luck % 5 == 0 else [f.Paused(False)]
        if close is not None and luck % 8 == 0:
            events.append(close())
        self.world.tell(*events)

    # -- good processes ------------------------------------------------------------------------------------------

    @open_rule(turns=st.integers(1, 5))
    def all_work(self, turns: int) -> None:
        for _ in range(turns):
            for worker in list(self.world.workers.values()):
                self.world.step(worker)

    @open_rule(
        "ready",
        "inbox",
        luck=LUCK,
        count=st.integers(2, 12),
        runtime=st.sampled_from([0.0, 1e-5, 0.5, 100.0, -1.0, inf, nan, 5e-324]),
        rss=st.sampled_from([0.0, 0.0, 2.0 * MEMORY]),
    )
    def work_quickly(self, luck: int, count: int, runtime: float, rss: float) -> None:
        """A worker says much, and it is heard in one go."""
        worker = self.pick(luck, "ready", "!doomed", "!frozen")
        words = self.world.next_words(worker, count, runtime, rss) if worker is not None else []
        if words:
            self.world.tell(*words)

    @open_rule(
        "ready",
        "inbox",
        "!running",
        "!doomed",
        "!frozen",
        luck=LUCK,
        count=st.integers(1, 6),
        flag=st.sampled_from([Outcome.VALUE, Outcome.ERROR]),
    )
    def run(self, luck: int, count: int, flag: Outcome) -> None:
        """As the dispatcher tells of jobs whose start and end it has heard together."""
        worker = self.pick(luck, "ready", "inbox", "!running", "!doomed", "!frozen")
        if worker is not None:
            jobs = worker.inbox[:count]
            self.world.tell(*[f.JobRan(worker.id, job.id, self.world.now, flag, b"b", 1e-5, 0.0) for job in jobs])

    @open_rule("inbox", "!faulty", luck=LUCK, which=LUCK)
    def hand_back(self, luck: int, which: int) -> None:
        if (worker := self.pick(luck, "inbox", "!faulty")) is not None:
            self.world.tell(f.JobReturned(worker.id, worker.inbox[which % len(worker.inbox)].id))

    @open_rule("running", luck=LUCK, word=st.sampled_from(["soft", "progress", "cut", "call", "expired"]))
    def say_of_the_running_job(self, luck: int, word: str) -> None:
        worker = self.pick(luck, "running")
        if worker is not None and (job := worker.running) is not None:
            worker.frozen |= word == "expired" and luck % 3 == 0
            event = {
                "soft": f.SoftLimitHit(worker.id, job.id, 1.0),
                "progress": f.JobProgressed(worker.id, job.id, 1.0, 2.0, b"half"),
                "cut": f.JobCut(worker.id, job.id, b"report"),
                "call": f.HookCalled(worker.id, job.id, Outcome.VALUE, b"hooks", b"body"),
                "expired": f.JobExpired(worker.id, job.id, "somewhere"),
            }[word]
            self.world.tell(event)

    # -- bad luck ------------------------------------------------------------------------------------------------

    @open_rule(luck=LUCK, busy=st.booleans(), how=st.sampled_from(["gone", "faulty", "unready", "closed and gone"]))
    def die(self, luck: int, busy: bool, how: str) -> None:
        if (worker := self.pick(luck, "!unkillable", *(["running"] if busy else []))) is None:
            return
        if how == "unready":
            self.world.tell(f.WorkerUnready(worker.id, "it cannot be loaded"))
        if how in ("faulty", "closed and gone"):
            self.world.tell(f.WorkerFaulty(worker.id, "it closed its line"))
        if how in ("gone", "closed and gone") and worker.id in self.world.workers:
            begun = [job.id for job in worker.inbox[: luck % 4]]
            self.world.tell(f.WorkerGone(worker.id, 1, None, None, begun=begun))

    @open_rule(lucks=st.lists(LUCK, min_size=2, max_size=5))
    def die_together(self, lucks: list[int]) -> None:
        victims = {worker.id for luck in lucks if (worker := self.pick(luck)) is not None}
        if victims:
            self.world.tell(*[f.WorkerGone(worker, None, signal.SIGKILL, None) for worker in sorted(victims)])

    @open_rule(luck=LUCK, how=st.sampled_from(["frozen", "frozen", "unkillable"]))
    def freeze(self, luck: int, how: str) -> None:
        if (worker := self.pick(luck)) is not None and (how == "frozen" or luck % 4 == 0):
            setattr(worker, how, True)

    @open_rule("frozen", luck=LUCK)
    def thaw(self, luck: int) -> None:
        if (worker := self.pick(luck, "frozen")) is not None:
            worker.frozen = False

    @precondition(lambda self: not self.world.ever_ready)
    @open_rule(really=st.integers(0, 5))
    def fail_to_load(self, really: int) -> None:
        if really == 0:
            self.world.tell(f.WorkerUnready(None, "there is no such module"))

    @open_rule(seconds=st.sampled_from([0.0, 0.01, 0.1, 0.6, 2.0, 11.0, 100.0, 1e7]))
    def wait(self, seconds: float) -> None:
        """Time passes, more than was asked for if the machine was suspended."""
        self.world.now += seconds
        self.world.tell(f.Ticked())

    # -- lies ----------------------------------------------------------------------------------------------------

    @open_rule(luck=LUCK, count=st.integers(1, 4), together=st.booleans())
    def repeat(self, luck: int, count: int, together: bool) -> None:
        """Something is heard again, however late."""
        parents = (
            f.Begun,
            f.Submitted,
            f.BundleSubmitted,
            f.Resized,
            f.Restarting,
            f.Draining,
            f.Stopping,
            f.FlushAsked,
        )
        history = [event for event in self.world.history if not isinstance(event, parents)]
        if history:
            at = luck % len(history)
            events = history[at : at + count]
            late = [event for event in events if getattr(event, "worker", None) not in self.world.workers]
            for group in [late] if together and late else [[event] for event in events]:
                if not self.world.finished:
                    self.world.tell(*group)

    @open_rule(luck=LUCK, count=st.integers(1, 6))
    def lie(self, luck: int, count: int) -> None:
        """Any word of anybody on any job: its own, another's, one that has ended or never was."""
        choose = random.Random(luck)
        for _ in range(count):
            if not self.world.finished:
                self.world.tell(self.a_lie(choose))

    def a_lie(self, choose: random.Random) -> Any:
        world = self.world
        number = choose.choice([*world.workers, *world.workers, choose.randrange(12), GHOST])
        held = {worker.id: [*worker.inbox, *filter(None, [worker.running])] for worker in world.workers.values()}
        anything = [*range(self.next_job + 2), (1 << 62) + choose.randrange(5)]
        own = [job.id for job in held.get(number, ())]
        others = [job.id for jobs in held.values() for job in jobs]
        job = choose.choice(choose.choice([own or anything, others or anything, [*world.ends] or anything, anything]))
        # Not one that waits: it might be given out because of the results before it, and then the word would be true.
        known = job if job in world.ends or job in others else self.next_job + 9
        at = choose.choice([0.0, nan, inf, 1e300])
        return choose.choice(
            [
                f.JobDone(number, job, choose.randrange(256), b"lie", at, at),
                f.JobRan(number, job, at, Outcome.VALUE, b"lie", at, at),
                f.JobStarted(number, job, at),
                f.JobReturned(number, job),
                f.JobExpired(number, job, "nowhere"),
                f.HookCalled(number, job, 0, b"lie", b"lie"),
                f.SoftLimitHit(number, job, at),
                f.JobProgressed(number, job, at, at, b"lie"),
                f.JobCut(number, job, b"lie"),
                f.WorkerReady(number, 7),
                several_ran(number, list(dict.fromkeys([known, *own])), world.now, 0.0),
            ]
        )

    @precondition(lambda self: self.world.finished)
    @rule(luck=LUCK)
    def speak_after_the_end(self, luck: int) -> None:
        """Nobody is there to act."""
        history = self.world.history
        event = history[luck % len(history)]
        if not isinstance(event, f.Submitted | f.BundleSubmitted):
            self.world.tell(event)

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def promises(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        assert all(count == 1 for count in world.ends.values())
        living = len(world._living())
        world.cap = max(world.size, min(world.cap, living))
        assert living <= world.cap, "more workers than asked for"
        assert len(world._living(Lane.HOOKS)) <= 1
        held = Counter(
            job.id for w in world.workers.values() for job in [*w.inbox, *([w.running] if w.running else [])]
        )
        assert all(count == 1 for count in held.values()), "a job is in two places"
        if not world.finished:
            limits = [worker.guard for worker in world.workers.values() if worker.guard < inf]
            deadline = world.ledger.next_deadline()
            assert all(deadline <= max(limit, world.now + UNKILLABLE) for limit in limits), "nobody looks at a limit"
            going = any(worker.kills or worker.expired for worker in world.workers.values())
            assert not going or deadline <= world.now + UNKILLABLE, "nobody looks whether it goes"
            waited_for = any(worker.inbox and worker.running is None for worker in world.workers.values())
            assert not waited_for or deadline <= world.now + START_GRACE, "nobody asks why it does not begin"

    # -- the end -------------------------------------------------------------------------------------------------

    def bring_to_an_end(self) -> None:
        world = self.world
        if not world.finished:
            self.let_go()
            if not world.closing and self.next_job % 2:  # nobody needs a shutdown to get what he asked for
                world.settle()
                self.check_the_ends()
                assert len(world._living()) <= world.size
            if not world.finished:
                world.tell([f.Draining, f.Stopping][self.next_job // 2 % 2]())
            world.settle()
        assert world.finished, "the end does not come"
        assert not world.ledger.jobs or world.broken
        if not world.broken:
            self.check_the_ends()
            left = [worker for worker in world.workers.values() if not worker.unkillable]
            assert not left, "somebody is still there"

    def let_go(self) -> None:
        """Nothing but the pool itself shall stand in its way."""
        world = self.world
        for worker in world.workers.values():
            going = worker.kills or worker.expired or worker.faulty
            if worker.running is not None and not worker.running.hard and not going:  # a cancel may ask for no SIGKILL
                worker.frozen = worker.unkillable = False
        world.tell(f.Paused(False))
        if not world.begun and not world.finished:
            world.tell(f.Begun())
        if not world.size and not world.finished:
            world.tell(f.Resized(1))

    def check_the_ends(self) -> None:
        world = self.world
        if world.broken:
            return
        tasks = [job for job in world.jobs.values() if job.lane is Lane.TASKS]
        assert world.ends == dict.fromkeys((job.id for job in tasks), 1), "a job has no end"
        expected = Counter(job.id for job in world.jobs.values() if job.hooks or job.lane is Lane.HOOKS)
        expected += world.hook_calls
        assert world.hook_ends == expected, "a callback has no end, or two"
        flushed = [frame.job for frame in world.frames if frame.kind is Kind.FLUSHED]
        assert flushed == world.tokens, "a flush has no answer"


TestLedger = Machine.TestCase
# Not shrunk: that may take minutes, and a run of fifty steps can be read.
TestLedger.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    derandomize=os.environ.get("CI") == "true",  # there, what fails shall fail again
)
