"""The guard of the bundled server: starts it, restarts it when it crashes, ends it after its last user.

Runs as a process of its own and is the parent of ``valkey-server``. Owns the server's life. Never reads a pid from a
file; signals only its own unreaped child. Started by :mod:`mpworker.embedded`, which also says how the locks work.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mpworker.embedded import GUARD, SERVER, USERS, LockFile, answers, command, socket_path

_TICK = 0.01  # a starting server tells nobody when it is ready
#: Seconds for a clean end. A server that is killed then has long handed its data to the kernel.
_FLUSH_SECONDS = 1.5
_MAX_RESTARTS = 5
#: Seconds after which a server has proved that it can run.
_STEADY = 60.0
_LOG_MAX = 1 << 20
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """``guard DATA_DIR BINARY SECONDS`` or, started by a guard, ``server GUARD_PID DATA_DIR BINARY``."""
    os.umask(0o077)
    if argv[0] == "server":
        _become_server(int(argv[1]), Path(argv[2]), argv[3])
    if os.fork():
        os._exit(0)  # the guard belongs to init, so that no user has to reap it
    _stand_alone()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(Guard(Path(argv[1]), argv[2]).run(float(argv[3])))


def _stand_alone() -> None:
    """Under a title of its own; and not as part of a task that happens to be its first user, and to end with that."""
    from mpworker.pool.linux import mark
    from mpworker.pool.title import set_title

    set_title("mpworker: valkey guard")
    mark(-1)


class Guard:
    """Parent of one server. The main thread waits for the server, a second thread for the last user."""

    def __init__(self, data_dir: Path, binary: str) -> None:
        self.data_dir, self.binary = data_dir, binary
        self.socket = socket_path(data_dir)
        self.lock = LockFile(data_dir / "users.lock")
        self.mutex = threading.Lock()
        self.ending = False
        self.server: subprocess.Popen[bytes] | None = None

    def run(self, seconds: float) -> int:
        """Runs until the last user is gone; tells the starter, on stdout, ``ready`` or why not."""
        deadline = time.monotonic() + seconds
        if not self._become_only_guard(deadline):
            _report("another guard is there")
            return 1
        self._rotate_log()
        _ask_to_end(self.socket)
        server = self._start()
        problem = self._await_ready(server, deadline)
        if problem:
            self._end()
            self._clean()
            self.lock.drop(GUARD)  # the starter removes the file if no other user has it
            _report(problem)
            return 1
        _report("ready")
        threading.Thread(target=self._await_last_user, daemon=True).start()
        self._tend(server)
        self._clean()
        if self.lock.take(USERS):  # the kernel drops it when this process has ended
            self.lock.path.unlink(missing_ok=True)
        return 0

    def _become_only_guard(self, deadline: float) -> bool:
        while not self.lock.take(GUARD):
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK)
        return True

    def _rotate_log(self) -> None:
        log = self.data_dir / "valkey.log"
        with suppress(FileNotFoundError):
            if log.stat().st_size > _LOG_MAX:
                log.replace(log.with_suffix(".log.1"))

    def _start(self) -> subprocess.Popen[bytes]:
        with self.mutex:
            self.server = subprocess.Popen(
                command("server", str(os.getpid()), str(self.data_dir), self.binary),
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr,
            )
            if self.ending:
                self.server.terminate()
            return self.server

    def _await_ready(self, server: subprocess.Popen[bytes], deadline: float) -> str | None:
        while not answers(self.socket):
            if server.poll() is not None:
                return "it ended at once"
            if time.monotonic() > deadline:
                return "it does not answer"
            time.sleep(_TICK)
        return None

    def _tend(self, server: subprocess.Popen[bytes]) -> None:
        """Waits for the server's end; starts it again when it was not asked to end."""
        deaths = 0
        while deaths < _MAX_RESTARTS:
            begun = time.monotonic()
            code = server.wait()
            deaths = deaths + 1 if time.monotonic() - begun < _STEADY else 1
            with self.mutex:
                if self.ending:
                    return
            print(f"mpworker: the server ended with code {code}; starting it again", file=sys.stderr, flush=True)
            server = self._start()
        server.wait()

    def _await_last_user(self) -> None:
        self.lock.take(USERS, wait=True)
        self._end()

    def _end(self) -> None:
        with self.mutex:
            self.ending, server = True, self.server
        if server is None:
            return
        server.terminate()
        try:
            server.wait(_FLUSH_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()

    def _clean(self) -> None:
        """Leaves only data behind."""
        self.socket.unlink(missing_ok=True)
        if self.socket.parent != self.data_dir:
            with suppress(OSError):
                self.socket.parent.rmdir()


def _report(line: str) -> None:
    with suppress(BrokenPipeError):  # the starter has died meanwhile
        os.write(1, line.encode() + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _ask_to_end(path: Path) -> None:
    """Ends a server whose guard was killed, on systems that do not end it then by themselves."""
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(_FLUSH_SECONDS)
        connection.connect(str(path))
        connection.sendall(b"SHUTDOWN\r\n")
        connection.recv(64)


def _become_server(guard_pid: int, data_dir: Path, binary: str) -> NoReturn:
    """Turns this process into the server, which dies with its guard and holds a lock as long as it lives."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != guard_pid:
        sys.exit("the guard is gone")
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    lock = LockFile(data_dir / "users.lock")
    os.set_inheritable(lock.fd, True)  # a POSIX lock outlives exec as long as its descriptor does
    fcntl.lockf(lock.fd, fcntl.LOCK_EX, 1, SERVER)  # an older server may still be writing its last lines
    os.execv(binary, [binary, *_options(data_dir)])


def _options(data_dir: Path) -> list[str]:
    options = {
        "port": "0",
        "unixsocket": str(socket_path(data_dir)),
        "unixsocketperm": "700",
        "dir": str(data_dir / "valkey"),
        "logfile": str(data_dir / "valkey.log"),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "set-proc-title": "yes",
        "proc-title-template": "mpworker: valkey-server {unixsocket}",
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]
