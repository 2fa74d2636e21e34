"""The one loop between the parent and the workers.

    parent ──frames──▶ ┌────────────────────────────┐ ──frames──▶ worker 0..N-1, callbacks
           ◀─frames─── │ wait · tell the ledger · act│ ◀─frames───
                       └────────────────────────────┘ ──signals─▶ their watchdogs, or their process groups

Owns the waiting and the wires. Single-threaded; runs no user code, unpickles nothing, never blocks on a peer: what a
peer is too slow to take waits in its outbox. When the parent is gone, everything below ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from math import inf
from typing import Any

from mpworker.errors import ProtocolError
from mpworker.pool import facts as f
from mpworker.pool import linux
from mpworker.pool import page as pages
from mpworker.pool.bulk import Bulk, Place
from mpworker.pool.fleet import Crew, Exit, Fleet
from mpworker.pool.frames import (
    BATCHED,
    CHUNK,
    LONGEST_WAIT,
    RATIONED,
    Frame,
    FrameReader,
    Kind,
    Outbox,
    encode,
    pack_start,
    receive,
)
from mpworker.pool.jobs import NO_SLOT, SLOT_VARIABLE, Job, Lane, Span, open_span
from mpworker.pool.ledger import Ledger
from mpworker.pool.nursery import Nursery
from mpworker.pool.sampler import Sampler
from mpworker.pool.service import SERVICE, Service
from mpworker.pool.title import set_title
from mpworker.pool.wire import Listener, Wire

#: Bytes that may wait for the parent before no new job is started.
PARENT_HIGH_WATER = 64 << 20
#: Seconds between checks that the parent still lives, where the kernel cannot tell us.
_PARENT_CHECK = 0.5
#: Seconds by which a deadline is missed only if this process did not run …
_STOPPED = 1.0
#: … and for how long it then listens before it acts.
_LISTEN = 0.25
#: Seconds between two looks at the deadlines while there is much to do.
_LOOK_PAUSE = 0.005
#: Seconds for which the start of a job waits to be told together with its end. Whoever asks meanwhile is told at once,
#: and should this process die, it stands in the worker's page.
_SHORT = 0.001
#: Objects made before the garbage collector looks: here next to nothing forms cycles, and a queue is long to search.
_GC_THRESHOLD = 100_000
# The members that the loop looks for most often: reading one from its enum takes longer than comparing it.
_STARTED, _DONE, _READY, _SUBMIT, _JOB = Kind.STARTED, Kind.DONE, Kind.READY, Kind.SUBMIT, Kind.JOB
_BUNDLE, _RESULTS, _GOT = Kind.BUNDLE, Kind.RESULTS, Kind.GOT
_LANES = {int(lane): lane for lane in (Lane.TASKS, Lane.HOOKS)}
#: More workers than this are a number gone wrong.
_MOST_WORKERS = 1 << 16
#: Reads from one worker before the others get their turn.
_READS_PER_TURN = 4


class Dispatcher:
    """One pool's dispatcher.

    Args:
        parent: line to the parent.
        boot: the BOOT frame: options for us, and what children need.
        fleet: may hold a template that was forked from the parent.
        can_adopt: orphans become our children; else workers cannot come from a template.
    """

    def __init__(self, parent: socket.socket, boot: Frame, fleet: Fleet, can_adopt: bool) -> None:
        options = json.loads(boot.extra)
        self._boot = boot
        self._fleet = fleet
        self._ledger = Ledger(
            options["size"],
            options["ready_timeout"],
            options["callback_limit"],
            options["max_tasks"],
            options["max_memory"],
            options["memory_limit"],
            options["warm"],
        )
        self._sampler = Sampler()
        if boot.flag:
            self._ledger.resume()
        self._selector = selectors.DefaultSelector()
        parent.setblocking(False)
        self._parent = Wire(self._selector, parent, self._read_parent)
        self._parent.outbox.unconfirmed = deque()
        self._place = Place()
        self._parent_reader = FrameReader("the parent", place=self._place)
        self._parent_pid = os.getppid()
        if not can_adopt and options["start_method"] != "spawn":
            level = logging.WARNING if options["start_method"] == "fork" else logging.INFO  # memory is not inherited
            self.log(level, "start method spawn: here a process cannot adopt the orphans that a template makes")
            options["start_method"] = "spawn"
            fleet.end_template()
        self._wires: dict[int, tuple[Crew, Wire, Outbox, FrameReader]] = {}
        self._nursery = Nursery(self._selector, fleet, options, boot.body, self)
        self._service = Service(self._selector, fleet, self)
        self._serves = bool(options["service"])
        self._touched: set[int] = set()
        self._starts: dict[int, Frame] = {}  # of jobs, not told to the parent yet
        self._starts_due = inf
        self._listen_until = inf
        self._looked, self._look_at = True, -inf  # at the deadlines
        self._child_exited = False
        self._orphaned = self._finished = self._paused = False
        self._actions: dict[type, Callable[[Any], None]] = {
            f.Spawn: self._spawn,
            f.Reload: self._reload,
            f.Promote: self._promote,
            f.Assign: self._assign,
            f.Look: self._look_into_page,
            f.Dismiss: self._dismiss,
            f.Signal: self._signal,
            f.Kill: lambda action: self._fleet.kill(action.worker, action.signum),
            f.Abandon: lambda action: self._gone(Exit(action.worker, None, signal.SIGKILL, None)),
            f.AskToShrink: self._ask_to_shrink,
            f.Tell: self._tell,
            f.Finish: self._finish,
        }

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until the pool is finished or the parent is gone; ends every child before it returns."""
        self._watch_signals()
        self._watch_parent()
        self._nursery.open()
        while not self._finished and not self._orphaned:
            ready = self._selector.select(self._patience())
            for key, mask in ready:
                key.data.handle(mask)
            if self._child_exited:
                self._child_exited = False
                self._reap()
            self._flush()
            now = time.monotonic()
            self._looked = not ready or now >= self._look_at
            if self._looked:
                self._look(now)
        if not self._orphaned:
            self._service.finish()
        self._fleet.end_all()
        if not self._orphaned:
            self._say_goodbye()
        signal.set_wakeup_fd(-1)
        for end in self._signal_line:
            end.close()

    def _look(self, now: float) -> None:
        """Does what is due. To find out takes some time, so that busy times have pauses in between."""
        self._look_at = now + _LOOK_PAUSE
        if self._due(now):
            self._apply(f.Ticked())
        if self._ledger.quota.watched and now >= self._sampler.due:
            self._apply(*self._sampler.look(self._ledger.quota.running(), now))
        self._nursery.tick(now)
        self._service.tick(now)
        self._fleet.tick(now)
        self._flush()

    def _due(self, now: float) -> bool:
        """Whether it is time to act on deadlines. If it has long been, then this process was stopped, and perhaps all
        of them were (``docker pause``): first the others get a moment to say what they have done."""
        deadline = self._ledger.next_deadline()
        if now < deadline + _STOPPED:
            self._listen_until = inf
            return now >= deadline
        self._listen_until = min(self._listen_until, now + _LISTEN)
        return now >= self._listen_until

    def _patience(self) -> float:
        if not self._looked:  # the deadlines may be others by now
            return max(0.0, min(self._look_at, self._starts_due) - time.monotonic())
        deadline = self._ledger.next_deadline() if self._listen_until == inf else self._listen_until
        others = self._nursery.deadline, self._service.deadline, self._fleet.deadline
        deadline = min(deadline, self._starts_due, *others)
        if self._ledger.quota.watched:
            deadline = min(deadline, self._sampler.due)
        patience = min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT)
        if self._parent_watched:
            return patience
        if os.getppid() != self._parent_pid:
            self._orphaned = True
        return min(patience, _PARENT_CHECK)

    def _apply(self, *events: Any) -> None:
        actions = self._actions
        for action in self._ledger.apply_all(events, time.monotonic()):
            actions[type(action)](action)

    def _flush(self) -> None:
        if self._starts and time.monotonic() >= self._starts_due:
            self._tell_starts()
        if self._parent.outbox:
            self._parent.flush()
        paused = self._parent.outbox.load > PARENT_HIGH_WATER
        if paused != self._paused:
            self._paused = paused
            self._apply(f.Paused(paused))
        for worker in self._touched:
            if worker in self._wires:
                crew, wire, control, _ = self._wires[worker]
                wire.flush()
                if control:
                    with contextlib.suppress(OSError):
                        control.flush(crew.control.send, crew.control.send)
        self._touched.clear()

    def _watch_signals(self) -> None:
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._signal_line = reader, writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        # Not SIG_IGN: that would be inherited through exec. Ending is the parent's word, through the pipe.
        for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGTSTP"):
            signal.signal(getattr(signal, name), lambda *_: None)
        self._selector.register(reader, selectors.EVENT_READ, Listener(lambda: self._on_signal(reader)))

    def _on_signal(self, reader: socket.socket) -> None:
        if signal.SIGCHLD in (receive(reader) or b""):
            self._child_exited = True

    def _watch_parent(self) -> None:
        """Learns of the parent's death even if a fork of it keeps the line open."""
        self._parent_watched = False
        with contextlib.suppress(OSError, AttributeError):
            descriptor = os.pidfd_open(self._parent_pid)
            self._selector.register(descriptor, selectors.EVENT_READ, Listener(self._on_orphaned))
            self._parent_watched = os.getppid() == self._parent_pid

    def _on_orphaned(self) -> None:
        self._orphaned = True

    # -- template ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """From the nursery: workers can be started."""
        if not self._ledger.begun:
            self._apply(f.Begun())

    def template_failed(self, why: str) -> None:
        """From the nursery: the application could not be loaded."""
        if self._ledger.ever_ready:  # a later template: the workers there are go on, new ones try it for themselves
            self.log(logging.ERROR, f"start method spawn from now on: {why}")
            self._nursery.give_up()
            self.begin()
        else:
            self._apply(f.WorkerUnready(None, why))

    # -- parent --------------------------------------------------------------------------------------------------

    def _read_parent(self) -> None:
        data = self._parent_reader.receive(self._parent.sock)
        if data == b"":
            self._orphaned = True
            return
        try:
            frames = self._parent_reader.feed(data or b"")
            asked = [_asked(frame) for frame in frames if frame.kind is not _GOT or not self._is_confirmed(frame)]
        except ProtocolError as exc:  # the line cannot be read any further; the parent starts another dispatcher
            self.log(logging.CRITICAL, f"{exc}; the dispatcher ends")
            self._parent.close()
            self._finished = True
            return
        self._apply(*asked)

    def _is_confirmed(self, frame: Frame) -> bool:
        """Takes in what the parent says of the next descriptor; ``False`` if there is none that it could speak of."""
        unconfirmed = self._parent.outbox.unconfirmed
        if not unconfirmed:
            return False
        sent = unconfirmed.popleft()
        if frame.flag and type(sent.body) is Bulk:
            self._parent.put(sent._replace(body=sent.body.read()))
        return True

    def _tell(self, action: f.Tell) -> None:
        frame = action.frame
        kind, job, flag, a, b, _, body = frame
        if kind is _STARTED:
            if not self._starts:
                self._starts_due = time.monotonic() + _SHORT
            self._starts[job] = frame
        elif kind is _DONE and (start := self._starts.pop(job, None)) is not None:  # both in one frame
            if not self._starts:
                self._starts_due = inf
            self._parent.put(Frame(kind, job, flag, a, b, pack_start(start.a, start.b), body))
        else:
            self._tell_starts()
            self._parent.put(frame)

    def _tell_starts(self) -> None:
        for frame in self._starts.values():
            self._parent.put(frame)
        self._starts.clear()
        self._starts_due = inf

    def log(self, level: int, text: str) -> None:
        """Has the parent log a line."""
        self._parent.put(Frame(Kind.LOG, flag=level, body=text.encode()))

    def _say_goodbye(self) -> None:
        self._parent.sock.setblocking(True)
        self._parent.sock.settimeout(5.0)
        self._tell_starts()
        with contextlib.suppress(OSError):
            self._parent.outbox.flush(self._parent.send, self._parent.send)
            while self._parent.outbox.unconfirmed and self._parent.open and not self._orphaned:
                self._read_parent()  # it may want one of them once more
                self._parent.outbox.flush(self._parent.send, self._parent.send)

    def _finish(self, action: f.Finish) -> None:
        self._finished = True

    # -- workers -------------------------------------------------------------------------------------------------

    def _spawn(self, action: f.Spawn) -> None:
        try:
            crew = self._fleet.spawn(action.worker, action.slot, action.lane, self.boot_frame())
        except OSError as exc:
            self.log(logging.ERROR, f"a worker could not be started: {exc}")
            self._gone(Exit(action.worker, None, None, None))
            return
        wire = Wire(self._selector, crew.data, lambda: self._read_worker(action.worker))
        self._wires[action.worker] = crew, wire, Outbox(), FrameReader(f"worker {action.slot}", place=self._place)
        self._place.look(max(crew.control.fileno(), crew.page_fd))
        self._parent.put_fd(crew.page_fd)
        self.show_workers()

    def _reload(self, action: f.Reload) -> None:
        self._boot = self._boot._replace(body=action.boot)
        self._nursery.reload(action.boot)
        self._service.renew()

    def _promote(self, action: f.Promote) -> None:
        worker, slot = action
        if worker in self._wires:
            crew, wire, _, reader = self._wires[worker]
            crew.slot, reader.peer = slot, f"worker {slot}"
            wire.put(Frame(Kind.TURN, slot))
            self._touched.add(worker)

    def boot_frame(self) -> bytes:
        """For a fresh interpreter."""
        return encode(Kind.BOOT, flag=1, body=self._boot.body)

    def _assign(self, action: f.Assign) -> None:
        job = action.job
        if action.worker in self._wires and type(job) is Span:
            frame = Frame(_BUNDLE, job.first, BATCHED, job.soft, job.hard, job.lengths.tobytes(), job.body)
            self._wires[action.worker][1].put(frame)
            self._touched.add(action.worker)
        elif action.worker in self._wires and type(job) is Job:
            flag = job.flag | (BATCHED if action.batched else 0) | (RATIONED if job.memory else 0)
            frame = Frame(_JOB, job.id, flag, job.soft, job.hard, job.hooks if job.lane else b"", job.body)
            self._wires[action.worker][1].put(frame)
            self._touched.add(action.worker)

    def _look_into_page(self, action: f.Look) -> None:
        crew = self._fleet.crews.get(action.worker)
        if crew is not None:
            job, started = crew.page.running()
            if job:
                self._apply(f.JobStarted(crew.worker, job, started))

    def _dismiss(self, action: f.Dismiss) -> None:
        if action.worker in self._wires:
            self._wires[action.worker][1].put(Frame(Kind.LEAVE))
            self._touched.add(action.worker)

    def _signal(self, action: f.Signal) -> None:
        if action.worker in self._wires:
            self._wires[action.worker][2].put(encode(Kind.SIGNAL, action.job, action.signum))
            self._touched.add(action.worker)

    def _ask_to_shrink(self, action: f.AskToShrink) -> None:
        if action.worker in self._wires:
            _, job, limit, used = action
            self._wires[action.worker][2].put(encode(Kind.SHRINK, job, a=limit, b=used))
            self._touched.add(action.worker)

    def _read_worker(self, worker: int, turns: int = _READS_PER_TURN) -> None:
        entry = self._wires.get(worker)
        if entry is None:
            return
        crew, wire, _, reader = entry
        for _ in range(turns):
            data = reader.receive(crew.data)
            if data is None:
                return
            try:
                self._hear(crew, reader, data)
            except ProtocolError as exc:
                crew.garbled = True
                self._silence(worker, wire, str(exc))
                return
            if not data:
                self._silence(worker, wire, "it closed its line to the pool")
            if len(data) < CHUNK:
                return  # that was all; else the selector says so

    def _silence(self, worker: int, wire: Wire, why: str) -> None:
        wire.close()
        crew = self._wires[worker][0]
        if crew.pid:
            self._apply(f.WorkerFaulty(worker, why))
        else:  # it died before it could say who it is; its pid is reaped as an unknown
            self._gone(Exit(worker, None, None, None))

    def _hear(self, crew: Crew, reader: FrameReader, data: bytes) -> None:
        """Takes in what a worker has sent.

        Raises:
            ProtocolError: some of it is not its to send. What came before that counts.
        """
        events: list[Any] = []
        worker = crew.worker
        began, at = -1, 0.0  # the job whose start was the last word
        broken: ProtocolError | None = None
        try:
            frames = reader.feed(data)
        except ProtocolError as exc:  # a job whose start came with it must not start again elsewhere
            frames, broken = list(exc.before), exc
        try:
            for frame in frames:
                kind, job, flag, a, b, _, body = frame
                if kind is _DONE and job == began:
                    events[-1] = f.JobRan(worker, job, at, flag, body, a, b)
                elif kind is _DONE:
                    events.append(f.JobDone(worker, job, flag, body, a, b))
                elif kind is _RESULTS:
                    crew.page.heard()
                    events.append(f.JobsRan(worker, *pages.check(frame, reader.peer), frame))
                elif kind is _STARTED:
                    events.append(f.JobStarted(worker, job, a))
                elif kind is not Kind.HELLO:
                    if kind is Kind.RETURNED and flag:
                        self._unload(worker, job)
                    events.append(_reported(crew, frame))
                elif not self._fleet.registered(crew, job):
                    raise ProtocolError(f"worker {crew.slot} is not a child of the dispatcher")
                began, at = (job, a) if kind is _STARTED else (-1, 0.0)
                if kind is _READY:
                    crew.ready = True
                    if self._serves:
                        self._service.begin()
                    self.show_workers()
            if broken is not None:
                raise broken
        finally:
            self._apply(*events)

    def _unload(self, worker: int, number: int) -> None:
        """A worker has no room for a job's descriptor: from now on that travels in bytes."""
        job = self._ledger.jobs.get(number)
        if type(job) is Job and job.worker is not None and job.worker.id == worker and type(job.body) is Bulk:
            job.body = job.body.read()

    def _reap(self) -> None:
        for crew, *_ in list(self._wires.values()):
            if not crew.pid:  # its HELLO must be known before its exit is
                self._read_worker(crew.worker)
        for end in self._fleet.reap():
            if end.worker == SERVICE:
                self._service.reaped()
            elif end.worker is not None:
                self._gone(end)

    def _gone(self, end: Exit) -> None:
        """Hears a dead worker out, then lets it go."""
        worker = end.worker if end.worker is not None else -1
        entry = self._wires.get(worker)
        begun: list[int] = []
        if entry is not None:
            crew, wire, _, _ = entry
            begun = crew.page.started()
            if wire.open:
                self._hear_out(worker, crew)
            self._read_page(crew, begun)
            wire.close()
            self._wires.pop(worker, None)
            self._fleet.forget(worker)
        self._apply(f.WorkerGone(worker, end.exitcode, end.signal, end.max_rss, end.oom, begun))
        self.show_workers()

    def _hear_out(self, worker: int, crew: Crew) -> None:
        reader = self._wires[worker][3]
        while data := reader.receive(crew.data):
            try:
                self._hear(crew, reader, data)
            except ProtocolError as exc:
                self.log(logging.WARNING, f"{exc}, with its last breath")
                return

    def _read_page(self, crew: Crew, begun: list[int]) -> None:
        """What a dead worker had no time to send."""
        events: list[Any] = []
        for frame in crew.page.left():
            with contextlib.suppress(ProtocolError):  # it has been written over by whoever ended the worker
                events.append(f.JobsRan(crew.worker, *pages.check(frame, f"worker {crew.slot}"), frame))
        if crew.garbled and len([job for job in begun if job in self._ledger.jobs]) == 1:
            events.clear()  # nobody else can have written the garbage: no result of it counts
        job, started = crew.page.running()
        if job:
            events.append(f.JobStarted(crew.worker, job, started))
        self._apply(*events)

    def show_workers(self) -> None:
        """Tells the parent which processes there are."""
        crews = [
            {"pid": crew.pid, "slot": crew.slot, "lane": int(crew.lane)}
            for crew in self._fleet.crews.values()
            if crew.pid and (crew.slot != NO_SLOT or crew.lane is Lane.SERVICE)
        ]
        ready = sum(crew.ready and crew.lane is Lane.TASKS for crew in self._fleet.crews.values())
        everything = {"workers": crews, "ready": ready, "pages": list(self._fleet.crews)}
        self._parent.put(Frame(Kind.WORKERS, body=json.dumps(everything).encode()))


