"""The parent's end of a pool: submit, cancel, fileno, drain.

Owns the line to the dispatcher, what has been submitted and is not finished, and the dispatcher's replacement when it
dies. Starts no thread, never blocks (but for the time a flush is given), calls nobody back: whoever drives it reads
events.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

from mpworker.errors import BootError, ProtocolError
from mpworker.pool import boot as booting
from mpworker.pool import fleet, linux
from mpworker.pool.bulk import Bulk
from mpworker.pool.frames import (
    CHUNK,
    LONGEST_WAIT,
    Frame,
    FrameReader,
    Kind,
    Outbox,
    carry,
    carrying,
    encode,
    header,
    pack_start,
    unpack_start,
)
from mpworker.pool.heirlooms import Heirlooms
from mpworker.pool.jobs import Lane, pack_span
from mpworker.pool.page import Page, results, who_ran, whole
from mpworker.pool.parcel import Outcome, open_verdict, pack_verdict
from mpworker.states import JobState

logger = logging.getLogger("mpworker.pool")

#: Dispatchers that may end in a row without one of them having had a ready worker: by themselves, or killed by others.
_MAX_RESTARTS = 3
_MAX_KILLS = 100
#: Seconds before the next start after several deaths in a row: a machine without memory gets time.
_PAUSES = (0.0,) * 5 + (0.1, 0.2, 0.5, 1.0, 2.0)
#: How often a new dispatcher is tried when the system refuses, and the seconds between two tries.
_START_TRIES = 10
_START_PAUSE = 0.5
#: Seconds that a dispatcher gets to end everything.
_KILL_TIMEOUT = 4.0
#: Seconds that its workers may take to end after it was killed.
_LAST_BREATH = 0.5
#: What bytes or words without a sense raise.
_SENSELESS = (ProtocolError, ValueError, LookupError, TypeError, OverflowError, struct.error)
#: Reads per :meth:`Handle.drain`, so that one busy pool does not take over an event loop.
_READS_PER_DRAIN = 8
_JOIN_BELOW = 1 << 16
#: Jobs that travel in one bundle, and the bytes of a call that may.
_BUNDLE = 256
_SMALL = 2048
#: What a callback is told if a new dispatcher has to run it, and its result got lost.
_UNHEARD = pack_verdict(JobState.LOST, by_pool=True, why="its result could not be received")
#: A small job without callbacks: its number, its call, soft and hard limit.
_Plain = tuple[int, bytes, tuple[float, float]]


class PoolOptions(NamedTuple):
    """What a dispatcher is told. Times in seconds, memory in bytes, 0 for no limit."""

    size: int
    start_method: str = "auto"
    ready_timeout: float = 120.0
    callback_limit: float = 60.0
    max_tasks: int = 0
    #: peak after which a worker is replaced, between tasks
    max_memory: int = 0
    #: for a task, while it runs, that brings no limit of its own
    memory_limit: int = 0
    #: a successor is started before its predecessor has gone
    warm: bool = True
    #: of what a job says, kept in memory that outlives its process
    task_log: int = 0
    #: what children are told of has a service
    service: bool = False
    label: str = ""

    def to_json(self, heirlooms: Iterable[int] = ()) -> bytes:
        return json.dumps(self._asdict() | {"heirlooms": list(heirlooms)}).encode()


@final
class _Sent(NamedTuple):
    """A job that has no terminal event yet; its frame is kept until it has started, for a new dispatcher."""

    pieces: tuple[bytes, ...] | None
    hooks: bytes
    pid: int = 0
    #: when it started, by ``time.monotonic()``
    at: float = 0.0


class Handle:
    """One pool, seen from the process that uses it. Events come from one thread; the other methods are safe in any.

    Args:
        options: for the dispatcher.
        boot: from :func:`mpworker.pool.boot.describe`.
        heirlooms: what that has collected; closed with the pool.
        lent: descriptors of the caller's that all of the pool's processes shall inherit under the same numbers.
    """

    def __init__(
        self, options: PoolOptions, boot: bytes, heirlooms: Heirlooms | None = None, lent: Sequence[int] = ()
    ) -> None:
        self.options = options
        #: the processes, as the dispatcher last told: dicts with pid, slot, lane
        self.workers: list[dict[str, int]] = []
        #: how many of those for tasks are ready, spares included
        self.ready_workers = 0
        #: rises when the dispatcher, and with it :meth:`fileno`, has been replaced
        self.generation = 0
        #: entered while this process forks a dispatcher
        self.while_forking: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        self.finished = False
        self.ready = False
        self._boot, self._heirlooms, self._lent = boot, heirlooms or Heirlooms(), lent
        #: a number for a job that is about to be submitted
        self.next_id: Callable[[], int] = itertools.count(1).__next__
        self._sent: dict[int, _Sent | _Plain] = {}
        self._loose: deque[_Plain] = deque()  # sent by the next flush
        #: callbacks that have not ended, in order: hooks, kind of outcome, outcome; ``None`` once it runs
        self._hooked: dict[int, tuple[bytes, int, bytes] | None] = {}
        self._limits = 0.0, 0.0
        self._outbox = Outbox()
        self._flushing = threading.Lock()
        #: what is noted here and what is put into the outbox change together
        self._mutex = threading.RLock()
        self._received: list[int] = []  # descriptors of pages
        self._reader = FrameReader("the dispatcher", forgiving=True, others=self._received)
        self._pages: dict[int, Page] = {}  # by worker
        self._listed: set[int] = set()
        self._process: Any = None
        self._line: socket.socket | None = None
        self._closing: Kind | None = None
        self._restarts = 0
        self._renews = False
        self._size = options.size
        self._flushed = self._flush_asked = 0

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the dispatcher."""
        forked = self.options.start_method == "fork"
        launch = fleet.launch_forked if forked else fleet.launch
        fds = [*self._heirlooms.fds, *self._lent]
        with self.while_forking() if forked else contextlib.nullcontext():
            self._process, self._line = launch(fds) if fds else launch()
        self._reader = FrameReader("the dispatcher", forgiving=True, others=self._received)
        self._outbox = Outbox()
        self._loose.clear()
        self._outbox.put(encode(Kind.BOOT, flag=int(self.ready), extra=self.options.to_json(fds), body=self._boot))
        if self._size != self.options.size:
            self._outbox.put(encode(Kind.RESIZE, self._size))
        self.flush()

    @property
    def pid(self) -> int | None:
        """Of the dispatcher."""
        return self._process.pid if self._process is not None else None

    def fileno(self) -> int:
        """Readable when :meth:`drain` has something to tell; -1 when all is over. Changes with :attr:`generation`."""
        line = self._line  # another thread may drop it
        return line.fileno() if line is not None else -1

    @property
    def pending(self) -> int:
        """Jobs without a terminal event."""
        return len(self._sent)

    def close(self) -> None:
        """Nothing more will be submitted: the pool finishes everything, callbacks included, and ends."""
        self._wind_down(Kind.DRAIN)

    def terminate(self) -> None:
        """Ends the pool now; unfinished jobs are cancelled, their callbacks still run."""
        self._wind_down(Kind.STOP)

    def _wind_down(self, kind: Kind) -> None:
        if self._closing is not Kind.STOP:
            self._closing = kind
            self._send(encode(kind))

    def kill(self) -> None:
        """The last resort: drops the line; the dispatcher ends everything and itself. Waits for it, a few seconds."""
        self.finished = True
        with self._mutex:  # a new dispatcher may be about to be started
            line, self._line = self._line, None  # at once: another thread may be at it
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)  # a fork of ours may hold it too
            line.close()
        if self._process is not None:
            try:
                self._process.wait(_KILL_TIMEOUT)
            except subprocess.TimeoutExpired:  # stopped, or stuck: its children die with it
                self._process.kill()
                self._process.wait()
        self._let_go()

    def _let_go(self) -> None:
        """All is over: what had been kept for another dispatcher is needed no more."""
        self._heirlooms.close()
        self._close_pages()
        with self._mutex:
            self._sent.clear()
            self._hooked.clear()
            self._loose.clear()
            self._outbox = Outbox()

    def _close_pages(self) -> None:
        pages, self._pages = self._pages, {}  # at once: another thread may be at it
        for page in list(pages.values()):
            page.close()

    # -- asking --------------------------------------------------------------------------------------------------

    def submit(
        self,
        job: int,
        body: bytes,
        soft: float = 0.0,
        hard: float = 0.0,
        memory: int = 0,
        hooks: bytes = b"",
        *,
        held: bool = False,
    ) -> None:
        """Hands over a packed call.

        Args:
            job: from :meth:`next_id`; its events carry it.
            body: from :func:`mpworker.pool.parcel.pack_call`.
            soft, hard: limits in seconds, 0 for none.
            memory: limit in bytes, 0 for the pool's own.
            hooks: from :func:`mpworker.pool.callbacks.pack_hooks`.
            held: the caller will call :meth:`flush`; until then, small ones gather to travel as one.
        """
        if held and not hooks and not memory and len(body) < _SMALL:
            limits = soft, hard
            if limits != self._limits:  # most have the same, and share it
                self._limits = limits
            plain = job, body, self._limits
            with self._mutex:
                self._sent[job] = plain
                self._loose.append(plain)
            return
        pieces = _submission(job, Lane.TASKS, 0, soft, hard, hooks, body)
        if memory:
            pieces = encode(Kind.MEMORY, job, a=memory), *pieces
        with self._mutex:
            self._sent[job] = _Sent(pieces, hooks)
            self._gather()
            self._outbox.put(*pieces)
        if not held:
            self.flush()

    def call_hooks(self, job: int, hooks: bytes, flag: Outcome, body: bytes) -> None:
        """Runs a callback in the callback process with an outcome that the caller knows; HOOK_ENDED follows."""
        pieces = _submission(job, Lane.HOOKS, flag, 0.0, self.options.callback_limit, hooks, body)
        with self._mutex:
            self._hooked[job] = hooks, flag, body
            self._outbox.put(*pieces)
        self.flush()

    def cancel(self, job: int, signum: int = signal.SIGTERM, grace: float = 0.5) -> None:
        """Ends a job, wherever it is; never touches another. Its terminal event follows.

        Args:
            signum: sent to the worker's group if the job runs. SIGUSR1 raises the soft limit's exception.
            grace: seconds until SIGKILL follows; 0 for never.
        """
        self._send(encode(Kind.CANCEL, job, signum, a=grace))

    def resize(self, size: int) -> None:
        """Sets the number of workers; surplus ones leave after their current job."""
        self._size = size
        self._send(encode(Kind.RESIZE, size))

    def restart(self, **description: Any) -> None:
        """Replaces every worker once its current job is done.

        Args:
            description: keywords of :func:`mpworker.pool.boot.describe`, of the application as it is now, which is
                loaded anew; none: workers are made as before.
        """
        if description:
            self._boot = booting.describe(label=self.options.label, heirlooms=self._heirlooms, **description)
        self._send(encode(Kind.RESTART, body=self._boot if description else b""))

    def renew(self) -> bool:
        """Another dispatcher, made of this process as it is now where the start method is "fork", and with it workers.

        Returns:
            ``False`` if there is something that this would cost its process; nothing has been done then.
        """
        with self._mutex:
            if self._sent or self._hooked or self._renews or self._process is None or self.finished:
                return self._renews
            self._renews = True  # before it ends: another thread may be hearing it
            self._process.kill()
        return True

    def _send(self, *pieces: bytes) -> None:
        self._gather()
        self._outbox.put(*pieces)
        self.flush()

    def _gather(self) -> None:
        """Puts what is loose into the outbox. A signal handler may submit, and do the same, in the middle of it."""
        loose = self._loose
        while loose:
            with self._mutex, contextlib.suppress(IndexError):
                job, body, limits = loose.popleft()
                calls, follows = [body], job
                try:
                    while (follows := follows + 1) < job + _BUNDLE:
                        after, _, same = loose[0]
                        if after != follows or same != limits:
                            break
                        calls.append(loose.popleft()[1])
                finally:
                    self._outbox.put(pack_span(job, *limits, calls))

    @property
    def loose(self) -> int:
        """Small jobs that gather for the next flush."""
        return len(self._loose)

    @property
    def waiting(self) -> int:
        """Pieces that have not been sent."""
        return len(self._outbox) + len(self._loose)

    @property
    def wants_write(self) -> bool:
        """Something waits for the dispatcher to read: call :meth:`flush` when :meth:`fileno` is writable."""
        return bool(self._outbox or self._loose)

    def flush(self, gather: bool = True) -> bool:
        """Sends what the dispatcher takes; ``True`` when nothing is left. Re-entrant: a signal handler may submit.

        Args:
            gather: also what still waits for company.
        """
        if gather:
            self._gather()
        while self._outbox:
            if not self._flushing.acquire(blocking=False):
                return False  # whoever is at it will see what we appended
            try:
                line = self._line
                if line is None or not self._outbox.flush(line.send, carrying(line)):
                    return False
            except OSError:  # the dispatcher died; drain() notices
                return False
            finally:
                self._flushing.release()
        return True

    # -- hearing -------------------------------------------------------------------------------------------------

    def drain(self, starts: bool = True) -> Iterator[Frame]:
        """Yields what has happened since. Never blocks.

        Args:
            starts: each DONE comes after a STARTED. Else that is left out where both are known at the same time.

        That is STARTED, SOFT, PROGRESS, CUT, DONE, ENDED, HOOK_QUEUED, HOOK_ENDED, LOG and BROKEN. What a job had said
        is the ``extra`` of its ENDED.

        Each job has exactly one DONE or ENDED; what comes for it afterwards is dropped.
        """
        for _ in range(_READS_PER_DRAIN):
            line = self._line
            data = self._reader.receive(line) if line is not None else None
            while self._received:
                with contextlib.suppress(OSError, ProtocolError):
                    page = Page(self._received.pop(0))
                    self._pages[page.worker] = page
            if data is None:
                return
            fault: ProtocolError | None = None
            try:
                frames = self._reader.feed(data)
            except ProtocolError as exc:  # what came before counts
                frames, fault = list(exc.before), exc
            if self._reader.arrivals.claimed:
                frames = self._confirm(frames)
            try:
                for frame in frames:
                    if frame.kind is Kind.RESULTS and not whole(frame):
                        raise ProtocolError("the dispatcher sent damaged results")
                    if frame.kind is Kind.RESULTS and not starts:
                        yield frame
                        continue
                    if frame.kind is Kind.RESULTS:
                        yield from self._one_by_one(frame)
                        continue
                    start = unpack_start(frame) if starts and frame.kind is Kind.DONE else None
                    if self._note(frame):
                        if start is not None:
                            yield start
                        yield self._with_log(frame)
                if fault is not None:
                    raise fault
            except _SENSELESS as exc:
                logger.critical("the dispatcher cannot be understood (%s); it is replaced", exc)
                self._process.kill()
                data = b""
            if not data:
                yield from self._lost_dispatcher()
                return
            if len(data) < CHUNK:
                return  # that was all; else the line is still readable

    def _confirm(self, frames: list[Frame]) -> list[Frame]:
        """Says which large results have arrived: until then the dispatcher keeps them, and counts them as waiting. For
        one that this process had no descriptor left it is asked again, and then it comes in bytes.

        Returns:
            the frames without those that come again.
        """
        claimed, self._reader.arrivals.claimed = self._reader.arrivals.claimed, []
        lost = [frame for frame in frames if type(frame.body) is Bulk and frame.body.fd < 0]
        kinds = (frame.kind for frame in lost)
        flags = [is_lost and next(kinds) is Kind.DONE for is_lost in claimed]
        self._send(*(encode(Kind.GOT, flag=int(flag)) for flag in flags))
        if not lost:
            return frames
        for frame in lost:
            # It has run, and its callback may run before the frame is here again.
            if frame.kind is Kind.DONE and (start := unpack_start(frame)) is not None:
                self._note(start)
            sent = self._sent.get(frame.job)
            if frame.kind is Kind.DONE and type(sent) is _Sent and sent.hooks:
                self._hooked[frame.job] = sent.hooks, Outcome.VERDICT, _UNHEARD
                self._sent[frame.job] = sent._replace(hooks=b"")
        left = [frame for frame in frames if frame.kind is not Kind.DONE or frame not in lost]
        return [frame._replace(flag=Outcome.VERDICT, body=_UNHEARD) if frame in lost else frame for frame in left]

    def took(self, job: int) -> bool:
        """A job of a RESULTS frame is being settled.

        Returns:
            ``False`` if it has had its end.
        """
        return self._sent.pop(job, None) is not None

    def _one_by_one(self, frame: Frame) -> Iterator[Frame]:
        pid, max_rss = who_ran(frame)
        for job, flag, started, runtime, body in results(frame):
            done = Frame(Kind.DONE, job, flag, runtime, max_rss, pack_start(started, pid), body)
            if self._note(done):
                yield unpack_start(done) or done
                yield done

    def _note(self, frame: Frame) -> bool:
        kind = frame.kind
        if kind is Kind.STARTED:
            sent = self._sent.get(frame.job)
            if sent is None:
                return False
            hooks = sent.hooks if type(sent) is _Sent else b""
            self._sent[frame.job] = _Sent(None, hooks, int(frame.b), frame.a)
        elif kind in (Kind.DONE, Kind.ENDED):
            sent = self._sent.pop(frame.job, None)
            if type(sent) is _Sent and sent.hooks:
                self._hooked[frame.job] = sent.hooks, frame.flag, frame.body
            return sent is not None
        elif kind is Kind.HOOK_QUEUED:
            self._hooked[frame.job] = frame.extra, frame.flag, frame.body
        elif kind is Kind.HOOK_STARTED:
            self._hooked[frame.job] = None
            return False
        elif kind is Kind.HOOK_ENDED:
            self._hooked.pop(frame.job, None)
        elif kind in (Kind.SOFT, Kind.PROGRESS, Kind.CUT):
            return frame.job in self._sent
        elif kind is Kind.WORKERS:
            told = json.loads(frame.body)
            listed = set(told["pages"])
            self.workers, self.ready_workers = list(told["workers"]), int(told["ready"])
            self._listed, listed = listed, self._listed
            for worker in self._pages.keys() & listed - self._listed:  # a page comes before its name
                self._pages.pop(worker).close()
            if any(worker["lane"] != Lane.SERVICE for worker in self.workers):
                self.ready, self._restarts = True, 0
            return False
        elif kind is Kind.FLUSHED:
            self._flushed = frame.job
            return False
        elif kind in (Kind.BYE, Kind.BROKEN):
            self.finished = True
        elif kind is not Kind.LOG:
            raise ProtocolError(f"the dispatcher sent a {kind.name} frame, which is not its to send")
        return True

    def _lost_dispatcher(self) -> Iterator[Frame]:
        """The line has ended: after BYE or BROKEN as expected, else the dispatcher died and is replaced."""
        line, self._line = self._line, None
        if line is not None:
            line.close()
        code = self._process.wait()
        if not self.finished:
            yield from self._read_pages()
            yield from self._bury_started()
        self._close_pages()
        self._listed.clear()
        self.workers = []
        if self.finished:
            self._let_go()
            return
        self._flushed = self._flush_asked
        renews, self._renews = self._renews, False
        self._restarts += not renews
        if self._restarts > (_MAX_KILLS if code == -signal.SIGKILL else _MAX_RESTARTS):
            self.finished = True
            self._let_go()
            yield Frame(Kind.BROKEN, body=f"the dispatcher died {self._restarts} times in a row, exit {code}".encode())
            return
        if not renews:
            logger.error("the dispatcher died (exit %s); a new one takes over %d unstarted jobs", code, len(self._sent))
            time.sleep(_PAUSES[min(self._restarts, len(_PAUSES)) - 1])
        with self._mutex:
            if self.finished:  # killed meanwhile
                return
            if not self._restart():
                self.finished = True
                self._let_go()
                yield Frame(Kind.BROKEN, body=b"the dispatcher died and no new one can be started")
                return
            self.generation += 1
            for sent in self._sent.copy().values():
                if type(sent) is _Sent:
                    self._gather()
                    self._outbox.put(*(sent.pieces or ()))
                else:
                    self._loose.append(sent)
            self._gather()
            for job, call in self._hooked.copy().items():
                if call is not None:
                    hooks, flag, body = call
                    limit = self.options.callback_limit
                    self._outbox.put(*_submission(job, Lane.HOOKS, flag, 0.0, limit, hooks, body))
            if self._closing is not None:
                self._outbox.put(encode(self._closing))
        self.flush()

    def _read_pages(self) -> Iterator[Frame]:
        """What the dispatcher had no time to tell: results that still wait in a page, and what else has started."""
        end = time.monotonic() + _LAST_BREATH
        while any(map(linux.alive, (worker["pid"] for worker in self.workers))) and time.monotonic() < end:
            time.sleep(0.001)  # they are killed with the dispatcher, but each ends for itself
        for page in self._pages.values():
            for frame in page.left():
                yield from self._one_by_one(frame)
            running, started = page.running()
            for job in page.started():
                if (sent := self._sent.get(job)) is not None:
                    hooks = sent.hooks if type(sent) is _Sent else b""
                    self._sent[job] = _Sent(None, hooks, page.pid, started if job == running else time.monotonic())

    def _restart(self) -> bool:
        for _ in range(_START_TRIES):
            if self.finished:
                break
            try:
                self.start()
                return True
            except OSError as exc:  # no memory, no descriptor, no process: it may pass
                logger.error("a new dispatcher cannot be started: %s; trying again", exc)
                time.sleep(_START_PAUSE)
        return False

    def _bury_started(self) -> Iterator[Frame]:
        """What ran when the dispatcher died has died with it; what had not started, the next one starts."""
        facts = {"by_pool": True, "why": "the dispatcher died"}
        for job, call in self._hooked.copy().items():
            if call is None:
                self._hooked.pop(job, None)
                yield Frame(Kind.HOOK_ENDED, job, Outcome.VERDICT, body=pack_verdict(JobState.LOST, **facts))
        taken_back = pack_verdict(JobState.CANCELLED, reason="taken back before it started")
        for job, sent in self._sent.copy().items():
            waiting = type(sent) is not _Sent or sent.pieces is not None
            if waiting and self._flushed < self._flush_asked:
                self._sent.pop(job, None)
                yield Frame(Kind.ENDED, job, Outcome.VERDICT, body=taken_back)
            elif type(sent) is _Sent and not waiting:
                self._sent.pop(job, None)
                runtime = max(0.0, time.monotonic() - sent.at)
                body = pack_verdict(JobState.LOST, pid=sent.pid, runtime=runtime, **facts)
                if sent.hooks:
                    self._hooked[job] = sent.hooks, Outcome.VERDICT, body
                yield self._with_log(Frame(Kind.ENDED, job, Outcome.VERDICT, body=body))

    def log_of(self, job: int) -> bytes:
        """What a job has said that runs, or whose process has just ended; nothing without ``task_log``."""
        for page in list(self._pages.values()):
            with contextlib.suppress(ValueError):  # closed meanwhile
                if page.tail is not None and (said := page.tail.read(job)):
                    return said
        return b""

    def _with_log(self, frame: Frame) -> Frame:
        if frame.kind is Kind.ENDED and self.options.task_log:
            return frame._replace(extra=self.log_of(frame.job))
        return frame

    def wait(self, timeout: float) -> bool:
        """Blocks until :meth:`drain` may have something, or :meth:`flush` may go on; for callers without a loop.

        Args:
            timeout: seconds.
        """
        fd = self.fileno()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        try:
            found = poll.poll(min(max(0.0, timeout), LONGEST_WAIT) * 1000)
        except OSError:
            return False
        if any(mask & select.POLLOUT for _, mask in found):
            self.flush()
        return bool(found)

    def take_back(self) -> int:
        """Cancels what has not started: their ENDED events follow, then :meth:`has_taken_back` says so.

        Returns:
            a token for :meth:`has_taken_back`.
        """
        token = self._flush_asked = self.next_id()
        self._send(encode(Kind.FLUSH, token))
        return token

    def has_taken_back(self, token: int) -> bool:
        """Whether everything unstarted when :meth:`take_back` was called has had its event (or the pool has ended)."""
        return self._flushed >= token or self.fileno() < 0


