"""What user code may do to the process it runs in, one function each, and the table of how each of them must end.

Children import this, so it imports nothing heavy. To add a fault: one function, one line in ``FAULTS``, and one in
``SENSELESS`` for each place where it says nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

import support

from mpworker import MemoryLimitExceeded

#: Names of descriptors that belong to the test process itself (and to pytest): they are not written to.
SPARED = "_MPWORKER_TEST_SPARED"
#: Bytes that each task may use.
MEMORY = 256 << 20
#: What ``print_much`` prints.
MUCH = 100 << 20
_LINE = (1 << 16) - 1


class Odd(BaseException):
    """Nobody's ``except Exception`` sees it."""


# -- faults ----------------------------------------------------------------------------------------------------------


def exhaust_memory() -> int:
    """As where the operator has set a limit of address space: the kernel gives no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        return len(bytearray(1 << 32))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def crash() -> None:
    faulthandler.disable()  # a fork of pytest would print where it was
    support.die("segv")


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_in_c() -> None:
    """Without letting any other thread run."""
    ctypes.PyDLL(None).usleep(20_000_000)


def backtrack() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def raise_to_a_power() -> None:
    pow(7, 10**8)


def ignore_sigterm() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    support.sleep()


def swallow() -> None:
    for _ in range(5):
        with contextlib.suppress(BaseException):
            support.sleep()


def fill_memory() -> None:
    """Far beyond its limit, and deaf to what it is asked."""
    blocks = []
    for _ in range(5):
        with contextlib.suppress(BaseException):
            blocks.append(b"x" * (2 * MEMORY))
            support.sleep()


def fork() -> int:
    """Leaves a child behind; returns its pid."""
    if child := os.fork():
        return child
    try:
        support.sleep()
    finally:
        os._exit(0)


def daemonize() -> int:
    """As :func:`fork`, but out of this process' session, with another parent, and deaf."""
    reader, writer = os.pipe()
    if middle := os.fork():
        os.waitpid(middle, 0)
        pid = int(os.read(reader, 32))
        os.close(reader)
        os.close(writer)
        return pid
    try:
        os.setsid()
        if not os.fork():
            os.write(writer, str(os.getpid()).encode())
            os.close(writer)
            os.close(reader)
            ignore_sigterm()
    finally:
        os._exit(0)


def close_descriptors() -> None:
    os.closerange(0, 4096)


def close_and_sleep() -> None:
    close_descriptors()
    support.sleep()


def write_garbage() -> None:
    spared = os.environ[SPARED].split(",")
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") not in spared:
                os.write(int(name), b"garbage, and not a frame. " * 20)


def leave_threads() -> None:
    for _ in range(3):
        threading.Thread(target=threading.Event().wait, daemon=False).start()