def _asked(frame: Frame) -> Any:
    """The parent's word as the ledger hears it."""
    kind, job, flag, a, b, extra, body = frame
    if kind is _SUBMIT and flag >> 4 in _LANES:
        return f.Submitted(Job(job, _LANES[flag >> 4], flag & 15, a, b, extra, body))
    if kind is _BUNDLE:
        return f.BundleSubmitted(open_span(frame, "the parent"))
    if kind is Kind.MEMORY and math.isfinite(a):
        return f.MemoryLimited(job, int(a))
    if kind is Kind.CANCEL:
        return f.Cancelled(job, flag, a)
    if kind is Kind.RESIZE and job <= _MOST_WORKERS:
        return f.Resized(job)
    if kind is Kind.FLUSH:
        return f.FlushAsked(job)
    if kind is Kind.RESTART:
        return f.Restarting(body)
    if kind is Kind.DRAIN:
        return f.Draining()
    if kind is Kind.STOP:
        return f.Stopping()
    raise ProtocolError(f"the parent sent a {kind.name} frame, which is not its to send")


def _reported(crew: Crew, frame: Frame) -> Any:
    """A worker's word as the ledger hears it; the frequent ones are read by the loop itself."""
    kind, job, flag, a, b, extra, body = frame
    if not crew.pid:
        raise ProtocolError(f"worker {crew.slot} sent a {kind.name} frame before it said who it is")
    if kind is Kind.RETURNED:
        return f.JobReturned(crew.worker, job)
    if kind is Kind.CALL:
        return f.HookCalled(crew.worker, job, flag, extra, body)
    if kind is Kind.PROGRESS:
        return f.JobProgressed(crew.worker, job, a, b, body)
    if kind is Kind.CUT:
        return f.JobCut(crew.worker, job, body)
    if kind is Kind.KEPT and math.isfinite(a):
        return f.MemoryKept(crew.worker, int(a))
    if kind is Kind.WORN:
        return f.WorkerWorn(crew.worker)
    if kind is Kind.SOFT:
        return f.SoftLimitHit(crew.worker, job, a)
    if kind is Kind.EXPIRED:
        return f.JobExpired(crew.worker, job, body.decode(errors="replace"))
    if kind is Kind.READY:
        return f.WorkerReady(crew.worker, crew.pid)
    if kind is Kind.UNREADY:
        return f.WorkerUnready(crew.worker, body.decode(errors="replace"))
    raise ProtocolError(f"worker {crew.slot} sent a {kind.name} frame, which is not its to send")


