"""The only file that starts, signals and reaps processes.

Parent side: :func:`launch` starts a dispatcher. Dispatcher side: :class:`Fleet` owns the template, the workers and the
callback process. Never decides anything: the ledger says whom to start and whom to kill.

Every child is the dispatcher's own: the template forks twice and the kernel hands the orphan to the dispatcher (a
"subreaper"), so each can be waited for. A pid is signalled only while it is an unreaped child: its number cannot have
been given to another process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

from mpworker.pool import bulk, forking, linux
from mpworker.pool.frames import Kind, encode
from mpworker.pool.jobs import Lane
from mpworker.pool.memory import OomCounter
from mpworker.pool.page import Page, create
from mpworker.pool.title import PADDING

#: Seconds that killed processes get to disappear.
_END_TIMEOUT = 2.0
#: Seconds after a task's death for which it is looked for what it has left behind, and between two looks.
_MOURNING, _LOOK_PAUSE = 2.0, 0.05
_PACKAGE_HOME = str(Path(__file__).resolve().parents[2])
#: Runs ``main`` of a module of this package. ``-P`` keeps the current folder from shadowing the standard library; the
#: place this package was imported from comes last, for checkouts that are on ``sys.path`` only.
_RUN = (
    "import sys; sys.path.append(sys.argv[2]); "
    "import importlib; importlib.import_module(sys.argv[1]).main(*sys.argv[3:])"
)


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a fresh interpreter that runs ``mpworker.pool.<module>.main(*arguments)``."""
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-P", "-c", _RUN, f"mpworker.pool.{module}", _PACKAGE_HOME, *arguments, PADDING]


def _fill_streams() -> None:
    """Opens what is closed of 0, 1 and 2: a line with such a number would be printed into."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def launch(heirlooms: Iterable[int] = ()) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a dispatcher in a clean interpreter and a session of its own. Safe in a process with threads.

    Args:
        heirlooms: descriptors that it inherits, and all its children.

    Returns:
        the process, and the parent's end of the line to it (non-blocking).
    """
    _fill_streams()
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            command("dispatcher", str(theirs.fileno())),
            pass_fds=[theirs.fileno(), *heirlooms],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    ours.setblocking(False)
    return process, ours


def launch_forked(heirlooms: Iterable[int] = ()) -> tuple[_Forked, socket.socket]:
    """As :func:`launch`, but with a template that is a fork of *this* process as it stands.

    The forked child forks the template, so that this is its child, and becomes the dispatcher: as it is if nothing
    speaks against it, which takes less memory and 0.1 s less, else by ``exec``.
    """
    clean = not forking.risk_of_forking() and not forking.tampered()
    for module in ("template", "dispatcher") if clean else ("template",):
        importlib.import_module(f"mpworker.pool.{module}")  # once for all: after the fork each child would do it itself
    _fill_streams()
    ours, theirs = socket.socketpair()
    line, template_end = socket.socketpair()
    forking.flush_streams()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # in the child they would find our handlers
    try:
        pid = os.fork()
        if pid == 0:
            _become_dispatcher(ours, theirs, line, template_end, heirlooms, by_exec=not clean)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    line.close()
    template_end.close()
    ours.setblocking(False)
    return _Forked(pid), ours


