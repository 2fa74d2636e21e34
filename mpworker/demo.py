"""The main job, for a first look: every ``.py`` file of a folder becomes a task of a real worker.

Owns one run: its private folder, its server, its worker, the view, the check that every result is in Redis and in the
journal. Never touches the user's own node, and leaves nothing running however it ends.
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import sysconfig
import time
import uuid
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from mpworker import embedded
from mpworker.celery.app import app
from mpworker.errors import ConfigurationError, MPWorkerError
from mpworker.monitor.progress import Progress
from mpworker.monitor.views import ProgressView, summary_table
from mpworker.results.query import ResultStore
from mpworker.results.record import canonical
from mpworker.settings import default_data_dir
from mpworker.subprocesses import Interrupts, NodeProcess

_FUNCTIONS = frozenset({ast.FunctionDef, ast.AsyncFunctionDef})
_LOOPS = {ast.For, ast.AsyncFor, ast.While}
_BLOCKS = _FUNCTIONS | _LOOPS | {ast.ClassDef, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match}
_TASK_SECONDS = 60
_STALL_SECONDS = 120.0
_END_SECONDS = 5.0
_TICK = 0.2
_MGET = 500
_LISTED = 10


class DemoError(MPWorkerError):
    """The run could not be finished. The message says what happened and where the log lies."""


@app.task(name="mpworker.demo.analyse", time_limit=_TASK_SECONDS)  # type: ignore[untyped-decorator]
def analyse(path: str) -> dict[str, Any]:
    """Parses one Python file and measures it.

    Returns:
        ``lines``, ``functions``, ``classes``, ``depth`` (deepest nesting of blocks), ``sha256``.

    Raises:
        SyntaxError, ValueError, OSError: the file cannot be parsed or read.
    """
    source = Path(path).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source, filename=path)
    functions = classes = depth = 0
    waiting: list[tuple[ast.AST, int]] = [(tree, 0)]
    while waiting:
        node, level = waiting.pop()
        kind = type(node)
        functions += kind in _FUNCTIONS
        classes += kind is ast.ClassDef
        level += kind in _BLOCKS
        depth = max(depth, level)
        waiting.extend((child, level) for child in ast.iter_child_nodes(node))
    return {
        "lines": source.count(b"\n") + (not source.endswith(b"\n") and source != b""),
        "functions": functions,
        "classes": classes,
        "depth": depth,
        "sha256": hashlib.sha256(source).hexdigest(),
    }


def python_files(folder: Path | None) -> list[Path]:
    """The ``.py`` files below ``folder``, or of the running interpreter's standard library, in a fixed order.

    Raises:
        ConfigurationError: there is no such folder, or no such file in it.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    if not root.is_dir():
        raise ConfigurationError(f"--dir: {root} is no folder")
    skipped = {"__pycache__"} if folder else {"__pycache__", "site-packages", "dist-packages"}
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        found += [Path(parent).absolute() / name for name in sorted(names) if name.endswith(".py")]
    if not found:
        raise ConfigurationError(f"--dir: there is no .py file in {root}")
    return found


