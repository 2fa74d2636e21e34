"""Turns a process into a worker: signals, title, name, lines; and out of the world again.

Owns what comes before the first and after the last job. Never runs a job: that is :mod:`mpworker.pool.worker`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import traceback
from functools import partial
from typing import NoReturn

from mpworker.pool import boot as booting
from mpworker.pool import forking, linux, service, worker
from mpworker.pool.frames import CHUNK, Frame, FrameReader
from mpworker.pool.jobs import NO_SLOT, SLOT_VARIABLE, Lane
from mpworker.pool.page import Page
from mpworker.pool.title import set_title
from mpworker.pool.worker import EX_UNREADY, Worker

_RESET = ("SIGTERM", "SIGHUP", "SIGQUIT", "SIGTTIN", "SIGTTOU", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGCONT")


def become_worker(
    data: int, control: int, page: int, slot: int, lane: int, boot: booting.Boot, dispatcher: int, *, prepared: bool
) -> NoReturn:
    """Turns this process into a worker; never returns.

    Args:
        data, control, page: descriptors of the two lines and of the page.
        slot: its number in the pool, inherited by its replacement; ``NO_SLOT`` for a spare, which is told later.
        dispatcher: pid of the process whose child this is.
        prepared: the application is loaded already.
    """
    code = EX_UNREADY
    try:
        linux.die_with_parent()
        if os.getppid() != dispatcher:
            os._exit(EX_UNREADY)
        with contextlib.suppress(PermissionError):  # a session leader already
            os.setpgid(0, 0)
        _reset_signals()
        _look_like_a_child()
        assume = partial(_assume, Lane(lane), boot)
        assume(slot)
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
        lines = socket.socket(fileno=data), socket.socket(fileno=control)
        if lane == Lane.SERVICE:
            service.serve(lines[0], boot, prepared)
            os._exit(0)
        worker.this_worker = Worker(*lines, Page(page, mine=True), Lane(lane), slot)
        worker.this_worker.serve(boot, prepared, assume)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # a fault in this very file: say so, the dispatcher sees the exit code
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            multiprocessing.util._exit_function()  # type: ignore[attr-defined]
        forking.flush_streams()
        os._exit(code)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for name in _RESET:
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until a job runs there is nothing to interrupt
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _assume(lane: Lane, boot: booting.Boot, slot: int) -> None:
    """Environment, title and name of a slot."""
    _set_environment(slot, lane, boot)
    role = "callbacks" if lane is Lane.HOOKS else "spare" if slot == NO_SLOT else f"worker {slot}"
    role = "service" if lane is Lane.SERVICE else role
    set_title(f"mpworker: {role}{boot.label}")
    multiprocessing.process.current_process().name = role.replace(" ", "-")


def _set_environment(slot: int, lane: Lane, boot: booting.Boot) -> None:
    os.environ.pop(SLOT_VARIABLE, None)  # of a worker that this pool was started in
    if lane is Lane.TASKS and slot != NO_SLOT:
        env = boot.slot_env
        os.environ.update(env(slot) if callable(env) else env.get(slot, {}))
        os.environ[SLOT_VARIABLE] = str(slot)


def _look_like_a_child() -> None:
    # What multiprocessing's own bootstrap does for its children, minus the daemon flag: tasks may have children.
    multiprocessing.process._children = set()  # type: ignore[attr-defined]  # of the process that this is a fork of
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]


def main(data: str, control: str, page: str, slot: str, lane: str, dispatcher: str, *_: str) -> None:
    """Entry of a worker in a fresh interpreter: the first frame on its line is BOOT."""
    line = socket.socket(fileno=int(data))
    reader = FrameReader("the dispatcher")
    frames: list[Frame] = []
    while not frames:
        received = line.recv(min(CHUNK, reader.missing))
        if not received:
            raise SystemExit(EX_UNREADY)
        frames = reader.feed(received)
    boot = booting.load(frames[0].body)
    fds = line.detach(), int(control), int(page)
    become_worker(*fds, int(slot), int(lane), boot, int(dispatcher), prepared=False)