def print_much() -> None:
    for _ in range(MUCH // (_LINE + 1)):
        print("x" * _LINE)
    sys.stdout.flush()


# -- how they end ----------------------------------------------------------------------------------------------------

#: It raises: an error for that task, and the process goes on.
RAISES = "raises"
#: The process dies, or has to: ``WorkerLost``, and another process.
DIES = "dies"
#: Nothing but its limit ends it: ``TimeLimitExceeded``, and another process.
STALLS = "stalls"
#: It does its harm, if any, behind a success.
LIVES = "lives"


class Fault(NamedTuple):
    act: Callable[[], Any]
    ending: str
    #: in the error's text
    words: str = ""
    kind: type[BaseException] | None = None


def raising(kind: type[BaseException], *arguments: object) -> Fault:
    def act() -> None:
        raise kind(*arguments)

    return Fault(act, RAISES, str(kind(*arguments)), kind)


FAULTS: dict[str, Fault] = {
    "raises": raising(LookupError, "no such table"),
    "raises-a-BaseException": raising(Odd, "very odd"),
    "raises-KeyboardInterrupt": raising(KeyboardInterrupt),
    "raises-GeneratorExit": raising(GeneratorExit, "no more"),
    "raises-CancelledError": raising(CancelledError, "not by you"),
    "raises-StopIteration": raising(StopIteration, "enough"),
    "sys.exit": raising(SystemExit, "enough"),
    "out-of-memory": Fault(exhaust_memory, RAISES, "", MemoryError),
    "os._exit": Fault(lambda: os._exit(9), DIES, "exited with code 9"),
    "SIGKILL": Fault(lambda: support.die("kill"), DIES, "SIGKILL|signal 9$"),
    "SIGSEGV": Fault(crash, DIES, "SIGSEGV|signal 11$"),
    "closes-descriptors": Fault(close_descriptors, DIES, "closed its line|exited with code 70"),
    "closes-descriptors-and-sleeps": Fault(close_and_sleep, DIES, "closed its line|exited with code 70"),
    "writes-garbage": Fault(write_garbage, DIES, "bytes that are no frame"),
    "SIGSTOP": Fault(stop_itself, STALLS),
    "holds-the-GIL": Fault(sleep_in_c, STALLS),
    "holds-the-GIL-in-re": Fault(backtrack, STALLS),
    "holds-the-GIL-in-int": Fault(raise_to_a_power, STALLS),
    "ignores-SIGTERM": Fault(ignore_sigterm, STALLS),
    "swallows-the-soft-limit": Fault(swallow, STALLS),
    "exceeds-its-memory-limit": Fault(fill_memory, STALLS, "used .* limit 256", MemoryLimitExceeded),
    "forks": Fault(fork, LIVES),
    "daemonizes": Fault(daemonize, LIVES),
    "leaves-threads": Fault(leave_threads, LIVES),
    "prints-100-MB": Fault(print_much, LIVES),
}

METHODS = ["fork", "forkserver", "spawn", "auto"]
PLACES = ["initializer", "arguments", "task", "result", "parent", "callback", "error_callback"]
_IN_TASK = "no other than sleeping there; seen in the task"
_LIKE = "like the other exceptions there: they all become text"
_NO_SOFT = "no soft limit there"
_NO_MEMORY = "no memory limit there"
_OWN = "it is the caller's own code that hits the caller's own process"
#: Cells that make no sense, and why.
SENSELESS: dict[tuple[str, str], str] = {
    **{
        (place, name): _IN_TASK
        for place in PLACES
        for name in ("holds-the-GIL-in-re", "holds-the-GIL-in-int")
        if place != "task"
    },
    **{
        (place, "swallows-the-soft-limit"): _NO_SOFT
        for place in ("initializer", "result", "callback", "error_callback")
    },
    **{(place, "exceeds-its-memory-limit"): _NO_MEMORY for place in ("initializer", "callback", "error_callback")},
    **{("initializer", f"raises-{name}"): _LIKE for name in ("KeyboardInterrupt", "GeneratorExit", "CancelledError")},
    ("initializer", "raises-StopIteration"): _LIKE,
    **{("parent", name): _OWN for name, fault in FAULTS.items() if fault.ending in (DIES, STALLS)},
    ("parent", "leaves-threads"): _OWN,
    ("parent", "prints-100-MB"): _OWN,
}


def cells(place: str, *endings: str) -> list[str]:
    """The names of the faults to commit at a place."""
    assert place in PLACES
    wanted = endings or (RAISES, DIES, STALLS, LIVES)
    return [name for name, fault in FAULTS.items() if fault.ending in wanted and (place, name) not in SENSELESS]


# -- committing them -------------------------------------------------------------------------------------------------


def commit(name: str, log: Path, *_: object) -> Any:
    """Says in which process it happens, and when; then does it."""
    support.append(log, f"{os.getpid()} {time.monotonic()}")
    return FAULTS[name].act()


class Deed(NamedTuple):
    """What :func:`commit` has noted."""

    pid: int
    at: float


def deeds(log: Path) -> list[Deed]:
    return [Deed(int(pid), float(at)) for pid, at in map(str.split, support.lines(log))]


class Cargo:
    """Commits a fault where it is pickled (``dump``) or unpickled (``load``); then it is what came of that."""

    def __init__(self, when: str, name: str, log: Path) -> None:
        self.when, self.name, self.log = when, name, log

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.when == "dump":
            return support.give, (commit(self.name, self.log),)
        return commit, (self.name, self.log)
