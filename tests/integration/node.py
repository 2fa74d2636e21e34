"""A real ``celery worker`` as a child of a test, the server it works on, and the patience that tests need.

Owns starting and stopping; what it starts carries a mark in its environment, by which it is found again in ``/proc``
when nothing of it may be left. Holds no expectations about mpworker: those are in the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import support
from celery import Celery

import mpworker

T = TypeVar("T")

#: Where the mpworker is that is tested: the checkout, or what has been installed.
HOME = str(Path(mpworker.__file__).resolve().parents[1])
PROJECTS = Path(__file__).resolve().parent / "projects"
POOL = "mpworker.celery.pool:TaskPool"
#: Seconds that anything may take on a machine that is busy with other things.
PATIENCE = 40.0
MARK = "NODE_UNDER_TEST"


def eventually(probe: Callable[[], T], timeout: float = PATIENCE, what: str = "") -> T:
    """Asks until the answer is true; returns it."""
    return support.wait_until(probe, timeout, what or "the condition")


def marked(mark: str) -> dict[int, str]:
    """Living processes whose environment carries the mark: pid -> command line."""
    found, needle = {}, f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            carried = needle in (entry / "environ").read_bytes().split(b"\0")
            if carried and support.alive(int(entry.name)):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except (OSError, ProcessLookupError):
            continue
    return found


class Server(support.RedisServer):
    """A server as a context, with its URLs as a project without mpworker would write them."""

    broker = results = support.RedisServer.url

    def __init__(self, **options: str) -> None:
        super().__init__(**options)
        self.port = "0"  # its socket will do: a port that is free now may be taken a moment later

    def client(self, **options: Any) -> Any:
        return super().client(decode_responses=True, **options)


class Notes:
    """The file to which tasks and callbacks write what they saw, one JSON line by one write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, kind: str | None = None, **fields: Any) -> list[dict[str, Any]]:
        text = self.path.read_text() if self.path.exists() else ""
        notes = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last may be under way
        wanted = {**fields, **({"kind": kind} if kind else {})}
        return [note for note in notes if all(note.get(key) == value for key, value in wanted.items())]

    def wait(self, kind: str, count: int = 1, timeout: float = PATIENCE, **fields: Any) -> list[dict[str, Any]]:
        def enough() -> list[dict[str, Any]]:
            found = self.read(kind, **fields)
            return found if len(found) >= count else []

        return eventually(enough, timeout, f"{count} notes {kind} {fields} in {self.path}")


