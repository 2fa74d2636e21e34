"""The child: gets ready, then runs one job after another in its main thread.

Owns the task thread. The second thread, which watches the limits, is in :mod:`mpworker.pool.watchdog`. Shares no lock
and no queue with any other process: it has one line for frames and one for its watchdog, and both lead to the
dispatcher.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import pickle
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from fcntl import F_GETFD, fcntl
from math import inf
from signal import ITIMER_REAL, setitimer
from time import monotonic
from types import CoroutineType, FrameType
from typing import Any, NoReturn

from mpworker.errors import MemoryLimitExceeded, PayloadError
from mpworker.pool import boot as booting
from mpworker.pool import callbacks, coroutines, forking, linux
from mpworker.pool.bulk import Bulk
from mpworker.pool.chunks import Run
from mpworker.pool.frames import BATCHED, RATIONED, Frame, FrameReader, Kind, Outbox, carrying, encode, header
from mpworker.pool.jobs import NO_SLOT, Lane, open_span
from mpworker.pool.memory import resident
from mpworker.pool.page import MOST, Page
from mpworker.pool.parcel import Outcome, open_call, pack_error, pack_outcome
from mpworker.pool.watchdog import Watchdog

#: Seconds between two words on a job's progress, if nobody says otherwise, and what a word may hold.
_PROGRESS_PAUSE = 0.1
_PROGRESS_TEXT = 200
#: Exit code of a worker that could not get ready (sysexits.h: EX_SOFTWARE).
EX_UNREADY = 70
_JOIN_BELOW = 1 << 16
_MAX_REVOKED = 1024
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
#: Results that wait for company leave when there are so many …
_COMPANY = MOST // 2
#: … or after so many seconds.
_PATIENCE = 0.004
#: Seconds between two looks whether what was sent before has been heard.
_HEARD_PAUSE = 0.001
#: Bytes that earlier jobs may leave here without a word, and the seconds in which a row of tiny ones cannot leave more.
_CRUMBS = 1 << 20
_READ_PAUSE = 0.02
# Reading a member from its enum takes longer than comparing it.
_BUNDLE, _TASKS, _HOOKS = Kind.BUNDLE, Lane.TASKS, Lane.HOOKS
_new = tuple.__new__
_HAND_BACK = Watchdog.HAND_BACK
#: Seconds below which the memory that a job has used may be told with the job behind it.
_LITTLE = 0.0005
#: Marks a second at most: no job that has started a process ends sooner.
_MARKS = 1000
_MOMENT_BITS = 40
_MOMENT_MASK = (1 << _MOMENT_BITS) - 1


class Current:
    """The job in the task thread. Times are ``time.monotonic()``, limits seconds."""

    #: since when it seems to be long, or 0; and how long its thread had had no processor by then
    slow: float = 0.0
    queued: float = 0.0
    #: it runs for so long that those behind it have been handed back
    long: bool = False
    #: when it may tell its progress again, and what it has not told since
    tell_at: float = 0.0
    untold: tuple[float, float, str] | None = None
    #: its memory limit and what it uses, once that is too much
    over: tuple[int, int] | None = None
    #: it has been interrupted and does not know it yet; and perhaps once more than needed
    unheard: bool = False
    nudged: bool = False

    def __init__(self, job: int, started: float, soft: float, hard: float, batched: bool, quiet: bool) -> None:
        self.job, self.started, self.soft, self.hard = job, started, soft, hard
        self.soft_at, self.hard_at = started + soft if soft else inf, started + hard if hard else inf
        #: others may wait behind it, here or in the pipe
        self.batched = batched
        #: the dispatcher has not been told that it runs
        self.quiet = quiet


class Worker:
    """One worker process.

    Args:
        data: line for frames, blocking.
        control: line that only the watchdog reads.
        page: memory shared with the dispatcher.
        lane: whose jobs it runs.
        slot: its number in the pool, which its replacement inherits.
    """

    def __init__(self, data: socket.socket, control: socket.socket, page: Page, lane: Lane, slot: int) -> None:
        self.data, self.page, self.lane, self.slot = data, page, lane, slot
        #: guards inbox, current, chunk, revoked, doomed: the boundary between two jobs
        self.gate = threading.Lock()
        self.inbox: deque[Frame] = deque()
        self.current: Current | None = None
        #: what the current job is, if it is a chunk of several items
        self.chunk: Run | None = None
        self.revoked: dict[int, None] = {}
        self.doomed = False
        self._fd = data.fileno()
        self._reader = FrameReader("the dispatcher", forgiving=True)
        self._sending = threading.Lock()
        self._unsent = b""
        self._sent_at = 0.0
        self._peak = 0.0
        self.began = -inf  # the last job
        self._fresh = self._kept = 0  # bytes in memory: before the first job; later, beyond that, as last told
        self._read_at = -inf  # when they were last read; nothing large can have happened since, if not -inf
        self._leaving = False
        self._worn = False
        self._interruptible = False
        self._pid = os.getpid()
        self._moment = -1  # that the last mark was made at
        #: seconds between two words on a job's progress
        self.progress_pause = _PROGRESS_PAUSE
        #: hears each of those words as well: job, done, total, message; in any thread
        self.on_progress: Callable[[int, float, float, str], None] | None = None
        #: this is a fork of the worker, which a task has made
        self.forked = False
        self._soft_error: Any = None
        self._soft_due = False
        self._soft_raised: BaseException | None = None
        self.watchdog = Watchdog(self, control)

    # -- life ----------------------------------------------------------------------------------------------------

    def serve(self, boot: booting.Boot, prepared: bool, assume: Callable[[int], None]) -> None:
        """Gets ready and works until told to leave, or until the line ends.

        Args:
            prepared: the application is loaded already.
            assume: called with the slot, if that comes later.
        """
        self.send(encode(Kind.HELLO, self._pid))
        try:
            if not prepared:
                booting.prepare(boot)
            self._soft_error = pickle.loads(boot.soft_error)
            if self.slot == NO_SLOT:
                self._wait_for_slot()
                assume(self.slot)
            if boot.initializer:
                function, args = pickle.loads(boot.initializer)
                function(*args)
        except BaseException as exc:  # sys.exit in an initializer is a failure like any other
            self.send(encode(Kind.UNREADY, body=booting.explain(exc, "a worker's start").encode()))
            raise SystemExit(EX_UNREADY) from None
        signal.signal(signal.SIGUSR1, self._on_soft_limit)
        self.watchdog.start()
        # What is printed is not flushed after each tiny job; a fork must not print it once more.
        os.register_at_fork(before=forking.flush_streams, after_in_child=self._on_fork)
        self._fresh = resident()
        self.send(encode(Kind.READY, self._pid, a=float(linux.native_threads())))
        while (frame := self._next()) is not None:
            self._execute(frame)
        if boot.finalizer:
            function, args = pickle.loads(boot.finalizer)
            function(*args)
        coroutines.close()

    def _on_fork(self) -> None:
        self.forked = True

    def _wait_for_slot(self) -> None:
        """For a spare: blocks until the one is gone whose place it takes."""
        while self.slot == NO_SLOT:
            if not (received := self._reader.receive(self.data)):
                os._exit(0)  # nothing of the user's is open yet
            with self.gate:
                self.take(received)

    def _next(self) -> Frame | None:
        """The next job; blocks. ``None`` when there will be none."""
        while True:
            with self.gate:
                if self.inbox:
                    return self.inbox.popleft()
            if self._leaving:
                return None
            self.send()
            if not (received := self._reader.receive(self.data)):
                return None
            with self.gate:
                self.take(received)

    def take(self, received: bytes) -> None:
        """Sorts received bytes into the inbox. The caller holds the gate."""
        for frame in self._reader.feed(received):
            if frame.kind is Kind.JOB:
                self.inbox.append(frame)
            elif frame.kind is Kind.BUNDLE:
                span = open_span(frame, "the dispatcher")
                soft, hard = span.soft, span.hard
                self.inbox.extend(
                    [_new(Frame, (_BUNDLE, job, BATCHED, soft, hard, b"", call)) for job, call in span.calls()]
                )
            elif frame.kind is Kind.LEAVE:
                self._leaving = True
            elif frame.kind is Kind.TURN:
                self.slot = frame.job

    def send(self, *pieces: bytes) -> None:
        """Writes whole frames, behind those that waited for company. Blocks while the pipe is full."""
        try:
            with self._sending:
                self._take_results()
                for piece in pieces:
                    if len(self._unsent) + len(piece) < _JOIN_BELOW:
                        self._unsent += piece
                    else:
                        self._send_unsent()
                        self.data.sendall(piece)
                self._send_unsent()
        except OSError:  # the dispatcher is gone, and so is the reason to live
            os._exit(EX_UNREADY)

    def _send_bulk(self, frame: Frame) -> None:
        """As :meth:`send`, for a frame whose body is a descriptor."""
        self.send()
        box = Outbox()
        box.put_frame(frame)
        try:
            with self._sending:
                box.flush(self.data.send, carrying(self.data))
        except OSError:
            os._exit(EX_UNREADY)

    def _send_unsent(self) -> None:
        unsent, self._unsent = self._unsent, b""
        if unsent:
            self.data.sendall(unsent)

    def _take_results(self) -> None:
        """What waits in the page leaves with what is sent next."""
        page = self.page
        if page.waiting and not page.has_sheet:
            self._send_unsent()
            while not page.has_sheet:  # the dispatcher is far behind, or will never hear us again
                self._wait_until_heard()
        self._take_results_now()

    def _take_results_now(self) -> None:
        if (page := self.page).waiting and page.has_sheet:
            self._unsent += page.pack(self._peak)
            page.forget()

    def _wait_until_heard(self) -> None:
        line = select.poll()
        line.register(self._fd, 0)
        if line.poll(_HEARD_PAUSE * 1000):  # it has hung up
            os._exit(EX_UNREADY)

    def send_now(self, frame: bytes, patience: float) -> bool:
        """From who must not wait long: what waited for company, and one small frame; or not at all."""
        if not self._sending.acquire(timeout=patience):
            return False
        try:
            self._take_results_now()
            if data := self._unsent + frame:
                self._unsent = data[self.data.send(data, socket.MSG_DONTWAIT) :]
            return True
        except OSError:
            return False
        finally:
            self._sending.release()

    # -- one job -------------------------------------------------------------------------------------------------

    def _execute(self, frame: Frame) -> None:
        """One job. What each of a bundle's tiny ones needs is done here, without calls where they can be spared."""
        kind, job, flag, soft, hard, _, body = frame
        lost = type(body) is Bulk and body.fd < 0
        quiet = kind is _BUNDLE
        if quiet and self._unsent:
            self.send()
        started = monotonic()
        self._soft_due, self._soft_raised = False, None
        self.began = started
        current = Current(job, started, soft, hard, flag & BATCHED != 0, quiet)
        with self.gate:
            if not (revoked := lost or job in self.revoked or self._worn):
                self.current = current
        if revoked:
            self.revoked.pop(job, None)
            self.send(encode(Kind.RETURNED, job, int(lost)))
            return
        if soft or flag & RATIONED:
            self._arm()
        if flag & RATIONED and (self._kept or started > self._read_at + _READ_PAUSE):
            self._tell_kept(started)
        page = self.page
        if (moment := int(started * _MARKS)) != self._moment:
            self._mark(moment)
        if not quiet:
            self.send(encode(Kind.STARTED, job, a=started))
        page.begin(job, started)  # last: if the line is gone, the one before has done that, and this one has not begun
        alarm = min(started + _HAND_BACK if current.batched else inf, current.soft_at, current.hard_at)
        if alarm < self.watchdog.wakes_at:
            self.watchdog.wake(alarm)
        flag, body = self._run(frame)
        if self.forked:
            os._exit(0)  # the task forked and its child came back here
        if current.untold is not None:
            with self._sending:  # another thread of the task may be about to send it
                word, current.untold = current.untold, None
                if word is not None:
                    self._unsent += _progress(job, word)
        with self.gate:
            self.current = None
            doomed = self.doomed
        setitimer(ITIMER_REAL, 0)  # an alarm that the task has left must not strike the next one
        while doomed:
            signal.pause()  # the watchdog is about to end this process; its word on the job stands
        runtime = monotonic() - started
        if runtime > _LITTLE:
            self._read_at = -inf
        if self.lane is _TASKS and self._keep(current, flag, runtime, body):
            return
        page.end()
        forking.flush_streams()
        self._report(job, flag, runtime, body)

    def _keep(self, ran: Current, flag: int, runtime: float, body: bytes) -> bool:
        """Puts a result into the page, where it waits for others, but not long. ``False``: it is too large for that."""
        try:
            fcntl(self._fd, F_GETFD)
        except OSError:  # the job has closed our line: no result of it counts, and those of others are in the page
            os._exit(EX_UNREADY)
        page = self.page
        while True:
            with self._sending:
                if kept := page.add(ran.job, flag, ran.started, runtime, body):
                    page.end()
            if kept:
                break
            if not page.waiting:
                if ran.quiet:
                    self.send(encode(Kind.STARTED, ran.job, a=ran.started))
                return False
            forking.flush_streams()
            self.send()  # makes room
        leaves = not self.inbox or kept >= _COMPANY or ran.started - self._sent_at > _PATIENCE
        if runtime > _PATIENCE / 2 and len(self.inbox) == 1:  # more shall be here when that one is done
            leaves = True
        if leaves or not ran.quiet:
            forking.flush_streams()
        if leaves:
            self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
            self._sent_at = ran.started
            self.send()
        return True

    def _mark(self, moment: int) -> None:
        """Each job marks what it starts as its own, so that nothing of it outlives the job's violent end."""
        self._moment, number = moment, self._pid << _MOMENT_BITS | moment & _MOMENT_MASK
        self.page.mark(number if linux.mark(number) else 0)

    def announce(self) -> None:
        """Tells the dispatcher that the current job runs, if it does not know. In any thread."""
        current = self.current
        if current is not None and current.quiet:
            current.quiet = False
            self.send(encode(Kind.STARTED, current.job, a=current.started))

    def _arm(self) -> None:
        """An earlier task may have meddled with the signal of the soft limits."""
        signal.signal(signal.SIGUSR1, self._on_soft_limit)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGUSR1,))

    def _tell_kept(self, now: float) -> None:
        """Before a job with a memory limit: what others have left here, which is not its doing."""
        self._read_at = now
        kept = max(0, resident() - self._fresh)
        if kept > self._kept + _CRUMBS and linux.give_back_memory():  # what is free, but kept by malloc, is nobody's
            kept = max(0, resident() - self._fresh)
        if abs(kept - self._kept) > _CRUMBS:
            self._kept = kept
            with self._sending:
                self._unsent += encode(Kind.KEPT, a=kept)

    def _report(self, job: int, flag: int, runtime: float, body: bytes) -> None:
        """Sends a result that is not kept: a large one, or that of a callback."""
        self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        if type(body) is Bulk:
            self._send_bulk(Frame(Kind.DONE, job, flag, runtime, self._peak, b"", body))
        else:
            self.send(header(Kind.DONE, job, flag, runtime, self._peak, 0, len(body)), body)

    def _run(self, frame: Frame) -> tuple[int, bytes]:
        """Runs the job; whatever it raises becomes its outcome."""
        value: Any = None
        try:
            self._interruptible = True
            try:
                if self._soft_due:
                    self._raise_soft()
                if self.lane is _HOOKS:
                    callbacks.run(frame.extra, frame.flag & ~BATCHED, frame.body)
                else:
                    function, args, kwargs = self.unpack(frame.body, open_call)
                    value = function(*args, **kwargs)
                    if type(value) is CoroutineType:
                        value = coroutines.settle(value)
                    del function, args, kwargs
            finally:
                self._interruptible = False
            return pack_outcome(value)
        except BaseException as exc:
            if exc.__traceback__ is not None and exc.__traceback__.tb_next is not None:
                exc.with_traceback(exc.__traceback__.tb_next)  # this frame is nobody's business
            return Outcome.ERROR, pack_error(exc)

    def call_hooks(self, hooks: bytes, flag: int, body: bytes) -> None:
        """Asks, from inside a job, for a callback once the job is done.

        Args:
            hooks: from :func:`mpworker.pool.callbacks.pack_hooks`.
            flag, body: the outcome to call it with.
        """
        if self.current is None:
            return
        with self.uninterrupted():  # sent now: should this process die before DONE, the task has ended all the same
            self.announce()
            if type(body) is Bulk:
                self._send_bulk(Frame(Kind.CALL, self.current.job, flag, 0.0, 0.0, hooks, body))
            else:
                self.send(encode(Kind.CALL, self.current.job, flag, extra=hooks, body=body))

    def ask_to_leave(self) -> None:
        """From inside a job: this process is to run no other one after it."""
        self._worn = True
        with self._sending:
            self._unsent += encode(Kind.WORN)

    def tell_progress(self, done: float, total: float, message: str) -> None:
        """From inside a job, in any thread: sent if the last word is old enough and the line takes it at once."""
        try:
            current, word = self.current, (float(done), float(total), str(message))
        except OverflowError:
            raise ValueError("progress is told in numbers that fit into a float") from None
        if current is None:
            return
        current.untold = word
        if (now := monotonic()) < current.tell_at:
            return
        current.tell_at = now + self.progress_pause
        self._tell(current, word)

    def tell_untold(self) -> None:
        """Passes on, in any thread, what the job has told last, if that has not left yet."""
        if (current := self.current) is not None and (word := current.untold) is not None:
            current.tell_at = monotonic() + self.progress_pause
            self._tell(current, word)

    def _tell(self, current: Current, word: tuple[float, float, str]) -> None:
        with self.uninterrupted():
            self.announce()
            if self.send_now(_progress(current.job, word), 0.0) and current.untold is word:
                current.untold = None
            if self.on_progress is not None:
                done, total, message = word
                self.on_progress(current.job, done, total, message[:_PROGRESS_TEXT])

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """The soft limit must not cut in two what is done here, such as a frame; it follows at once."""
        if threading.current_thread() is not threading.main_thread():  # where signals do not come
            yield
            return
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible and self._soft_due:
            self._soft_due = False
            self._strike(sys._getframe())

    # -- for a chunk ---------------------------------------------------------------------------------------------

    def begin_chunk(self, run: Run) -> None:
        """The current job is a chunk: its limits are those of an item, and the watchdog arms them when it looks."""
        with self.gate:
            if self.current is not None:
                self.current.soft_at = self.current.hard_at = inf
            self.chunk = run
        if run.due < self.watchdog.wakes_at:
            self.watchdog.wake(run.due)

    def end_chunk(self) -> None:
        with self.gate:
            self.chunk = None

    def heed(self) -> None:
        """From here on the task may be interrupted; at once if that is due."""
        self._interruptible = True
        if self._soft_due:
            self._soft_due = False
            self._raise_soft()

    # -- for the watchdog ----------------------------------------------------------------------------------------

    def alarm(self) -> float:
        """When the watchdog must look at the current job; ``inf`` for never."""
        current = self.current
        if current is None:
            return inf
        alarm = min(current.soft_at, current.hard_at)
        if (chunk := self.chunk) is not None:
            alarm = min(alarm, chunk.due)
        if not current.batched or current.long:
            return alarm
        return min(alarm, current.slow + Watchdog.MOMENT if current.slow else current.started + _HAND_BACK)

    def hand_back(self) -> list[int]:
        """Empties the inbox, unread frames included. The caller holds the gate while a job runs."""
        if received := self._reader.receive(self.data, socket.MSG_DONTWAIT):
            self.take(received)
        jobs = [frame.job for frame in reversed(self.inbox)]
        self.inbox.clear()
        return jobs

    def revoke(self, job: int) -> bool:
        """Takes one job out of the inbox, or notes it for when it comes. The caller holds the gate."""
        for frame in self.inbox:
            if frame.job == job:
                self.inbox.remove(frame)
                return True
        self.revoked[job] = None
        if len(self.revoked) > _MAX_REVOKED:  # left over from cancels that crossed a result
            del self.revoked[next(iter(self.revoked))]
        return False

    def interrupt(self) -> None:
        """Raises the soft limit's exception in the task thread, out of a system call if need be."""
        if self.current is not None:
            self.current.unheard = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def nudge(self) -> None:
        """Once more, if the first time fell into C code and a system call came behind it."""
        if self.current is not None:
            self.current.nudged = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def stack(self) -> str:
        """Where the task thread is, as text."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        entries = traceback.extract_stack(frame) if frame else []
        ours = [i for i, entry in enumerate(entries) if entry.filename == __file__]
        return "".join(traceback.format_list(entries[ours[-1] + 1 if ours else 0 :]))

    def _on_soft_limit(self, signum: int, frame: FrameType | None) -> None:
        current = self.current
        if current is None or os.getpid() != self._pid:
            return
        if current.nudged and not current.unheard:
            current.nudged = False  # it has been heard meanwhile
            return
        current.unheard = False
        self._strike(frame)

    def _strike(self, frame: FrameType | None) -> None:
        if not self._interruptible:
            self._soft_due = True  # the task is about to begin, or has just ended
        elif not coroutines.interrupt(frame, self._soft_exception):
            self._raise_soft()

    def _raise_soft(self) -> NoReturn:
        raise self._soft_exception()

    def _soft_exception(self) -> BaseException:
        current = self.current
        error: BaseException
        if current is not None and current.over is not None:
            error, current.over = MemoryLimitExceeded(*current.over), None
        else:
            error = self._soft_error(current.soft if current and current.soft else None)
        self._soft_raised = error
        return error

    def unpack(self, body: bytes, read: Callable[[bytes], Any]) -> Any:
        """What the task brings, as ``read`` reads it."""
        try:
            return read(body)
        except BaseException as exc:  # unpickling runs whatever __reduce__ names, sys.exit too
            if exc is self._soft_raised:
                raise
            raise PayloadError(f"the call cannot be unpickled in the worker: {type(exc).__name__}: {exc}") from exc
        finally:
            if type(body) is Bulk:
                body.close()  # its memory need not wait for the end of the task


def _progress(job: int, word: tuple[float, float, str]) -> bytes:
    done, total, message = word
    return encode(Kind.PROGRESS, job, a=done, b=total, body=message[:_PROGRESS_TEXT].encode(errors="replace"))


#: The worker that this process is; ``None`` everywhere else.
this_worker: Worker | None = None


def task_worker() -> Worker | None:
    """The worker that this process is; ``None`` in one that a worker forked, and in the callback process."""
    worker = this_worker
    if worker is None or worker._pid != os.getpid() or worker.lane is not Lane.TASKS:
        return None
    return worker


def process_name() -> str:
    """``worker-N`` or ``callbacks``, as :mod:`multiprocessing` and its log records know this process."""
    return multiprocessing.process.current_process().name