class Demo:
    """One run."""

    def __init__(self, folder: Path | None, workers: int, data_dir: Path | None) -> None:
        self.files = python_files(folder)
        self.root = folder or Path(sysconfig.get_paths()["stdlib"])
        self.workers = workers
        try:
            base = data_dir or Path(os.environ.get("MPWORKER_DATA_DIR") or default_data_dir())
        except RuntimeError:
            raise ConfigurationError("this user has no home folder: use --data-dir") from None
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        self.home = base.expanduser().absolute() / "demo" / f"{stamp}-{os.getpid()}"
        self.paths: dict[str, Path] = {str(uuid.uuid4()): path for path in self.files}
        self.store = ResultStore(self.home / "journal")
        self.server: embedded.EmbeddedServer | None = None

    def run(self) -> int:
        """Runs to the end.

        Returns:
            the exit code: 0 only if every result was found in both places; 130 after Ctrl-C.

        Raises:
            ConfigurationError: the server or the data folder cannot be used.
            DemoError: the worker ended or hangs.
        """
        self._isolate()
        worker = NodeProcess(self.home / "worker.log", "mpworker.demo", self.workers)
        code = 130
        with Interrupts() as interrupts:
            try:
                try:
                    code = self._run(worker, interrupts)
                finally:
                    interrupts.hold()
            except KeyboardInterrupt:
                print("\nstopping", flush=True)
            finally:  # nothing interrupts from here on: either the hold is reached or an interrupt has been raised
                worker.stop(interrupts)
                self._end()
        return code

    def _run(self, worker: NodeProcess, interrupts: Interrupts) -> int:
        with interrupts.held():
            self.server = embedded.acquire(self.home)
            worker.start()
        self._await_ready(worker)
        began = time.monotonic()
        with interrupts.held():
            self._work(worker, interrupts)
            elapsed = time.monotonic() - began
        with interrupts.held():
            worker.stop(interrupts)
        return self._report(elapsed)

    def _isolate(self) -> None:
        """The run uses its own server and nothing that is configured for the user's nodes."""
        for name in [name for name in os.environ if name.startswith(("MPWORKER_", "CELERY_"))]:
            del os.environ[name]
        os.environ["MPWORKER_DATA_DIR"] = str(self.home)

    def _await_ready(self, worker: NodeProcess) -> None:
        print(f"{len(self.files):,} Python files in {self.root}; starting {self.workers} worker processes", flush=True)
        if not worker.await_line(" ready.", seconds=_STALL_SECONDS):
            raise DemoError(worker.describe("did not get ready"))

    def _work(self, worker: NodeProcess, interrupts: Interrupts) -> None:
        progress = Progress(total=len(self.files))
        with ProgressView(progress, title="files") as view:
            looked = time.monotonic()
            for _ in self._enqueue():
                interrupts.check()
                if time.monotonic() - looked > _TICK:
                    self._look(progress, view)
                    looked = time.monotonic()
            done, changed = -1, time.monotonic()
            while not self._look(progress, view):
                interrupts.check()
                now = time.monotonic()
                if progress.snapshot(now).done != done:
                    done, changed = progress.snapshot(now).done, now
                if worker.wait(_TICK):
                    raise DemoError(worker.describe("ended too early"))
                if now - changed > _STALL_SECONDS:
                    raise DemoError(worker.describe(f"has finished no task for {_STALL_SECONDS:g} s"))

    def _enqueue(self) -> Iterator[str]:
        from celery.result import denied_join_result

        # The journal tells what is done: no need to subscribe to the channel of every single task.
        with denied_join_result(), app.producer_or_acquire() as producer:
            for task_id, path in self.paths.items():
                analyse.apply_async((str(path),), task_id=task_id, producer=producer)
                yield task_id

    def _look(self, progress: Progress, view: ProgressView) -> bool:
        stats, now = self.store.get_statistics(), time.monotonic()
        progress.update(stats["completed"], stats["failed"], now, stats["mean_runtime"])
        view.refresh()
        return progress.snapshot(now).finished

    def _report(self, elapsed: float) -> int:
        from rich.console import Console

        records = {record.task_id: record for record in self.store.query()}
        timed = ((record.runtime, task_id) for task_id, record in records.items() if record.runtime is not None)
        slowest = sorted(timed, reverse=True)[:_LISTED]
        failed = [(self._name(r.task_id), r.message) for r in records.values() if canonical(r.status) != "SUCCESS"]
        stats = {**self.store.get_statistics(), "throughput": len(records) / elapsed if elapsed else 0.0}
        table = summary_table(
            stats,
            [(self._name(task_id), seconds) for seconds, task_id in slowest],
            failed[:_LISTED],
            title="mpworker demo",
            more_failures=max(0, len(failed) - _LISTED),
        )
        Console().print(table)
        problems = self._compare({task_id: canonical(record.status) for task_id, record in records.items()})
        print(f"journal: {self.home / 'journal'}")
        if problems:
            print(f"the check FAILED for {len(problems):,} of {len(self.files):,} tasks; the first: {problems[0]}")
            return 1
        print(f"checked: all {len(self.files):,} results are in Redis and in the journal, and are the same")
        return 0

    def _compare(self, journal: dict[str, str]) -> list[str]:
        """One line for each task whose result is missing or different somewhere."""
        ids, problems = list(self.paths), []
        for start in range(0, len(ids), _MGET):
            chunk = ids[start : start + _MGET]
            found = app.backend.mget([app.backend.get_key_for_task(task_id) for task_id in chunk])
            for task_id, payload in zip(chunk, found, strict=True):
                redis = app.backend.decode_result(payload)["status"] if payload else "nothing"
                if redis == "nothing" or redis != journal.get(task_id):
                    line = f"{self._name(task_id)}: {redis} in Redis, {journal.get(task_id, 'nothing')} in the journal"
                    problems.append(line)
        return problems

    def _name(self, task_id: str) -> str:
        path = self.paths.get(task_id)
        return task_id if path is None else os.path.relpath(path, self.root)

    def _end(self) -> None:
        """Ends the server; its data repeats the journal and is not kept."""
        app.close()
        if self.server is not None:
            self.server.release()
            if self.server.ended(_END_SECONDS):
                shutil.rmtree(self.home / "valkey", ignore_errors=True)