class Node:
    """``celery -A <app> worker`` in a session of its own, its output in a file.

    Args:
        folder: a private one, for log, notes and journal.
        app: for ``-A``.
        install: ``True``: the project calls ``mpworker.install``; ``False``: the environment variable does all.
        env: more variables, such as ``SHOP_BROKER``.
        config: Celery settings of the example project.
    """

    def __init__(
        self,
        folder: Path,
        *args: str,
        app: str = "shop",
        install: bool = True,
        env: dict[str, str] | None = None,
        config: dict[str, Any] | None = None,
        cwd: Path = PROJECTS,
        output: Any = None,
    ) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder, self.mark, self.app = folder, uuid.uuid4().hex, app
        self.log_path = folder / "worker.log"
        self.notes = Notes(folder / "notes")
        self.journal = folder / "journal"
        self.name = f"n{self.mark[:8]}@here"
        self.cwd = cwd
        self._output = output
        self.env = self._environment(install, config or {}, env or {})
        pool = [] if install else ["-P", os.environ.get("NODE_POOL", "custom")]  # NODE_POOL=prefork: what Celery does
        self.command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            app,
            "worker",
            "-l",
            "INFO",
            "-n",
            self.name,
            *pool,
            *args,
        ]
        self.command += [] if "--with-gossip" in args else ["--without-gossip", "--without-mingle"]
        self.process: subprocess.Popen[bytes] | None = None
        self.subscribed = False  # to remote control, as far as we know

    def _environment(self, install: bool, config: dict[str, Any], extra: dict[str, str]) -> dict[str, str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("MPWORKER_", "CELERY_", "SHOP_"))}
        env[MARK] = self.mark
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [HOME, os.environ.get("PYTHONPATH")]))
        env["SHOP_NOTES"] = str(self.notes.path)
        env["SHOP_CONFIG"] = json.dumps(config)
        env["MPWORKER_DATA_DIR"] = str(self.folder / "data")
        env["MPWORKER_JOURNAL"] = str(self.journal)
        if install:
            env["SHOP_INSTALL"] = "1"
        else:
            env["CELERY_CUSTOM_WORKER_POOL"] = POOL
        return {**env, **extra}

    # -- life

    def start(self) -> Node:
        self.launch()
        self.await_ready()
        return self

    def launch(self) -> None:
        log = os.open(self.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=self._output or log,
                stderr=self._output or log,
                start_new_session=True,
            )
        finally:
            os.close(log)

    def await_ready(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the worker ended with {self.process.returncode}:\n{self.log()}"
            return f"{self.name} ready." in self.log()

        try:
            eventually(ready, what="the worker is ready")
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def await_log(self, text: str, timeout: float = PATIENCE) -> str:
        def found() -> bool:
            ended = self.process is None or self.process.poll() is not None  # before looking: its last words count
            log = self.log()
            assert text in log or not ended, f"the worker ended without {text!r} in its log:\n{log[-3000:]}"
            return text in log

        eventually(found, timeout, f"{text!r} in the log of {self.name}, see {self.log_path}")
        return self.log()

    def signal(self, signum: int) -> None:
        assert self.process is not None
        self.process.send_signal(signum)

    def wait(self, timeout: float = PATIENCE) -> int:
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker has not ended within {timeout:g} s:\n{self.log()[-3000:]}") from None

    def stop(self, timeout: float = PATIENCE) -> int:
        """Warm; returns the exit code."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
        return self.wait(timeout)

    def kill(self) -> None:
        """For clean-up only: SIGKILL to the worker and to whatever of it is left a moment later."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(PATIENCE)
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self.process is not None and self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(15.0)
        finally:
            left = self.process is not None and self.process.poll() is None
            self.kill()
        assert not left or kind is not None, f"the worker did not stop on SIGTERM:\n{self.log()[-4000:]}"

    # -- its processes

    def processes(self) -> dict[int, str]:
        """pid -> title or command line, the main process included."""
        return marked(self.mark)

    def pids(self, title: str) -> list[int]:
        """Of processes whose title starts so, such as ``mpworker: worker``."""
        return [pid for pid, line in self.processes().items() if line.startswith(title)]

    def the_one(self, title: str) -> int:
        """The pid of the only process of that title, which a fork of it bears for a moment, too."""
        (pid,) = eventually(lambda: pids if len(pids := self.pids(title)) == 1 else [], what=f"one {title}")
        return pid

    def await_gone(self, timeout: float = PATIENCE) -> None:
        eventually(lambda: not self.processes(), timeout, f"no process left, but {self.processes()}")


@contextlib.contextmanager
def client_of(server: Server, **conf: Any) -> Iterator[Celery]:
    """An app that only sends and reads results."""
    app = Celery("client", broker=server.broker, backend=server.results, set_as_current=False)
    app.conf.update(conf)
    try:
        yield app
    finally:
        # AsyncResult.__del__ unsubscribes, whenever that is: not from a server that is gone.
        app.backend.result_consumer.cancel_for = lambda task_id: None
        app.close()


@contextlib.contextmanager
def running(folder: Path, *args: str, **options: Any) -> Iterator[tuple[Server, Node, Celery]]:
    """A server of its own, a node of the shop project on it, and a client."""
    with Server() as server:
        env = {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results, **options.pop("env", {})}
        with client_of(server) as client, Node(folder, *args, env=env, **options) as node:
            yield server, node, client


def shop_of(*args: str, **options: Any) -> Any:
    """A fixture for a module: :func:`running`, with these arguments."""
    import pytest

    @pytest.fixture(scope="module")
    def shop(tmp_path_factory: Any) -> Iterator[tuple[Server, Node, Celery]]:
        with running(tmp_path_factory.mktemp("shop"), *args, **options) as parts:
            yield parts

    return shop


def send(shop: tuple[Server, Node, Celery], name: str, *args: Any, **options: Any) -> Any:
    """Sends a task of the project: ``add`` of ``shop.tasks``, or ``hooks.hooked``."""
    return shop[2].send_task(f"shop.{name}" if "." in name else f"shop.tasks.{name}", args=args, **options)


def await_subscribed(client: Celery, node: Node) -> None:
    """A node is "ready" a moment before it has subscribed to what is broadcast, and that waits for nobody."""
    if not node.subscribed:
        eventually(lambda: client.control.ping(destination=[node.name], timeout=1.0), what="an answer to ping")
        node.subscribed = True


def ask(client: Celery, node: Node, method: str, *args: Any, **kwargs: Any) -> Any:
    """One remote control command; the answer of this node."""
    await_subscribed(client, node)
    inspect = client.control.inspect(destination=[node.name], timeout=PATIENCE, limit=1)
    answer = getattr(inspect, method)(*args, **kwargs)
    assert answer, f"no answer to {method}:\n{node.log()[-3000:]}"
    return answer[node.name]


def control(client: Celery, node: Node, command: str, **arguments: Any) -> Any:
    """One control command, such as ``pool_grow``; the answer of this node."""
    await_subscribed(client, node)
    answers = client.control.broadcast(
        command, arguments=arguments, destination=[node.name], reply=True, timeout=PATIENCE, limit=1
    )
    assert answers, f"no answer to {command}"
    return answers[0][node.name]