def _submission(
    job: int, lane: Lane, flag: int, soft: float, hard: float, hooks: bytes, body: bytes
) -> tuple[bytes, ...]:
    if type(body) is Bulk:
        return (carry(Frame(Kind.SUBMIT, job, lane << 4 | flag, soft, hard, hooks, body)),)
    head = header(Kind.SUBMIT, job, lane << 4 | flag, soft, hard, len(hooks), len(body))
    return (head + hooks + body,) if len(body) < _JOIN_BELOW else (head + hooks, body)


def boot_error(frame: Frame) -> BootError:
    """The error that a BROKEN frame stands for."""
    return BootError(frame.body.decode(errors="replace"))


def verdict_of(frame: Frame) -> tuple[JobState, dict[str, Any]]:
    """What an ENDED frame says."""
    return open_verdict(frame.body)


def make(options: PoolOptions, lent: Sequence[int] = (), **description: Any) -> Handle:
    """A handle whose children are described by the keywords of :func:`mpworker.pool.boot.describe`."""
    heirlooms, fork = Heirlooms(), options.start_method == "fork"
    try:
        boot = booting.describe(label=options.label, heirlooms=heirlooms, fork=fork, **description)
    except BaseException:
        heirlooms.close()
        raise
    return Handle(options, boot, heirlooms, lent)
