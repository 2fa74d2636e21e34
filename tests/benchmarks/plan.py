"""Which cells there are, beside whom each is measured, and what is wanted of it."""

from __future__ import annotations

from dataclasses import dataclass

from peers import PEERS

_OURS = ("mpworker", "mpworker auto", "mpworker forkserver", "mpworker spawn")
_EXECUTORS = ("ProcessPoolExecutor", "ProcessPoolExecutor forkserver", "ProcessPoolExecutor spawn")
#: Stands for whichever of the others has the best figure.
BEST_PEER = "the best peer"
_10_MB = 10 << 10


@dataclass(frozen=True)
class Target:
    """A figure of ours (a median) is at least, or if less is better at most, ``factor`` times another one."""

    factor: float
    #: a pool, :attr:`BEST_PEER`, or nobody: then the factor is the figure itself
    beside: str = ""
    #: which figure
    ours: str = "mpworker"
    size: int = 0
    part: str = ""
    #: that of the other, if it is not the same
    beside_size: int = 0
    #: not the median but the worst round counts
    worst: bool = False


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    title: str
    unit: str
    #: how much is done in a figure, and with ``--quick``
    count: int
    quick: int
    targets: tuple[Target, ...]
    #: why a target that is not met is not
    why: str = ""
    more_is_better: bool = True
    pools: tuple[str, ...] = tuple(PEERS)
    #: several runs of the same cell, shown as columns; with ``--quick``; with ``--deep`` these as well
    sizes: tuple[int, ...] = (0,)
    quick_sizes: tuple[int, ...] = ()
    deep_sizes: tuple[int, ...] = ()
    size_unit: str = ""
    #: compared with in the last column
    baseline: str = "multiprocessing"
    #: how many workers; 0: one for each CPU, -1: the size
    workers: int = 0
    script: str = "measure.py"


CELLS = {
    "noop": Cell(
        "no-op tasks, every future awaited",
        "tasks/s",
        20_000,
        5_000,
        (Target(3, "multiprocessing"), Target(6, "pebble"), Target(6, "ProcessPoolExecutor")),
        "Of a task's cost about half is the parent's (packing, the future, unpacking) and half the worker's; the "
        "dispatcher has the rest.",
    ),
    "map": Cell(
        "no-op tasks through map",
        "tasks/s",
        50_000,
        10_000,
        (Target(1, "multiprocessing"),),
        "Its items are counted, limited and cut one by one inside a chunk, which costs each some tenths of a "
        "microsecond; between two runs of the same day it was 0.86 and 1.41 times multiprocessing.",
        pools=(*PEERS, "joblib", "mpworker, no limit"),
    ),
    "busy": Cell(
        "tasks of 1 ms on all cores",
        "% of ideal",
        2_000,
        500,
        (Target(95),),
        "Measured in processor time, and the parent, the dispatcher and two watchdogs need the same two processors: "
        "no pool comes near.",
    ),
    "payload": Cell(
        "argument and result, by size",
        "ms",
        10,
        5,
        (Target(1, BEST_PEER, size=_10_MB), Target(1, BEST_PEER, size=_10_MB, part="numpy")),
        "There are two hops in each direction, through the dispatcher, and each copies.",
        more_is_better=False,
        sizes=(64, 1 << 10, _10_MB),
        size_unit=" KB",
    ),
    "latency": Cell(
        "round trip on an idle pool",
        "µs",
        500,
        200,
        (Target(1, "multiprocessing", part="p50"), Target(1, "multiprocessing", part="p99")),
        "Two processes lie between the caller and its result, not one: twice two wake-ups instead of two.",
        more_is_better=False,
    ),
    "mixed": Cell(
        "tiny tasks beside a long one: from submission to result",
        "ms",
        200,
        100,
        (Target(20, part="max", worst=True), Target(20, part="burst, added")),
        "How far the machine itself is to blame is in the column without the long one (max alone). Tiny tasks that "
        "were handed out together with it come back once it has shown to be long, after 2 to 3 ms.",
        more_is_better=False,
    ),
    "start": Cell(
        "import to first result, by start method",
        "ms",
        1,
        1,
        (
            Target(1.5, "ProcessPoolExecutor"),
            Target(1.5, "ProcessPoolExecutor forkserver", ours="mpworker auto"),
            Target(1.5, "ProcessPoolExecutor forkserver", ours="mpworker forkserver"),
            Target(1.5, "ProcessPoolExecutor spawn", ours="mpworker spawn"),
        ),
        "The parent imports the pool, then starts an interpreter for the dispatcher, which imports it once more; only "
        "after that are there workers.",
        more_is_better=False,
        pools=(*_OURS, *_EXECUTORS, *(name for name in PEERS if name not in (*_OURS, *_EXECUTORS)), "joblib"),
        baseline="ProcessPoolExecutor",
    ),
    "replacement": Cell(
        "kill -9 of a worker to a result of its successor, all others busy",
        "ms",
        5,
        3,
        (Target(50, ours="mpworker auto", part="busy"), Target(50, ours="mpworker auto", part="idle")),
        more_is_better=False,
        why="A worker that is not forked starts an interpreter and imports the application.",
        pools=(*_OURS, "multiprocessing", "billiard", "pebble"),
    ),
    "memory": Cell(
        "proportional set size of idle workers, with celery, numpy and pandas",
        "MB",
        1,
        1,
        (Target(1, "billiard", ours="mpworker auto", part="per worker"),),
        "Each worker has a second thread and a page of results. With the start method fork, which shares the memory "
        "of the parent as prefork does, it is less than prefork's.",
        more_is_better=False,
        pools=(*_OURS, "billiard", "billiard, gc.freeze()", "multiprocessing"),
        baseline="billiard",
        workers=4,
        script="application.py",
    ),
    "growth": Cell(
        "no-op tasks by tasks queued at once",
        "tasks/s",
        20_000,
        10_000,
        (
            Target(0.9, "mpworker", size=10_000, beside_size=1_000),
            Target(0.9, "mpworker", size=100_000, beside_size=1_000),
            Target(0.9, "mpworker", size=1_000_000, beside_size=1_000),
        ),
        pools=("mpworker", "multiprocessing"),
        sizes=(1_000, 10_000, 100_000),
        deep_sizes=(1_000_000,),
    ),
    "workers": Cell(
        "no-op tasks by workers",
        "tasks/s",
        10_000,
        5_000,
        (Target(0.5, "mpworker", size=64, beside_size=1), Target(0.5, "mpworker", size=64, beside_size=2)),
        why="Whoever is idle gets a tiny task at once: the more workers, the fewer tasks travel together, and the more "
        "often a process has to be woken for one.",
        pools=("mpworker", "multiprocessing", "ProcessPoolExecutor"),
        sizes=(1, 2, 4, 8, 16, 32, 64),
        quick_sizes=(1, 2, 8, 64),
        workers=-1,
    ),
}
