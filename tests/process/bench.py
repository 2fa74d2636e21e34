"""What a cell of the fault matrix is measured with: a pool, its output, and whether it is whole."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import support
from process import faults
from support import PATIENCE, SLACK, wait_until

from mpworker import ProcessPool

SIZE = 2
#: Seconds of a hard limit; and by what it and a death may be late.
LIMIT = 0.3
LATE, DEATH = 1.0 + SLACK, 0.2 + SLACK


class Output:
    """A pipe for what a pool's processes print; counted, and at its end once nobody is left who could print."""

    def __init__(self) -> None:
        self.size = 0
        self._others = ",".join(_descriptors())
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        while data := os.read(self._reader, 1 << 20):
            self.size += len(data)
        os.close(self._reader)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Processes that are started meanwhile print to it."""
        before, stdout = os.dup(1), sys.stdout
        os.environ[faults.SPARED] = self._others
        stdout.flush()
        os.dup2(self._writer, 1)
        os.close(self._writer)
        try:
            with open(1, "w", closefd=False) as sys.stdout:  # a fork would go on with pytest's
                yield
        finally:
            sys.stdout = stdout
            os.dup2(before, 1)
            os.close(before)
            del os.environ[faults.SPARED]

    def ended(self) -> bool:
        return not self._thread.is_alive()


def _descriptors() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"/proc/self/fd/{name}")


class Bench:
    """A pool and what it prints."""

    def __init__(self, method: str, size: int = SIZE, **options: Any) -> None:
        # With the faults imported a short limit finds the fault itself.
        ready = {"initializer": import_module, "initargs": (faults.__name__,)}
        self.output = Output()
        self.pool = ProcessPool(size, start_method=method, **{**ready, **options})

    def workers(self) -> set[int]:
        """The workers' pids, once there are as many as asked for, all alive."""

        def ready() -> set[int] | None:
            pids = {worker["pid"] for worker in self.pool.stats()["workers"] if worker["lane"] == 0}
            return pids if len(pids) == SIZE and all(map(support.alive, pids)) else None

        return wait_until(ready, what=f"the pool has {SIZE} living workers: {self.pool.stats()}")

    def printed(self, before: int) -> None:
        wait_until(lambda: self.output.size - before >= faults.MUCH, what="all that was printed arrives")


@contextlib.contextmanager
def bench(method: str, *, start: bool = True, **options: Any) -> Iterator[Bench]:
    """A pool that is at full size; that ends in time and leaves nothing behind."""
    before = set(support.processes())
    made = Bench(method, **options)
    try:
        with made.output.connected():
            if start:
                assert made.pool.submit(support.give, 1).result(PATIENCE) == 1
                made.workers()
            else:
                made.pool._started()
        yield made
    finally:
        begun = time.monotonic()
        made.pool.shutdown()
    assert time.monotonic() - begun < 2.0 + SLACK
    wait_until(lambda: not set(support.processes()) - before, 2.0 + SLACK, "no process is left")
    wait_until(made.output.ended, 2.0, "nobody holds what the processes print to")
