"""``mpworker.celery.pool:TaskPool``: the engine as Celery's worker sees it.

Owns the translation between Celery's calls and callbacks and the handle's jobs and events. Never forks the main process
once it has threads, never lets an error out into Celery's event loop, never decides about a task: that is Celery's
``Request``.

With an event loop (Redis, RabbitMQ) results are read and callbacks run inside it; without one (the filesystem
transport) one supervisor thread does the same.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from billiard.common import REMAP_SIGTERM, TERM_SIGNAME, human_status
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, signals
from celery.concurrency import get_implementation
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import state as worker_state
from celery.worker.request import Request

from mpworker.celery import child, progress, shipping, task_log
from mpworker.celery.app import settings_of
from mpworker.celery.connection import Outage
from mpworker.celery.failures import Failures
from mpworker.celery.gate import SignalGate
from mpworker.celery.hooks import ParentHooks
from mpworker.celery.limits import limits_of
from mpworker.celery.loop import LoopLink
from mpworker.celery.models import register_models
from mpworker.celery.poison import Deaths
from mpworker.celery.queueing import mark_what_is_received
from mpworker.celery.slot_env import slot_env_of, warn_beyond
from mpworker.celery.soft import SoftShutdown
from mpworker.celery.stalls import StallDetector
from mpworker.celery.start import embedded, may_copy, start_method_of
from mpworker.celery.unacked import Unacked
from mpworker.celery.wakeup import SignalWakeup, hasten_exit
from mpworker.errors import ConfigurationError, PayloadError, RemoteError
from mpworker.pool import handle as handles
from mpworker.pool.frames import Frame, Kind
from mpworker.pool.jobs import Lane
from mpworker.pool.parcel import open_outcome, pack_call
from mpworker.states import JobState

logger = logging.getLogger("mpworker.pool")

#: Exit code of a node whose workers cannot start (sysexits.h: EX_SOFTWARE).
EX_BROKEN = 70
#: Seconds between the signal of ``revoke(terminate=True)`` and SIGKILL, for the signals that ask a process to end.
TERMINATE_GRACE = 3.0
_ASK_TO_END = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGABRT})
#: … and for those that the process itself does not answer: SIGKILL, and what Celery's children ignore.
KILL_GRACE = 0.2
_UNANSWERED = frozenset({signal.SIGKILL, signal.SIGINT} | ({getattr(signal, TERM_SIGNAME)} if REMAP_SIGTERM else set()))
#: Seconds that the dispatcher gets to confirm that it has taken back what had not started.
_TAKE_BACK_TIMEOUT = 1.0
#: Seconds that idle workers get to leave when everything is to end at once.
_LEAVE_PATIENCE = 0.5
#: Seconds for which a restart that only this process can make waits for tasks to end.
_RENEWAL_PATIENCE = 1.0
#: Seconds that the other workers get once the first one is ready, so that "ready" means all of them if they are few.
_READY_TOGETHER = 1.0
#: More slots than anybody could wait for.
_ENOUGH = 1 << 30
#: New in Celery 5.6.
_MAY_CANCEL_QUIETLY = "emit_retry" in inspect.signature(Request.cancel).parameters


class Job:
    """One message in the pool: what Celery wants to hear about it."""

    __slots__ = (
        "__weakref__",
        "_echo",
        "callbacks",
        "id",
        "limits",
        "log",
        "name",
        "pid",
        "pool",
        "task_id",
        "terminated",
    )

    def __init__(self, pool: TaskPool, callbacks: Mapping[str, Callable[..., Any]], name: str, task_id: str) -> None:
        self.pool, self.callbacks, self.name, self.task_id = pool, callbacks, name, task_id
        self.id = pool.handle.next_id()
        self.pid = 0
        #: soft and hard, in seconds, as they were given
        self.limits: tuple[float, float] = 0, 0
        #: what it had said when it ended
        self.log = b""
        self.terminated = self._echo = 0

    def abandon(self) -> None:
        """The broker has its message again: should it start all the same, it is ended, and Celery hears nothing."""
        self.callbacks, self.terminated = {}, int(signal.SIGKILL)
        self.pool.handle.cancel(self.id, signal.SIGKILL, KILL_GRACE)

    def terminate(self, signum: int, *, echoes: bool = False) -> None:
        """Signals this job, wherever it is, and no other. Called by Celery's ``Request``.

        Args:
            echoes: Celery is about to ask for the same once more, by the job instead of by its process.
        """
        signum = int(signum)
        if signum == self._echo:
            self._echo = 0
            return
        self.terminated, self._echo = signum, signum if echoes else 0
        grace = KILL_GRACE if signum in _UNANSWERED else TERMINATE_GRACE if signum in _ASK_TO_END else 0.0
        self.pool.handle.cancel(self.id, signum, grace)


class TaskPool(BasePool):  # type: ignore[misc]
    """A pool of supervised processes for a Celery worker; see ``celery.concurrency.base.BasePool``."""

    #: Then Celery holds surplus messages back, and a revoked or expired one among them never runs.
    uses_semaphore = True
    task_join_will_block = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limit: int = int(kwargs.get("limit", args[0] if args else 0) or 0)
        self._threads = bool(self.options.get("threads", True))
        self._semaphore = self.options.get("semaphore")
        self._timeouts = self.options.get("soft_timeout") or 0.0, self.options.get("timeout") or 0.0
        self._jobs: dict[int, Job] = {}
        self._ending: Job | None = None
        #: jobs that it has been given since it was made
        self.taken = 0
        self._events: deque[Frame] = deque()
        self._pumping = threading.RLock()
        self._slots = _Slots(self.limit) if self._threads and self.putlocks else None
        self._stops = False
        self.handle: handles.Handle = self._make_handle()
        self._start_method = ""
        #: what the workers are made of is in this process only
        self._only_here = False
        #: where Celery's event loop runs
        self._loop_thread: threading.Thread | None = None
        self._loop = LoopLink(self.handle, self._pump)
        self._wakeup = SignalWakeup()
        self._gate = SignalGate()
        self._hooks = ParentHooks(self.handle)
        self._failures = Failures(self._hooks)
        self._soft = SoftShutdown(self, self._drain)
        self._outage = Outage(self, self._listen_once)
        self.app.steps["consumer"].update((StallDetector, Unacked))  # looked at when the consumer is made: next
        hostname = (self.options.get("initargs") or (None, ""))[1]
        self._deaths = Deaths(self.app, self._settings.max_deaths, hostname)

    def _make_handle(self) -> handles.Handle:
        app: Celery = self.app
        hostname = (self.options.get("initargs") or (None, ""))[1]
        try:
            settings = settings_of(app)
            self._slot_env = slot_env_of(settings, self.limit)
        except ConfigurationError as exc:
            raise SystemExit(f"mpworker: {exc}") from None
        self._settings = settings
        self._journals = str(app.conf.result_backend or "").startswith("mpworker+")
        self._bell = shipping.make_bell() if self._journals else None
        spec, description = self._describe()
        self._spec = spec
        if spec.problem and not may_copy(settings, self.forking_enable):
            raise SystemExit(f"mpworker: {spec.problem}; set mpworker_start_method to fork, or put it into a module")
        if spec.in_main and (script := getattr(sys.modules["__main__"], "__file__", None)):
            # Where Celery looks, so that the script's tasks are named in the children as they are here.
            os.environ["MP_MAIN_FILE"] = os.path.abspath(script)
        return handles.make(
            handles.PoolOptions(
                size=self.limit,
                start_method=settings.start_method,
                ready_timeout=settings.ready_timeout,
                callback_limit=settings.callback_time_limit,
                max_tasks=self.options.get("maxtasksperchild") or 0,
                max_memory=(self.options.get("max_memory_per_child") or 0) * 1024,
                warm=not self._slot_env,
                task_log=settings.task_log << 10,
                service=self._bell is not None,
                label=f" ({hostname})" if hostname else "",
            ),
            lent=self._bell.fds if self._bell else (),
            **description,
        )

    def _describe(self, include: Iterable[str] = ()) -> tuple[child.AppSpec, dict[str, Any]]:
        """The app as it is now, and how a worker process gets it.

        Args:
            include: modules of tasks that it might not know of.
        """
        app, hostname = self.app, (self.options.get("initargs") or (None, ""))[1]
        register_models(app)
        spec = child.describe_app(app)
        spec = spec._replace(include=tuple(dict.fromkeys((*spec.include, *include))))
        return spec, {
            "preload": (child.load, (spec,)),
            "initializer": (child.initialize, (hostname, self._journals, self._bell)),
            "service": ("shipper", shipping.serve, (self._settings, hostname, self._bell)) if self._bell else None,
            "finalizer": (child.finish, (0,)),
            "soft_error": child.soft_limit_error,
            "import_main": spec.in_main,
            "slot_env": self._slot_env,
        }

    # -- life ----------------------------------------------------------------------------------------------------

    def on_start(self) -> None:
        """Starts the processes and waits until the first one is ready, here or where Celery asks for it.

        Raises:
            SystemExit: the workers cannot start; the reason has been logged.
        """
        child.keep_logs_whole()
        self._outage.connect()
        self._hooks.connect()
        mark_what_is_received()
        self._soft.connect()
        self._gate.connect()
        if self._settings.task_log:
            task_log.source = self._log_of
        signals.worker_before_create_process.send(sender=self)
        self._start_processes()
        # Copies of this process have all that it has loaded: they start while it connects to the broker.
        if self._threads or self._start_method != "fork":
            self._await_ready()
        if self._threads:
            threading.Thread(target=self._supervise, name="mpworker-results", daemon=True).start()
        hasten_exit()

    def _start_processes(self) -> None:
        options = self.handle.options
        unplaced = self._spec.place is None
        self._only_here = unplaced or embedded()
        local = child.local_tasks(self.app) if unplaced else ()
        self._start_method = method = start_method_of(
            self._settings, forks=self.forking_enable, unplaced=unplaced, local=local
        )
        if method == "fork":
            child.adopt(self.app)
            self.handle.while_forking = partial(child.adopted, self.app)
            if not embedded():  # the program itself: what is there now stays, and is shared while nobody looks at it
                gc.freeze()
        self.handle.options = options._replace(start_method=method)
        self.handle.start()
        # Not once more, for another dispatcher: there are threads by then.
        if method == "fork" and not self._only_here:
            self.handle.options = options

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._settings.ready_timeout + 5.0
        while self.limit and not self.handle.ready and not self.handle.finished and time.monotonic() < deadline:
            self.handle.wait(0.5)
            self._pump()
            self._loop.keep_alive()
            if worker_state.should_stop is not None or worker_state.should_terminate is not None:
                self.handle.kill()  # somebody has lost patience with us
                worker_state.maybe_shutdown()
        if self.limit and not self.handle.ready:
            self.handle.kill()
            raise SystemExit(EX_BROKEN)
        others = time.monotonic() + _READY_TOGETHER
        while self.handle.ready_workers < self.limit and (left := others - time.monotonic()) > 0:
            self.handle.wait(left)
            self._pump()

    def did_start_ok(self) -> bool:
        return self.handle.ready or not self.limit

    def on_stop(self) -> None:
        """Warm: lets started jobs finish, hears their results, sends their acks. May be entered again by a signal."""
        self._stops = True
        if self._slots is not None:
            self._slots.grow(_ENOUGH)  # nobody waits for one any more
        self.flush()
        patience = time.monotonic() + TERMINATE_GRACE + 2.0
        while self._jobs and self.handle.fileno() >= 0:
            self._cancel_stragglers()
            self._step(0.2)
            self._loop.keep_alive()
            if not all(job.terminated for job in self._jobs.values()):
                patience = time.monotonic() + TERMINATE_GRACE + 2.0
            elif time.monotonic() > patience:  # cold, and the dispatcher does not react
                self.handle.kill()
        self._failures.send_errbacks(last=True)
        # Only now: what Celery made of the last ends may have asked for callbacks.
        self.handle.close()
        while not self.handle.finished and self.handle.fileno() >= 0:
            self._step(0.2)
            self._loop.keep_alive()
        self._pump()
        self._loop.keep_alive()
        self._disconnect()

    def _cancel_stragglers(self) -> None:
        """In a cold shutdown: what had been accepted only after Celery had looked for what to cancel."""
        if not self._soft.is_cold:
            return
        overlooked = {job.task_id for job in self._jobs.values() if job.pid and not job.terminated}
        for request in tuple(worker_state.active_requests):
            if request.id in overlooked:
                request.cancel(self, **({"emit_retry": not request.task.acks_late} if _MAY_CANCEL_QUIETLY else {}))

    def _drain(self, seconds: float, even_idle: bool) -> None:
        """Hears what runs until nothing does or the time is up. Called by a signal handler: the loop stands still."""
        if self._semaphore is not None:  # what comes now, an ETA say, waits there; its message is the broker's again
            self._semaphore.clear()
            self._semaphore.shrink(self.limit)
            self._semaphore = None
        self.flush()
        deadline = time.monotonic() + seconds
        while (even_idle or worker_state.active_requests) and self.handle.fileno() >= 0:
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._step(min(left, 0.2))
            self._loop.keep_alive()

    def on_terminate(self) -> None:
        """Cold: ends everything at once."""
        self._dismiss_idle()
        self._disconnect()
        self.handle.kill()
        for job in self._jobs.values():  # another worker of this process, a test's, must not take them for its own
            request = getattr(job.callbacks.get("error_callback"), "__self__", None)
            if isinstance(request, Request):
                worker_state.task_ready(request)

    def _dismiss_idle(self) -> None:
        """What has ended need not be run again. Workers that have nothing to do leave in peace, if they do so at once:
        ``worker_process_shutdown``."""
        self.handle.resize(0)
        deadline, patience = time.monotonic() + _LEAVE_PATIENCE, 0.0
        while self.handle.fileno() >= 0 and time.monotonic() < deadline:
            self._step(patience)
            self._loop.keep_alive()
            busy, patience = {job.pid for job in self._jobs.values()}, 0.05
            if not any(worker["lane"] == Lane.TASKS and worker["pid"] not in busy for worker in self.handle.workers):
                break

    def _disconnect(self) -> None:
        self._hooks.disconnect()
        self._soft.disconnect()
        self._outage.disconnect()
        self._loop.disconnect()
        self._wakeup.disconnect()
        self._gate.disconnect()
        if self._bell is not None:
            shipping.take_down(self._bell)
            self._bell = None

    def flush(self) -> None:
        """Forgets what has not started: its messages go back to the broker. Waits for the dispatcher's word, 1 s."""
        token = self.handle.take_back()
        deadline = time.monotonic() + _TAKE_BACK_TIMEOUT
        while not self.handle.has_taken_back(token) and time.monotonic() < deadline:
            self._step(0.05)
        if not self.handle.has_taken_back(token):
            for job in list(self._jobs.values()):
                if not job.pid:
                    job.abandon()

    def _listen_once(self) -> None:
        if not self._pumped_elsewhere():
            self._step(0.0)

    def _step(self, patience: float) -> None:
        """Waits a little, hears events: here, or from the supervisor thread."""
        if self._pumped_elsewhere() and self.handle.ready:
            time.sleep(0.005)  # the supervisor thread reads
        else:
            self.handle.wait(patience)
            self._pump()

    # -- jobs in -------------------------------------------------------------------------------------------------

    def on_apply(
        self,
        target: Callable[..., Any],
        args: Any = (),
        kwargs: Any = None,
        *,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        waitforslot: bool = False,
        **callbacks: Any,
    ) -> Job:
        """Takes one job; never raises, because Celery has no use for an error here."""
        if waitforslot and self._slots is not None:
            self._slots.acquire()
        name, task_id = (str(args[0]), str(args[1])) if len(args) == 6 else ("", "")
        job = Job(self, callbacks, name, task_id)
        if self._stops:
            return job  # its message will be the broker's again
        self._jobs[job.id] = job
        self.taken += 1
        self._hooks.begins(task_id)
        try:
            if task_id:
                company = {"alone": True} if len(worker_state.reserved_requests) < 2 else {}
                body = pack_call(child.run, (target, *_sendable(args)), company)
            else:
                body = pack_call(target, args, kwargs)
        except PayloadError as exc:
            self._end(job, "error_callback", _einfo(exc))
            return job
        if task_id:
            soft, hard = limits_of(self.app.tasks.get(name), args[2], self._timeouts)
        else:
            soft, hard = soft_timeout or self._timeouts[0], timeout or self._timeouts[1]
        job.limits = soft, hard
        self.handle.submit(job.id, body, soft=soft, hard=hard)
        self._loop.watch_writing()
        return job

    def terminate_job(self, pid: int, signum: int | None = None) -> None:
        """Ends the job that Celery knows by its process; if that process runs another one by now, nothing happens."""
        if not self._pumped_elsewhere():
            self._pump()
        for job in list(self._jobs.values()):
            if job.pid == pid:
                job.terminate(signum or signal.SIGTERM, echoes=True)

    # -- events out ----------------------------------------------------------------------------------------------

    def register_with_event_loop(self, hub: Any) -> None:
        """Called before the node says that it is ready, and after each reconnect of the broker."""
        self._loop_thread = threading.current_thread()
        self._loop.connect(hub)
        self._wakeup.connect(hub)
        if not self.handle.ready:
            self._await_ready()
        # Again later, too: what sends has a connection of its own, which need not be back when the node is.
        self._loop.each_turn(self._failures.send_errbacks)
        self._failures.send_errbacks(at_once=True)

    def each_turn(self, callback: Callable[[], None]) -> None:
        """Has the event loop, and whoever stands in for it at the end, call ``callback`` in each turn."""
        self._loop.each_turn(callback)

    def _supervise(self) -> None:
        while self.handle.fileno() >= 0:
            self.handle.wait(1.0)
            try:
                self._pump()
                self._failures.send_errbacks()
            except (WorkerShutdown, WorkerTerminate) as exc:  # in this thread nobody would hear it
                worker_state.should_stop = exc.code or 0

    def _pumped_elsewhere(self) -> bool:
        return self._threads and threading.current_thread().name != "mpworker-results"

    def _pump(self) -> None:
        """Reads what has happened and calls back. Whatever fails in there is logged: an OSError that reached the event
        loop would be taken for a lost broker."""
        with self._pumping:
            try:
                with self._gate:  # a handler may come here itself, but not into a half-read frame
                    self._events.extend(self.handle.drain())
            except Exception:
                logger.exception("reading from the dispatcher failed")
            while self._events:
                try:
                    self._tell_next()
                except (WorkerShutdown, WorkerTerminate):
                    raise
                except BaseException:
                    logger.exception("a callback of Celery's failed")
            self._loop.follow()
            if self.handle.generation and self._start_method != self.handle.options.start_method:
                self._start_method = self.handle.options.start_method
                logger.warning(
                    "start method %s from here on: what worker_init has opened is not in the new workers",
                    self._start_method,
                )

    def _tell_next(self) -> None:
        """Tells Celery of the next event. A signal's handler that comes in between, and waits for all jobs to end,
        finds each job either not yet told or entirely: what it interrupts cannot go on before it returns."""
        with self._gate:
            if not self._events:
                return
            frame = self._events.popleft()
            ends = frame.kind in (Kind.DONE, Kind.ENDED)
            job = self._jobs.pop(frame.job, None) if ends else self._jobs.get(frame.job)
            if frame.kind is Kind.STARTED and job is not None:
                self._on_started(job, frame)
                return
        self._on_event(frame, job)

    def _on_started(self, job: Job, frame: Frame) -> None:
        if self._soft.is_cold:
            job.abandon()  # a cold shutdown has cancelled what it knew to run; this one it did not know yet
            return
        job.pid = int(frame.b)
        self._call(job, "accept_callback", job.pid, frame.a)

    def _on_event(self, frame: Frame, job: Job | None) -> None:
        kind = frame.kind
        if kind is Kind.HOOK_ENDED:
            self._hooks.ended(frame)
        elif kind is Kind.LOG:
            logger.log(frame.flag, "%s", frame.body.decode(errors="replace"))
        elif kind is Kind.BROKEN:
            self._on_broken(frame.body.decode(errors="replace"))
        elif job is None:
            return
        elif kind is Kind.HOOK_QUEUED:
            self._hooks.queued(job.id, job.name, job.task_id)
        elif kind is Kind.SOFT:
            self._call(job, "timeout_callback", soft=True, timeout=_as_given(frame.a, job.limits[0]))
        elif kind is Kind.PROGRESS:
            progress.send_event(job.callbacks.get("accept_callback"), frame)
        elif kind is Kind.DONE:
            succeeded, value = open_outcome(frame.flag, frame.body)
            if not succeeded and (error := _left(value)) is not value:  # to Celery, a lost worker
                value = self._judge(job, error)
            job.log = b"" if succeeded else task_log.attached(value)
            self._end(job, *(("callback", _tamed(value)) if succeeded else ("error_callback", _einfo(value))))
        elif kind is Kind.ENDED:
            self._on_verdict(job, frame)

    def _on_verdict(self, job: Job, frame: Frame) -> None:
        state, facts = handles.verdict_of(frame)
        job.log = frame.extra
        if state is JobState.TIMED_OUT:
            # timeout_callback does all of it; calling error_callback too would do it twice.
            self._end(job, "timeout_callback", soft=False, timeout=_as_given(facts["limit"], job.limits[1]))
        elif state is JobState.CANCELLED and "signal" not in facts:
            self._end(job, "taken_back")  # no callback has that name: its message is the broker's again
        elif state is JobState.CANCELLED:
            self._end(job, "error_callback", _einfo(Terminated(job.terminated), "terminated"))
        else:
            text = _obituary(open_outcome(frame.flag, frame.body)[1])
            self._end(job, "error_callback", _einfo(self._judge(job, WorkerLostError(text)), text))
            if (task := self.app.tasks.get(job.name)) is not None:
                self._hooks.lost(task, job.task_id)

    def _judge(self, job: Job, lost: BaseException) -> BaseException:
        return lost if job.terminated else self._deaths.judge(job.callbacks.get("error_callback"), lost)

    def _on_broken(self, why: str) -> None:
        """No workers any more: the node ends. What had started is lost with them; the rest is the broker's again."""
        logger.critical("the workers cannot start: %s", why)
        worker_state.should_stop = EX_BROKEN
        text = f"Worker exited prematurely: the pool has ended: {why.splitlines()[0] if why else ''}"
        for job in list(self._jobs.values()):
            self._end(job, "error_callback" if job.pid else "taken_back", _einfo(WorkerLostError(text), text))

    def _end(self, job: Job, which: str, *args: Any, **kwargs: Any) -> None:
        """The one terminal callback of a job, then its slot is free."""
        self._jobs.pop(job.id, None)
        self._ending = job
        try:
            if which == "callback":
                self._call(job, which, *args, **kwargs)
            elif (function := job.callbacks.get(which)) is not None:
                self._failures.report(function, *args, **kwargs)
        finally:
            if self._slots is not None:
                self._slots.release()
            if self._semaphore is not None:
                self._semaphore.release()  # may come back at once with the next job

    def _call(self, job: Job, which: str, *args: Any, **kwargs: Any) -> None:
        function = job.callbacks.get(which)
        if function is not None:
            function(*args, **kwargs)

    def _log_of(self, task_id: str) -> bytes:
        for job in (self._ending, *list(self._jobs.values())):
            if job is not None and job.task_id == task_id:
                return job.log or self.handle.log_of(job.id)
        return b""

    # -- size ----------------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """``pool_restart``: every process is replaced once its task is done, and loads the application anew. Where that
        is in this process only, they are copied from it once more, if nothing runs: all at once."""
        is_copied = self.handle.options.start_method == "fork" and (self._only_here or child.local_tasks(self.app))
        deadline = time.monotonic() + _RENEWAL_PATIENCE
        while is_copied and time.monotonic() < deadline:
            if self.handle.renew():
                return
            if threading.current_thread() is self._loop_thread:
                self._step(0.01)
            else:  # a test's, which would call back beside the loop
                time.sleep(0.01)
        if is_copied:
            logger.warning(
                "pool_restart: the application as it is now is in this process only, and tasks run: processes are "
                "replaced once theirs is done, but with the code that this node was started with"
            )
            self.handle.restart()
        else:
            modules = {task.__module__ for name, task in self.app.tasks.items() if not name.startswith("celery.")}
            self.handle.restart(**self._describe(sorted(modules - {"__main__"}))[1])
        self._loop.watch_writing()

    @property
    def num_processes(self) -> int:
        return int(self.limit)

    def grow(self, n: int = 1) -> None:
        """Raises:
        ValueError: that is no number of processes to add.
        """
        if n < 0:
            raise ValueError(f"cannot add {n} processes; pool_shrink takes some away")
        self._resize(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        """Raises:
        ValueError: there are not that many, or it is no such number.
        """
        if not 0 <= n <= self.limit:
            raise ValueError(f"cannot take {n} of {self.limit} processes away")
        self._resize(self.limit - n)

    def _resize(self, size: int) -> None:
        change, self.limit = size - self.limit, size
        for semaphore in (self._semaphore, self._slots):
            if semaphore is not None and change:
                (semaphore.grow if change > 0 else semaphore.shrink)(abs(change))
        warn_beyond(self._slot_env, size)
        self.handle.resize(size)
        self._loop.watch_writing()

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        workers = self.handle.workers
        info.update(
            {
                "max-concurrency": self.limit,
                "processes": [worker["pid"] for worker in workers if not worker["lane"]],
                "max-tasks-per-child": self.options.get("maxtasksperchild") or "N/A",
                "put-guarded-by-semaphore": self.putlocks,
                "timeouts": list(self._timeouts),
                "writes": "N/A",
                "start-method": self._start_method,
                "dispatcher": self.handle.pid,
                "callbacks": [worker["pid"] for worker in workers if worker["lane"] == Lane.HOOKS],
                "shipper": [worker["pid"] for worker in workers if worker["lane"] == Lane.SERVICE],
                "unfinished": len(self._jobs),
                "dead-messages": self._deaths.given_up,
                "results": self._bell.counts() if self._bell else {},
            }
        )
        return info


def _settle_concurrency(sender: Any, **_: Any) -> None:
    """``-c auto`` (Celery 5.7), which minds the control group's quota for Celery's own pool only."""
    asked = str(sender.concurrency).strip().lower()
    if asked == "auto" and issubclass(get_implementation(sender.pool_cls), TaskPool):
        from celery.utils.sysinfo import cpu_budget

        budget = cpu_budget(use_cgroup_quota=True)
        quota = "no cgroup cpu quota found" if budget.quota is None else f"cgroup cpu quota={budget.quota:.2f}"
        told = "worker_concurrency='auto' resolved to %d (pool=mpworker, %s, available cpus=%d)."
        sender.concurrency = budget.count
        sender._pending_concurrency_log = "info", told, (budget.count, quota, budget.available)


signals.worker_init.connect(_settle_concurrency, weak=False, dispatch_uid="mpworker.concurrency")


class _Slots:
    """A counting semaphore whose size can change, for callers that block until a worker is free."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._changed = threading.Condition()

    def acquire(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0)
            self._free -= 1

    def release(self) -> None:
        self.grow(1)

    def grow(self, n: int) -> None:
        with self._changed:
            self._free += n
            self._changed.notify_all()

    def shrink(self, n: int) -> None:
        with self._changed:
            self._free -= n


