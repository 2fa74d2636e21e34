"""The second thread of a worker: soft limit, hard limit, hand back, the cut of a chunk, and the dispatcher's word while
a task runs.

Owns the clock of the current job. Never runs user code. It cannot run while C code holds the GIL or while the process
is stopped, which is why the dispatcher holds the same deadline and a little grace.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from math import inf
from typing import TYPE_CHECKING

from mpworker.errors import ProtocolError
from mpworker.pool import linux
from mpworker.pool.frames import CHUNK, LONGEST_WAIT, Frame, FrameReader, Kind, encode

if TYPE_CHECKING:
    from mpworker.pool.worker import Current, Worker

#: Seconds between SIGTERM and SIGKILL.
_TERM_TO_KILL = 0.1
#: Seconds between two tries to interrupt a task. Python hears of a signal that falls into C code only behind it: if a
#: blocking call comes first, that has to be interrupted too.
_NUDGE = 0.05
#: Seconds for which the thread looks again and again after the last job, so that the next one need not wake it.
_LINGER = 0.1


class Watchdog(threading.Thread):
    """Watches one worker.

    Args:
        control: line from the dispatcher.
    """

    #: Seconds after which a job counts as long and those behind it go back to the dispatcher.
    HAND_BACK = 0.004
    #: … if it is not done so many seconds later, in which it could run …
    MOMENT = 0.002
    #: … or at all.
    LATEST = 0.015

    def __init__(self, worker: Worker, control: socket.socket) -> None:
        super().__init__(name="mpworker-watchdog", daemon=True)
        self._worker, self._control = worker, control
        self._reader = FrameReader("the dispatcher")
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        #: when it looks again
        self.wakes_at = inf
        #: a long job runs: what arrives behind it must not wait for it
        self._reading = False

    def wake(self, alarm: float) -> None:
        """From the task thread, if :attr:`wakes_at` is later: be awake at ``alarm``."""
        self.wakes_at = alarm  # not again until it has woken up and looked, which may take it a while
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_writer, b"!")

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
        self._queueing = linux.Queueing(threading.main_thread().native_id or 0)
        poll, worker = select.poll(), self._worker
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        while True:
            now = time.monotonic()
            self.wakes_at = due = self._look(now)
            if worker.alarm() < due:
                continue  # a job began between the look and the promise
            if self._reading:
                poll.register(worker.data, select.POLLIN)
            for descriptor, _ in poll.poll(min(max(0.0, due - now), LONGEST_WAIT) * 1000 + 0.5):
                if descriptor == self._wake_reader:
                    os.read(self._wake_reader, 4096)
                elif descriptor == self._control.fileno():
                    self._listen()
            if self._reading:  # what has come for a busy worker goes back when the loop looks again
                poll.unregister(worker.data)

    def _look(self, now: float) -> float:
        """Does what is due and returns when to look again."""
        worker = self._worker
        returned: list[int] = []
        soft = stack = cut = None
        with worker.gate:
            current = worker.current
            self._reading = False
            if current is None:
                return now + self.HAND_BACK if now < worker.began + _LINGER else inf
            if (chunk := worker.chunk) is not None and now >= chunk.due and chunk.look(current, now):
                cut = chunk
            if now >= current.hard_at:
                worker.doomed = True
                stack = worker.stack()
            elif now >= current.soft_at:
                current.soft_at = inf
                soft = current.soft
                worker.interrupt()
            elif current.unheard:
                worker.nudge()
            if current.batched and not current.slow and now >= current.started + self.HAND_BACK:
                current.slow, current.queued = now, self._queueing.seconds()
            elif current.batched and current.slow and now >= current.slow + self.MOMENT and not self._held_up(now):
                current.long = self._reading = True
                try:
                    returned = worker.hand_back()
                except ProtocolError:  # as at the end of the line: nobody can reach us any more
                    os.killpg(os.getpgrp(), signal.SIGKILL)
        if stack is not None or soft is not None or cut is not None or current.long:
            self._announce(current)
        if cut is not None and current.quiet:  # nobody would know what is spoken of
            cut.due = now + self.MOMENT
        elif cut is not None:
            worker.send(cut.word(current.job))
        if stack is not None:
            worker.send_now(encode(Kind.EXPIRED, current.job, a=current.hard, body=stack.encode()), 0.1)
            self._die()
        if soft is not None:
            worker.send(encode(Kind.SOFT, current.job, a=soft))
        self._give_back(returned)
        return min(worker.alarm(), now + _NUDGE if current.unheard else inf)

    def _held_up(self, now: float) -> bool:
        """Whether the job seems long only because its thread had no processor; then it gets another moment."""
        current = self._worker.current
        if current is None or current.long or now >= current.started + self.LATEST:
            return False
        queued = self._queueing.seconds()
        if now - current.slow - (queued - current.queued) >= self.MOMENT / 2:
            return False
        current.slow, current.queued = now, queued
        return True

    def _announce(self, current: Current) -> None:
        """A job of a bundle turns out long: now the dispatcher must know of it, and of those that were done before."""
        if current.quiet:
            current.quiet = not self._worker.send_now(encode(Kind.STARTED, current.job, a=current.started), 0.1)

    def _listen(self) -> None:
        try:
            received = self._control.recv(CHUNK)
            frames = self._reader.feed(received)
        except (ConnectionError, ProtocolError):
            received, frames = b"", []
        except OSError:  # the task has closed our descriptors; a SIGKILL would read "out of memory?"
            os._exit(os.EX_SOFTWARE)
        if not received:
            # The dispatcher is gone; whatever this task started goes with us.
            os.killpg(os.getpgrp(), signal.SIGKILL)
        for frame in frames:
            if frame.kind is Kind.SIGNAL:
                self._signal(frame)
            elif frame.kind is Kind.SHRINK:
                self._ask_to_shrink(frame)

    def _ask_to_shrink(self, frame: Frame) -> None:
        with self._worker.gate:  # so that it cannot hit the next job
            current = self._worker.current
            if current is not None and current.job == frame.job:
                current.over = int(frame.a), int(frame.b)
                self._worker.interrupt()

    def _signal(self, frame: Frame) -> None:
        worker, signum = self._worker, frame.flag
        returned = False
        with worker.gate:  # so that the signal cannot hit the next job
            current = worker.current
            if current is None or current.job != frame.job:
                returned = worker.revoke(frame.job)
            elif signum == signal.SIGUSR1:
                worker.interrupt()
            elif signum:
                worker.send_now(b"", 0.1)  # the end of the job before this one may still wait for company
                if signum in (signal.SIGTERM, signal.SIGKILL):
                    linux.kill_strays(os.getpid())
                os.killpg(os.getpgrp(), signum)
        if returned:
            self._give_back([frame.job])

    def _give_back(self, jobs: list[int]) -> None:
        if jobs:
            self._worker.send(b"".join(encode(Kind.RETURNED, job) for job in jobs))

    def _die(self) -> None:
        group = os.getpgrp()
        linux.kill_strays(os.getpid())  # now: who does not catch the signal that comes next cannot do it any more
        os.killpg(group, signal.SIGTERM)
        time.sleep(_TERM_TO_KILL)
        os.killpg(group, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)  # should the group not be ours
