"""What to know and to do before a fork: what the copy could not use, what it must not hear, what has been printed.

Owns the question whether this process may be forked. Forks only to see which threads stay; that child ends at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from types import BuiltinFunctionType

from mpworker.pool import linux

#: Signals that mean the node, if they reach all of its processes; a fork of the main process has its handlers.
FOR_THE_NODE = signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


def flush_streams() -> None:
    """What was printed is seen now, not when this process ends, which may be by a signal; nor twice, after a fork."""
    for stream in (sys.stdout, sys.stderr):
        try:  # not contextlib.suppress: this is on the way of each task
            stream.flush()
        except (AttributeError, ValueError, OSError):  # none, closed, or nobody reads it
            pass


def risk_of_forking() -> str:
    """Why this process had better not be forked, as the rest of a sentence about it; empty if it may be."""
    if (threads := _threads_that_stay()) > 1:
        return f"has {threads} threads, and forking would copy their locks"
    if devices := linux.open_devices():
        return f"has opened {devices[0]}, which a fork cannot use"
    return ""


def tampered() -> bool:
    """Whether somebody has replaced what a process that waits, keeps time and talks relies on (gevent does, and
    libraries that freeze the clock), or follows each of its lines (a debugger, a measurement of coverage)."""
    functions = time.monotonic, time.sleep, select.select, os.read, os.write
    genuine = all(isinstance(function, BuiltinFunctionType) for function in functions)
    return not genuine or socket.socket.__module__ != "socket" or bool(sys.gettrace() or sys.getprofile())


def _threads_that_stay() -> int:
    """Threads that forking would not get rid of. Some libraries see to that themselves: OpenBLAS, which numpy brings,
    ends its threads when the process is about to fork (``pthread_atfork``), and starts them anew where they are needed.
    """
    if linux.native_threads() > 1 == threading.active_count():
        with warnings.catch_warnings():  # Python 3.12 warns of what is tried here
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            os._exit(0)
        with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored, or somebody else has waited for it
            os.waitpid(child, 0)
    return max(linux.native_threads(), threading.active_count())
