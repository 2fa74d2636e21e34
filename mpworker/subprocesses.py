"""A ``celery worker`` as a child of a command, and Ctrl-C that never interrupts at the wrong moment.

Owns one child process and its log file. Signals only that child and its group, and only until it is reaped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TICK = 0.05
_WARM_SECONDS = 20.0
_COLD_SECONDS = 5.0
# Linux: the worker gets SIGTERM when its parent dies, so that kill -9 of the command leaves nothing either.
_TIED = (
    "import ctypes, os, sys\n"
    "if sys.platform.startswith('linux'):\n"
    "    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)\n"
    "if os.getppid() == int(sys.argv[1]):\n"
    "    os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Interrupts:
    """Turns Ctrl-C, SIGTERM and SIGHUP into one ``KeyboardInterrupt``: never a second one, never while held back.

    A signal that was held back is raised when the hold ends; ``pending`` counts them all.
    """

    def __init__(self) -> None:
        self.pending = 0
        self._held = False
        self._taken: list[int] = []

    def __enter__(self) -> Interrupts:
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or the shell's `&`
                signal.signal(number, self._on_signal)
                self._taken.append(number)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for number in self._taken:  # everything has ended: one more Ctrl-C has nothing left to stop
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.pending += 1
        if not self._held:
            self._held = True  # whoever cleans up now must not be interrupted again
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From now on signals are only counted."""
        self._held = True

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Counts signals while the block runs and raises ``KeyboardInterrupt`` behind it."""
        self._held = True
        yield
        self.check()
        self._held = False

    def check(self) -> None:
        """Raises what is held back: between two steps, where no finalizer can swallow it as it can anywhere else."""
        if self.pending:
            raise KeyboardInterrupt


class NodeProcess:
    """``celery -A mpworker worker`` in a session of its own, its output in a private log file."""

    def __init__(self, log: Path, include: str, workers: int) -> None:
        self.log = log
        self._include, self._workers = include, workers
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        celery = ["-m", "celery", "-A", "mpworker", "worker", "-l", "INFO", "-n", "demo@%h", "-c", str(self._workers)]
        features = ["--without-gossip", "--without-mingle"]
        environment = {**os.environ, "MPWORKER_INCLUDE": self._include}
        home = Path(__file__).resolve().parent.parent
        if home.name not in ("site-packages", "dist-packages"):  # a checkout that is not installed
            paths = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), sys.executable, *celery, *features],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> bool:
        """Waits at most so long; True once the worker has ended."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def await_line(self, text: str, seconds: float) -> bool:
        """Waits for a line that ends with ``text`` in the log; False if the worker ended or the time is over."""
        deadline = time.monotonic() + seconds
        while not any(line.endswith(text) for line in self._lines()):
            if self.wait(_TICK) or time.monotonic() > deadline:
                return False
        return True

    def describe(self, what: str) -> str:
        """One line on what happened, with the last line of the log."""
        code = None if self._process is None else self._process.poll()
        ended = "" if code is None else f" (exit code {code})"
        last = next((line.strip() for line in reversed(self._lines()) if line.strip()), "nothing")
        return f"the worker {what}{ended}: {last} [log: {self.log}]"

    def _lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def stop(self, interrupts: Interrupts) -> None:
        """Ends the worker, warm first. A signal that comes meanwhile makes it cold. Calling it again does nothing."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        before, deadline = interrupts.pending, time.monotonic() + _WARM_SECONDS
        while not self.wait(_TICK) and time.monotonic() < deadline and interrupts.pending == before:
            pass
        if process.poll() is None:
            process.send_signal(signal.SIGQUIT)
            self.wait(_COLD_SECONDS)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
