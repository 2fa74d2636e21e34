"""The pools that are compared, each behind the same four methods. A library is imported only when it is asked for.

Every adapter starts its processes by fork where its library lets it choose. Ours has a time limit armed on every task.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
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
    #: without futures it takes part in ``map`` and ``start`` only
    has_futures = True
    #: takes part in these cells only, if there are any
    only: tuple[str, ...] = ()

    def __init__(self, workers: int) -> None:
        self.pool: Any = self.open(workers)

    def open(self, workers: int) -> Any:
        raise NotImplementedError

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """What :meth:`result` waits for."""
        return self.pool.submit(fn, *args)

    def result(self, future: Any) -> Any:
        return future.result()

    def map(self, fn: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """With the library's own default chunks."""
        return list(self.pool.map(fn, items))

    def close(self) -> None:
        self.pool.shutdown()


class Mpworker(Peer):
    def open(self, workers: int) -> Any:
        from mpworker import ProcessPool

        return ProcessPool(workers, start_method="fork", timeout=TIMEOUT)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.schedule(fn, args, timeout=TIMEOUT)


class Unlimited(Mpworker):
    """Ours without a limit: then ``map`` may let tiny items travel together, as the others do."""

    only = ("map",)

    def open(self, workers: int) -> Any:
        from mpworker import ProcessPool

        return ProcessPool(workers, start_method="fork")


class Multiprocessing(Peer):
    def open(self, workers: int) -> Any:
        return multiprocessing.get_context("fork").Pool(workers)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, future: Any) -> Any:
        return future.get()

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


class Billiard(Multiprocessing):
    needs = "billiard"

    def open(self, workers: int) -> Any:
        import billiard

        return billiard.get_context("fork").Pool(workers)


class Futures(Peer):
    def open(self, workers: int) -> Any:
        from concurrent.futures import ProcessPoolExecutor

        return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))


class Pebble(Peer):
    needs = "pebble"

    def open(self, workers: int) -> Any:
        import pebble

        return pebble.ProcessPool(workers, context=multiprocessing.get_context("fork"))

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
    needs = "joblib"
    has_futures = False

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

        return mpire.WorkerPool(workers, start_method="fork", keep_alive=True)

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, future: Any) -> Any:
        return future.get()

    def close(self) -> None:
        self.pool.stop_and_join()


PEERS: dict[str, type[Peer]] = {
    "mpworker": Mpworker,
    "mpworker, no limit": Unlimited,
    "multiprocessing": Multiprocessing,
    "ProcessPoolExecutor": Futures,
    "billiard": Billiard,
    "pebble": Pebble,
    "loky": Loky,
    "joblib": Joblib,
    "mpire": Mpire,
}


def is_installed(name: str) -> bool:
    needs = PEERS[name].needs
    return not needs or importlib.util.find_spec(needs) is not None