def _receive_boot(line: socket.socket) -> Frame | None:
    reader = FrameReader("the parent")
    while True:
        data = line.recv(reader.missing)
        if not data:
            return None
        if frames := reader.feed(data):
            return frames[0]


def main(fd: str, template_fd: str = "", template_pid: str = "", *_: str) -> None:
    """Entry of the process. The last two arguments name a template that the parent forked for us."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked some while it started us
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    can_adopt = linux.adopt_orphans()
    fleet = Fleet()
    os.environ.pop(SLOT_VARIABLE, None)  # the parent may be a worker: its slot is none of ours
    if template_fd.strip() and template_pid:
        fleet.adopt_template(socket.socket(fileno=int(template_fd)), int(template_pid))
    set_title("mpworker: dispatcher")
    with socket.socket(fileno=int(fd)) as line:
        try:
            boot = _receive_boot(line)
            if boot is None or boot.kind is not Kind.BOOT:
                return
            gc.freeze()
            gc.set_threshold(_GC_THRESHOLD)
            options = json.loads(boot.extra)
            set_title(f"mpworker: dispatcher{options['label']}")
            fleet.heirlooms, fleet.task_log = options["heirlooms"], options["task_log"]
            if can_adopt and fleet.template is None and options["start_method"] != "spawn":
                fleet.fork_template(line)
            Dispatcher(line, boot, fleet, can_adopt).run()
        finally:
            fleet.end_all()