def _become_dispatcher(
    ours: socket.socket,
    theirs: socket.socket,
    line: socket.socket,
    template_end: socket.socket,
    heirlooms: Iterable[int],
    *,
    by_exec: bool,
) -> None:
    try:
        gc.freeze()  # nothing of the parent's is ours to clean up
        for number in forking.FOR_THE_NODE:
            signal.signal(number, lambda *_: None)  # exec undoes it
        os.setsid()
        ours.close()
        bulk.abandon()
        dispatcher = os.getpid()
        template = os.fork()
        if template == 0:
            linux.die_with_parent()
            theirs.close()
            line.close()
            from mpworker.pool import template as template_module

            template_module.serve(template_end, dispatcher, preload=False)
            os._exit(0)
        template_end.close()  # or its end would never be seen
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
        for fd in heirlooms:
            os.set_inheritable(fd, True)
        theirs.set_inheritable(by_exec)
        line.set_inheritable(by_exec)
        arguments = str(theirs.detach()), str(line.detach()), str(template)
        if by_exec:
            path, *more = command("dispatcher", *arguments)
            os.execv(path, [path, *more])
        from mpworker.pool import dispatcher as dispatcher_module

        dispatcher_module.main(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        forking.flush_streams()
        os._exit(127)


class _Forked:
    """The part of ``subprocess.Popen`` that the parent needs, for a dispatcher that it forked itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self.returncode = -1
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired("mpworker: dispatcher", timeout or 0.0)
            time.sleep(0.005)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Exit(NamedTuple):
    """A child that has ended: of the worker, or of the template (``worker`` is ``None``)."""

    worker: int | None
    exitcode: int | None
    signal: int | None
    max_rss: int | None
    #: the kernel's out-of-memory killer has struck meanwhile
    oom: bool = False


@dataclass(slots=True, eq=False)
class Crew:
    """The dispatcher's ends of the lines to one child: ``data`` for frames, ``control`` for its watchdog."""

    worker: int
    slot: int
    lane: Lane
    data: socket.socket
    control: socket.socket
    page: Page
    #: the page, for whoever else shall see it
    page_fd: int
    pid: int = 0
    #: when it was asked for, by ``time.monotonic()``
    asked: float = 0.0
    popen: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    #: it has said so
    ready: bool = False
    #: its data line has carried garbage
    garbled: bool = False

    def close(self) -> None:
        self.data.close()
        self.control.close()
        self.page.close()
        os.close(self.page_fd)


class Fleet:
    """The children of one dispatcher."""

    def __init__(self) -> None:
        self.crews: dict[int, Crew] = {}
        self.template: socket.socket | None = None
        self.template_pid = 0
        self._by_pid: dict[int, Crew] = {}
        self._oom = OomCounter()
        self._popens: dict[int, subprocess.Popen[bytes]] = {}
        #: marks of tasks that have died with their workers, and until when it is looked for what they have started
        self._dead: dict[int, float] = {}
        #: when :meth:`tick` is due, by ``time.monotonic()``
        self.deadline = inf
        #: descriptors that every child inherits
        self.heirlooms: list[int] = []
        #: bytes of what a job says that each worker's page keeps
        self.task_log = 0

    # -- starting ------------------------------------------------------------------------------------------------

    def start_template(self) -> socket.socket:
        """Starts the process from which workers are forked, and returns the line to it (blocking)."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._popen(command("template", str(theirs.fileno()), str(os.getpid())), [theirs.fileno()])
        self.template, self.template_pid = ours, process.pid
        return ours

    def fork_template(self, line: socket.socket) -> None:
        """Forks the template from this process, which must have nothing yet but ``line``, its own to the parent.

        Quicker by the start of an interpreter than :meth:`start_template`, which serves when one has to be replaced.
        """
        ours, theirs = socket.socketpair()
        dispatcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                line.close()
                ours.close()
                from mpworker.pool import template

                template.main(str(theirs.detach()), str(dispatcher))
            except BaseException:
                traceback.print_exc()
            finally:
                forking.flush_streams()
                os._exit(0)
        theirs.close()
        self.adopt_template(ours, pid)

    def adopt_template(self, line: socket.socket, pid: int) -> None:
        """Takes over a template that somebody else forked as our child."""
        self.template, self.template_pid = line, pid

    def end_template(self) -> None:
        """Closes the line; the template leaves when it sees that."""
        if self.template is not None:
            self.template.close()
            self.template = None

    def kill_template(self) -> None:
        """For one that does not react; the end of its line says the rest."""
        if self.template_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.template_pid, signal.SIGKILL)

    def disown_unborn(self) -> None:
        """Gives up on workers that were asked for and have not said who they are: the end of their lines says the rest,
        here and, should they still come to it, there."""
        for crew in self.crews.values():
            if not crew.pid:
                with contextlib.suppress(OSError):
                    crew.data.shutdown(socket.SHUT_RDWR)

    def unborn_since(self) -> float:
        """When the oldest worker was asked for that has not said who it is; ``inf`` for none."""
        return min((crew.asked for crew in self.crews.values() if not crew.pid), default=inf)

    def spawn(self, worker: int, slot: int, lane: Lane, boot: bytes) -> Crew:
        """Starts a worker, forked from the template if there is one, else in a fresh interpreter.

        Args:
            boot: the BOOT frame that a fresh interpreter needs.

        Raises:
            OSError: no process or descriptor can be had. Nothing is left behind.
        """
        self._oom.forget(time.monotonic())  # a strike of long ago is not what ends a worker next
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            their_page = create(self.task_log)
            theirs.callback(os.close, their_page)
            page = Page(os.dup(their_page), worker=worker)
            ours.callback(page.close)
            page_fd = os.dup(their_page)
            ours.callback(os.close, page_fd)
            ends = socket.socketpair(), socket.socketpair()
            (data, their_data), (control, their_control) = ends
            for our_end, their_end in ends:
                ours.enter_context(our_end)
                theirs.enter_context(their_end)
            crew = Crew(worker, slot, lane, data, control, page, page_fd, asked=time.monotonic())
            fds = [their_data.fileno(), their_control.fileno(), their_page]
            if self.template is not None:
                request = encode(Kind.FORK, worker, int(lane), float(slot))
                socket.send_fds(self.template, [request], fds)
            else:
                arguments = [*map(str, fds), str(slot), str(int(lane)), str(os.getpid())]
                crew.popen = self._popen(command("child", *arguments), fds)
                self.registered(crew, crew.popen.pid)
            ours.pop_all()
        if crew.popen is not None:
            data.sendall(boot)
        data.setblocking(False)
        control.setblocking(False)
        self.crews[worker] = crew
        return crew

    def _popen(self, arguments: list[str], fds: list[int]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(arguments, pass_fds=[*fds, *self.heirlooms], stdin=subprocess.DEVNULL)
        self._popens[process.pid] = process
        return process

    def registered(self, crew: Crew, pid: int) -> bool:
        """Notes a worker's pid, told by itself, if it is really our child."""
        if crew.pid == pid:
            return pid != 0
        if crew.pid or pid in self._by_pid or pid == self.template_pid or not 0 < pid < 1 << 31:
            return False  # somebody else's number, or nobody's
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        crew.pid = pid
        self._by_pid[pid] = crew
        return True

    # -- ending --------------------------------------------------------------------------------------------------

    def kill(self, worker: int, signum: int) -> None:
        """Signals a worker's whole process group, and kills those descendants that have left it. A worker without a pid
        yet loses its lines, which ends it."""
        crew = self.crews.get(worker)
        if crew is None:
            return
        if not crew.pid:
            with contextlib.suppress(OSError):
                crew.data.shutdown(socket.SHUT_RDWR)
            return
        linux.kill_strays(crew.pid)
        for send in (os.killpg, os.kill):  # the second for one that has not made its group yet
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(crew.pid, signum)

    def tick(self, now: float) -> None:
        """Kills what dead tasks have started and what has left its parents: it is our child since. The next generation
        is when it has lost them in turn."""
        if now < self.deadline:
            return
        self._dead = {mark: until for mark, until in self._dead.items() if now < until}
        self.deadline = now + _LOOK_PAUSE if self._dead else inf
        ours = {self.template_pid, *self._by_pid, *self._popens}
        for pid in linux.children() if self._dead else ():
            if pid not in ours and linux.mark_of(pid) in self._dead:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _mourn(self, crew: Crew) -> None:
        """If a worker has died with its task, it is looked for a while for what that has started."""
        with contextlib.suppress(ValueError):  # the page is closed
            if mark := crew.page.mark_of_running():
                self._dead[mark] = time.monotonic() + _MOURNING
                self.deadline = 0.0

    def reap(self) -> Iterable[Exit]:
        """Collects children that have ended; what is left of a worker's group ends with it."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            crew = self._by_pid.pop(info.si_pid, None)
            if crew is not None:
                self._mourn(crew)
                # While the leader is a zombie its group's number is ours.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(info.si_pid, signal.SIGKILL)
            _, status, usage = os.wait4(info.si_pid, 0)
            popen = self._popens.pop(info.si_pid, None)
            code = os.waitstatus_to_exitcode(status)
            if popen is not None:
                popen.returncode = code  # so that nobody waits for this pid again
            exitcode, signum = (None, -code) if code < 0 else (code, None)
            max_rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            if crew is not None:
                oom = signum == signal.SIGKILL and self._oom.claims(time.monotonic())
                yield Exit(crew.worker, exitcode, signum, max_rss, oom)
            elif info.si_pid == self.template_pid:
                self.template_pid = 0
                yield Exit(None, exitcode, signum, max_rss)

    def forget(self, worker: int) -> None:
        """Closes the lines to a worker that is gone."""
        crew = self.crews.pop(worker, None)
        if crew is not None:
            crew.close()

    def end_all(self) -> None:
        """SIGKILL to everything that is ours, strays included; returns when all of it is reaped, or after 2 s."""
        self.end_template()
        for worker in list(self.crews):
            self.kill(worker, signal.SIGKILL)
            self.forget(worker)
        deadline = time.monotonic() + _END_TIMEOUT
        while time.monotonic() < deadline:
            for pid in linux.children():  # orphans that tasks left behind are ours by adoption
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid:
                self._by_pid.pop(pid, None)
                if (popen := self._popens.pop(pid, None)) is not None:
                    popen.returncode = 0
            else:
                time.sleep(0.002)
