"""The pools that are compared, each behind the same few methods. A library is imported only when it is asked for.

Processes start by fork where a library lets one choose and a name says nothing else. Ours has a time limit armed on
every task.
"""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

TIMEOUT = 60.0


class Peer:
    """One pool.

    Args:
        workers: its processes.
    """

    #: the module that must be installed; empty for the standard library
    needs = ""
    #: start method
    method = "fork"
    #: which killed workers it replaces
    replaces: tuple[str, ...] = ()

    def __init__(self, workers: int) -> None:
        self.workers = workers
        #: before its library is imported, by ``time.perf_counter()``
        self.began = time.perf_counter()
        self.pool: Any = self.open(workers)

    def open(self, workers: int) -> Any:
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """What :meth:`result` waits for."""
        return self.pool.submit(fn, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def then(self, fn: Callable[..., Any], argument: Any, call: Callable[[], object]) -> None:
        """Submits; the call is made when the result is there, in whatever thread."""
        self.submit(fn, argument).add_done_callback(lambda _: call())

    def map(self, fn: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """With the library's own default chunks."""
        return list(self.pool.map(fn, items))

    def close(self) -> None:
        self.pool.shutdown()


class Mpworker(Peer):
    replaces = ("busy", "idle")

    def open(self, workers: int) -> Any:
        from mpworker import ProcessPool

        return ProcessPool(workers, start_method=self.method, timeout=TIMEOUT)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args, timeout=TIMEOUT)


class Unlimited(Mpworker):
    """Ours without a limit: then ``map`` may let tiny items travel together, as the others do."""

    def open(self, workers: int) -> Any:
        from mpworker import ProcessPool

        return ProcessPool(workers, start_method=self.method)


class Multiprocessing(Peer):
    replaces = ("busy",)  # an idle one dies with the lock of the queue in its hands, and nobody gets a task any more

    def open(self, workers: int) -> Any:
        import multiprocessing

        return multiprocessing.get_context(self.method).Pool(workers)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, future: Any) -> Any:
        return future.get()

    def then(self, fn: Callable[..., Any], argument: Any, call: Callable[[], object]) -> None:
        self.pool.apply_async(fn, (argument,), callback=lambda _: call())

    def close(self) -> None:
        self.pool.terminate()  # not close(): it would wait for the tasks of killed workers
        self.pool.join()


class Billiard(Multiprocessing):
    needs = "billiard"

    def open(self, workers: int) -> Any:
        import billiard

        return billiard.get_context(self.method).Pool(workers)


class Frozen(Billiard):
    """What was imported before the fork is out of the collector's sight."""

    def open(self, workers: int) -> Any:
        import gc

        gc.freeze()
        return super().open(workers)


class Futures(Peer):
    def open(self, workers: int) -> Any:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(workers, multiprocessing.get_context(self.method))


class Pebble(Peer):
    needs = "pebble"
    replaces = ("busy", "idle")

    def open(self, workers: int) -> Any:
        import multiprocessing

        import pebble

        return pebble.ProcessPool(workers, context=multiprocessing.get_context(self.method))

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args=args, timeout=TIMEOUT)

    def map(self, fn: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        return list(self.pool.map(fn, items, timeout=TIMEOUT).result())

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Loky(Peer):
    needs = "loky"

    def open(self, workers: int) -> Any:
        import loky

        return loky.ProcessPoolExecutor(workers)  # its own start method: fork is not supported with its executor


class Joblib(Peer):
    """Without futures: it can map only."""

    needs = "joblib"

    def open(self, workers: int) -> Any:
        import joblib

        return joblib.Parallel(n_jobs=workers)

    def map(self, fn: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        from joblib import delayed

        return list(self.pool(delayed(fn)(item) for item in items))

    def close(self) -> None:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown()


class Mpire(Peer):
    needs = "mpire"

    def open(self, workers: int) -> Any:
        import mpire

        return mpire.WorkerPool(workers, start_method=self.method, keep_alive=True)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, future: Any) -> Any:
        return future.get()

    def then(self, fn: Callable[..., Any], argument: Any, call: Callable[[], object]) -> None:
        self.pool.apply_async(fn, (argument,), callback=lambda _: call())

    def close(self) -> None:
        self.pool.stop_and_join()


def _by(method: str, peer: type[Peer]) -> type[Peer]:
    return type(peer.__name__, (peer,), {"method": method})


#: Each takes part in every cell that names no others.
PEERS: dict[str, type[Peer]] = {
    "mpworker": Mpworker,
    "multiprocessing": Multiprocessing,
    "ProcessPoolExecutor": Futures,
    "billiard": Billiard,
    "pebble": Pebble,
    "loky": Loky,
    "mpire": Mpire,
}
ALL: dict[str, type[Peer]] = PEERS | {
    "joblib": Joblib,
    "mpworker, no limit": Unlimited,
    "mpworker auto": _by("auto", Mpworker),
    "mpworker forkserver": _by("forkserver", Mpworker),
    "mpworker spawn": _by("spawn", Mpworker),
    "ProcessPoolExecutor forkserver": _by("forkserver", Futures),
    "ProcessPoolExecutor spawn": _by("spawn", Futures),
    "billiard, gc.freeze()": Frozen,
}


def is_installed(name: str) -> bool:
    import importlib.util

    needs = ALL[name].needs
    return not needs or importlib.util.find_spec(needs) is not None
