"""The template: a clean, one-threaded process that has imported the application and from which workers are forked.

Owns the forking. Runs the preload and nothing else of the user's; never runs a task, never starts a thread.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import time

from mpworker.pool import boot as booting
from mpworker.pool import forking, linux
from mpworker.pool.child import become_worker  # here, so that no worker has to import it
from mpworker.pool.frames import HEADER_SIZE, Frame, FrameReader, Kind, encode
from mpworker.pool.title import set_title


def main(fd: str, dispatcher: str, *_: str) -> None:
    """Entry of the process."""
    linux.die_with_parent()
    set_title("mpworker: template")
    with socket.socket(fileno=int(fd)) as line:
        serve(line, int(dispatcher))


def serve(line: socket.socket, dispatcher: int, preload: bool = True) -> None:
    """Loads what BOOT asks for, says READY, then forks a worker for each FORK until the line ends.

    Args:
        line: to the dispatcher, blocking.
        dispatcher: its pid; the workers become its children.
        preload: ``False`` in a fork of the parent: everything is loaded already.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent's SIG_IGN is inherited, and then nobody can be waited for
    for number in forking.FOR_THE_NODE:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    frame, _ = _receive(line)
    if frame is None or frame.kind is not Kind.BOOT:
        return
    boot = booting.load(frame.body)
    set_title(f"mpworker: template{boot.label}")
    if preload and frame.flag:
        try:
            booting.prepare(boot)
        except BaseException as exc:  # sys.exit in a module is a failure like any other
            _say(line, encode(Kind.UNREADY, body=booting.explain(exc, "loading the application").encode()))
            return
        gc.collect()
    # What is there now is never looked at by a worker's garbage collector, so that its memory stays shared.
    gc.freeze()
    _say(line, encode(Kind.READY, body=forking.risk_of_forking().encode()))
    prepared = not preload or bool(frame.flag)
    while True:
        request, fds = _receive(line)
        if request is None:
            return
        if request.kind is Kind.FORK and len(fds) == 3:
            _fork(line, request, fds, boot, dispatcher, prepared)


def _say(line: socket.socket, word: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the dispatcher is gone, as the next read tells
        line.sendall(word)


def _receive(line: socket.socket) -> tuple[Frame | None, list[int]]:
    """One whole frame and the descriptors that came with its header; ``None`` at the end of the line."""
    reader, fds, wanted = FrameReader("the dispatcher"), [], HEADER_SIZE
    while True:
        try:
            data, received, _, _ = socket.recv_fds(line, wanted, 3)
        except ConnectionError:
            data, received = b"", []
        fds += received
        frames = reader.feed(data)
        if frames:
            return frames[0], fds
        if not data:
            return None, fds
        # Never read beyond this frame: descriptors come with the first byte of the next.
        wanted = reader.missing


def _fork(
    line: socket.socket, request: Frame, fds: list[int], boot: booting.Boot, dispatcher: int, ready: bool
) -> None:
    forking.flush_streams()
    try:
        middle = os.fork()
    except OSError:  # the dispatcher sees the closed lines, and tries again after a while
        middle = -1
    if middle == 0:
        _be_forked(line, request, fds, boot, dispatcher, ready)
    for fd in fds:
        os.close(fd)
    if middle > 0:
        os.waitpid(middle, 0)


def _be_forked(
    line: socket.socket, request: Frame, fds: list[int], boot: booting.Boot, dispatcher: int, ready: bool
) -> None:
    """The process in the middle: its only child loses it at once, and the kernel gives that one to the dispatcher."""
    middle = os.getpid()
    try:
        if os.fork():
            os._exit(0)
        line.close()
        while os.getppid() == middle:
            time.sleep(0.0002)
        data, control, page = fds
        become_worker(data, control, page, int(request.a), request.flag, boot, dispatcher, prepared=ready)
    finally:
        os._exit(70)
