"""What is measured: the tasks, and the cells that run them.

A cell takes a new pool, how much to do and, where it has several, its size; it returns figures by name. This file
imports next to nothing: every child of a pool loads it too, and ``start`` counts what a pool's own library imports.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from peers import Peer

#: Seconds between two tiny tasks in ``mixed``.
_BEAT = 0.005


# -- tasks -----------------------------------------------------------------------------------------------------------


def noop(number: int) -> int:
    return number


def echo(data: Any) -> Any:
    return data


def spin(_: int) -> None:
    """One millisecond of processor time."""
    end = time.thread_time() + 0.001
    while time.thread_time() < end:
        pass


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def tidy(seconds: float) -> int:
    """What happens now and then in each process that works: the collector looks at all objects, and writes to them."""
    import gc

    gc.collect()
    return nap(seconds)


def hold(folder: str) -> None:
    """Keeps its worker busy until the folder has gone; a file in it tells who that is."""
    with open(os.path.join(folder, str(os.getpid())), "w"):
        pass
    while os.path.exists(folder):
        time.sleep(0.005)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _all(peer: Peer, fn: Callable[..., Any], arguments: Iterable[Any]) -> float:
    """Seconds until every future of these calls has its result."""
    began = time.perf_counter()
    futures = [peer.submit(fn, argument) for argument in arguments]
    for future in futures:
        peer.result(future)
    return time.perf_counter() - began


def _warm(peer: Peer) -> None:
    """Afterwards every worker is there, and the pool has seen that tasks are tiny."""
    _in_each(peer, nap)
    _all(peer, noop, range(500))


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _in_each(peer: Peer, fn: Callable[[float], int]) -> set[int]:
    """Has every worker run a task; returns their pids."""
    pids: set[int] = set()
    while len(pids) < peer.workers:
        pids.update(map(peer.result, [peer.submit(fn, 0.1) for _ in range(peer.workers)]))
    return pids


# -- how fast --------------------------------------------------------------------------------------------------------


def throughput(peer: Peer, count: int, size: int) -> dict[str, float]:
    _warm(peer)
    return {"": count / _all(peer, noop, range(count))}


def mapped(peer: Peer, count: int, size: int) -> dict[str, float]:
    peer.map(noop, range(500))
    began = time.perf_counter()
    assert peer.map(noop, range(count)) == list(range(count))
    return {"": count / (time.perf_counter() - began)}


def busy(peer: Peer, count: int, size: int) -> dict[str, float]:
    _warm(peer)
    return {"": 100 * count * 0.001 / peer.workers / _all(peer, spin, range(count))}


def payload(peer: Peer, count: int, size: int) -> dict[str, float]:
    """There and back, of ``size`` KB; those of 10 MB also as an array, if there is numpy."""
    _warm(peer)
    bodies: dict[str, Any] = {"": os.urandom(size << 10)}
    if size == 10 << 10:
        try:
            import numpy

            bodies["numpy"] = numpy.frombuffer(bodies[""], dtype=numpy.float64)
        except ImportError:
            pass
    return {name: 1000 * _middle([_all(peer, echo, [body]) for _ in range(count)]) for name, body in bodies.items()}


def latency(peer: Peer, count: int, size: int) -> dict[str, float]:
    _warm(peer)
    times = []
    for number in range(count):
        time.sleep(0.001)  # idle again
        times.append(1e6 * _all(peer, noop, [number]))
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def growth(peer: Peer, count: int, size: int) -> dict[str, float]:
    """``size`` tasks at once, again and again until ``count`` are done."""
    _warm(peer)
    times = max(1, count // size)
    return {"": times * size / sum(_all(peer, noop, range(size)) for _ in range(times))}


# -- who waits -------------------------------------------------------------------------------------------------------


def mixed(peer: Peer, count: int, size: int) -> dict[str, float]:
    """Milliseconds until tiny tasks have their results, beside a long one and another worker that is free.

    ``max`` and ``p50`` are of a steady row while the long one runs, ``max alone`` of the same row without it. ``burst``
    is the last of a burst with the long one in its midst, the worst of five, and ``burst, added`` by how much that is
    later than without it.
    """
    steady, alone = _delays(peer, count, _BEAT, long=count * _BEAT + 0.2, at=0), _delays(peer, count, _BEAT)
    bursts = [(max(_delays(peer, 200, 0, long=0.2, at=100)), max(_delays(peer, 200, 0))) for _ in range(5)]
    last, without = max(burst for burst, _ in bursts), _middle([burst for _, burst in bursts])
    figures = {"max": max(steady), "max alone": max(alone), "p50": _middle(steady)}
    return figures | {"burst": last, "burst, added": max(0.0, last - without)}


def _delays(peer: Peer, count: int, beat: float, long: float = 0.0, at: int = -1) -> list[float]:
    """Milliseconds from submission to result of tiny tasks, one a ``beat``; a long one comes before number ``at``."""
    _warm(peer)  # the pool believes that tasks are tiny
    delays: list[float] = []

    def measured(number: int) -> None:
        began = time.perf_counter()
        peer.then(noop, number, lambda: delays.append(1000 * (time.perf_counter() - began)))

    begun, last = time.perf_counter(), None
    for number in range(count):
        if number == at:
            last = peer.submit(nap, long)
        measured(number)
        time.sleep(max(0.0, begun + (number + 1) * beat - time.perf_counter()) if beat else 0.0)
    while len(delays) < count:
        time.sleep(0.001)
    if last is not None:
        peer.result(last)
    return delays


# -- start and end of processes --------------------------------------------------------------------------------------


def start(peer: Peer, count: int, size: int) -> dict[str, float]:
    peer.map(noop, [0])
    return {"": 1000 * (time.perf_counter() - peer.began)}


def replacement(peer: Peer, count: int, size: int) -> dict[str, float]:
    """Milliseconds from ``kill -9`` of a worker, busy or idle, to the result of a task in its successor."""
    return {
        state: 1000 * _middle([_until_replaced(peer, state == "busy") for _ in range(count)]) for state in peer.replaces
    }


def _until_replaced(peer: Peer, is_busy: bool) -> float:
    import signal
    import tempfile

    known, held = _in_each(peer, nap), peer.workers if is_busy else peer.workers - 1
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(held):
            peer.submit(hold, folder)
        while len(holding := set(map(int, os.listdir(folder)))) < held:
            time.sleep(0.001)
        began = time.perf_counter()
        os.kill((holding if is_busy else known - holding).pop(), signal.SIGKILL)
        successor = peer.result(peer.submit(nap, 0.0))  # nobody else is free
        took = time.perf_counter() - began
    assert successor not in known
    return took


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(peer: Peer, count: int, size: int) -> dict[str, float]:
    """MB of proportional set size, idle: of a worker after one task, and after a full collection; of everything."""
    pids = _in_each(peer, nap)
    time.sleep(0.2)
    fresh, everything = _pss(pids) / len(pids), _pss(_family(os.getpid()))
    pids = _in_each(peer, tidy)
    return {"per worker": fresh, "after gc.collect()": _pss(pids) / len(pids), "all processes": everything}


def _pss(pids: Iterable[int]) -> float:
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children") as children:
            for child in children.read().split():
                found += _family(int(child))
    return found


CELLS = {
    "noop": throughput,
    "map": mapped,
    "busy": busy,
    "payload": payload,
    "latency": latency,
    "mixed": mixed,
    "start": start,
    "replacement": replacement,
    "memory": memory,
    "growth": growth,
    "workers": throughput,
}