def _sendable(args: Any) -> tuple[Any, ...]:
    """The arguments of Celery's trace function without what the child decodes itself and what cannot travel."""
    name, task_id, request, body, content_type, encoding = args
    body = bytes(body) if isinstance(body, memoryview) else body
    return name, task_id, child.without_arguments(request), body, content_type, encoding


def _tamed(value: Any) -> Any:
    """What Celery's trace function returned, without an exception that would end the main process.

    Celery raises a task's MemoryError, SystemExit or KeyboardInterrupt again where it hears of it, as if it were its
    own. The task's state has been stored by then, with the real one.
    """
    try:
        failed, info, runtime = value
    except (TypeError, ValueError):
        return value
    if failed and isinstance(info, ExceptionInfo):
        exc = info.exception.exc if isinstance(info.exception, ExceptionWithTraceback) else info.exception
        if isinstance(exc, MemoryError | SystemExit | KeyboardInterrupt):
            info.exception = RemoteError(type(exc).__name__, str(exc))
    return failed, info, runtime


def _left(exc: BaseException) -> BaseException:
    """A task that asked to leave: Celery knows that since 5.7; before, it would take it for its own."""
    if not isinstance(exc, SystemExit | KeyboardInterrupt):
        return exc
    code: object = (exc.code or 0) if isinstance(exc, SystemExit) else type(exc).__name__
    lost: BaseException = WorkerLostError(
        f"Worker exited prematurely: {human_status(code) if isinstance(code, int) else code}."
    )
    return lost


def _as_given(limit: float, given: float) -> float:
    """The same number of seconds: ``1`` where 1 was given, and not ``1.0``."""
    return given if given == limit else limit


def _obituary(lost: Any) -> str:
    """What prefork says of a lost worker, for those who look for its words, and what else is known."""
    code = -lost.signal if getattr(lost, "signal", None) else getattr(lost, "exitcode", None)
    return f"Worker exited prematurely: {lost if code is None else f'{human_status(code)}: {lost}'}"


def _einfo(exc: BaseException, text: str = "") -> ExceptionInfo:
    """What Celery expects around an exception; the traceback is the given text, or the child's."""
    if isinstance(exc, MemoryError):
        text = text or getattr(exc.__cause__, "text", "")
        exc = RemoteError("MemoryError", str(exc))
    remote = text or getattr(exc.__cause__, "text", "")
    exc.__cause__ = None if remote else exc.__cause__
    try:
        raise exc
    except BaseException:
        info = ExceptionInfo()
    if remote:
        info.traceback, info.exception = remote, exc
    return info
