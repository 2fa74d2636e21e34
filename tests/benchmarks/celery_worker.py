"""A node with our pool beside the same node with prefork: ``python tests/benchmarks/celery_worker.py``.

The same app on the same kind of server, results kept, two processes; both take turns within each round, so that a
machine that slows down slows both. The report is ``celery-results.md`` beside this file.

    --rounds N    default 5        --quick    fewer tasks        --out FOLDER    where the report goes
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent)]
import support  # noqa: E402

POOLS = ("mpworker", "prefork")
PROCESSES = 2
#: Of a node that is larger, for its memory.
MORE = 8
PATIENCE = 180.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Target(NamedTuple):
    """What is wanted of ours beside prefork, or by itself."""

    title: str
    factor: float
    at_most: bool = True
    alone: bool = False


#: By the figure's name.
TARGETS = {
    "start, s": Target("from the command to ready", 1.0),
    "round trip p50, ms": Target("one task at a time, from delay() to get(); one here, one there", 1.0),
    "round trip p99, ms": Target("the same", 1.0),
    "no-op, tasks/s": Target("what waits in the broker, until the last result is kept", 1.0, at_most=False),
    "1 ms, tasks/s": Target("the same with tasks of 1 ms", 0.0, at_most=False),
    "10 ms, of the ideal": Target("the same with tasks of 10 ms; 1 is processes / duration", 0.98, False, alone=True),
    "MainProcess, us of CPU per no-op": Target("its own time, in user and kernel mode", 1.0),
    "node, us of CPU per no-op": Target("all of its processes together", 0.0),
    "50 late acks, s": Target("with a prefetch of one", 1.0, alone=True),
    "node, MB": Target("proportional set size of all its processes, after all of this", 1.0),
    f"node of {MORE} processes, MB": Target("the same", 1.0),
}


#: Where a target is missed for a reason that is known; ``{bare}``: what :func:`bare` has measured.
_WHY = {
    "10 ms, of the ideal": "Celery's own tracing of these tasks, one after the other in {processes} processes with "
    "neither broker nor pool nor result, comes to {bare:.2f}: a sleep takes a little longer than 10 ms, and what "
    "follows it runs in a processor that has slept.",
    "node, MB": "The dispatcher, the template and the shipper are processes that prefork does not have. They share the "
    "application's memory, however large it is, and write to some 3, 5 and 8 MB of it. Each worker takes less than a "
    "child of prefork does, so that from three processes on a node is the smaller one.",
}


class Node:
    """A ``celery worker`` process and its children."""

    def __init__(self, pool: str, folder: Path, processes: int, more: dict[str, str]) -> None:
        self.log = folder / "log"
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"BENCH_POOL": pool, "MPWORKER_DATA_DIR": str(folder / "data"), **more}
        env["PYTHONPATH"] = os.pathsep.join([str(_HERE), *filter(None, sys.path)])
        command = [sys.executable, "-m", "celery", "-A", "celery_app", "worker", "-l", "INFO", "-c", str(processes)]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        command += ["-P", "prefork"] if pool == "prefork" else []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )

    def await_ready(self) -> None:
        support.wait_until(lambda: " ready." in self.log.read_text(), PATIENCE, "the node is ready")

    def pids(self) -> list[int]:
        """Its processes: all that descend from it."""
        parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}

        def descends(pid: int) -> bool:
            while pid and pid != self.process.pid:
                pid = parents.get(pid, 0)
            return pid != 0

        return [pid for pid in parents if descends(pid)]

    def cpu(self, pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def memory(self) -> float:
        """Megabytes."""
        total = 0
        for pid in self.pids():
            found = re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) if found else 0
        return total / 1024

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


@contextmanager
def _running(pool: str, processes: int = PROCESSES, **more: str) -> Iterator[Running]:
    """A node on a server of its own, and the app as a client of it."""
    with tempfile.TemporaryDirectory() as folder, support.RedisServer() as server:
        os.environ["BENCH_URL"] = f"redis://127.0.0.1:{server.port}"
        sys.modules.pop("celery_app", None)  # that of another server
        import celery_app

        begun = time.monotonic()
        node = Node(pool, Path(folder), processes, more)
        try:
            node.await_ready()
            yield Running(node, celery_app, server.client(db=0), server.client(db=1), time.monotonic() - begun)
        finally:
            node.end()
            celery_app.app.close()


class Running(NamedTuple):
    """A node that is ready."""

    node: Node
    tasks: Any
    messages: Any
    results: Any
    #: seconds
    start: float

    def run(self, task: Any, count: int, *args: Any) -> float:
        """Seconds from the first to the last of what waited."""
        app, before = self.tasks.app, self.results.dbsize()
        with app.producer_or_acquire() as producer:
            for _ in range(count):
                task.apply_async(args, producer=producer, queue="aside")
        begun = time.monotonic()
        # All at once into the queue that the node waits for. Another queue it would notice after up to a second only.
        self.messages.rename("aside", app.conf.task_default_queue)
        while self.results.dbsize() < before + count:
            if time.monotonic() > begun + PATIENCE:
                raise TimeoutError(f"{self.results.dbsize() - before} of {count} results:\n{self.node.log.read_text()}")
            time.sleep(0.002)
        return time.monotonic() - begun


def measure(pool: str, counts: dict[str, int]) -> dict[str, float]:
    """The figures of two nodes, one after the other."""
    found: dict[str, float] = {}
    with _running(pool) as running:
        node, tasks = running.node, running.tasks
        found["start, s"] = running.start
        for _ in range(20):
            tasks.noop.delay().get(timeout=PATIENCE)
        main, everybody = node.process.pid, node.pids()
        before = {pid: node.cpu(pid) for pid in everybody}
        count = counts["no-op"]
        found["no-op, tasks/s"] = count / running.run(tasks.noop, count)
        used = {pid: node.cpu(pid) - before[pid] for pid in everybody}
        found["MainProcess, us of CPU per no-op"] = 1e6 * used[main] / count
        found["node, us of CPU per no-op"] = 1e6 * sum(used.values()) / count
        found["1 ms, tasks/s"] = counts["1 ms"] / running.run(tasks.nap, counts["1 ms"], 0.001)
        ideal = PROCESSES / 0.01
        found["10 ms, of the ideal"] = counts["10 ms"] / running.run(tasks.nap, counts["10 ms"], 0.01) / ideal
        found["node, MB"] = node.memory()
    with _running(pool, BENCH_PREFETCH="1") as running:
        running.run(running.tasks.late, 10)
        found["50 late acks, s"] = running.run(running.tasks.late, 50)
    with _running(pool, MORE) as running:
        running.run(running.tasks.noop, counts["no-op"])
        running.run(running.tasks.nap, counts["10 ms"], 0.01)
        found[f"node of {MORE} processes, MB"] = running.node.memory()
    return found


def make_trips(count: int) -> dict[str, dict[str, float]]:
    """Both nodes at once, which have nothing else to do: one round trip with the one, one with the other."""
    trips: dict[str, list[float]] = {pool: [] for pool in POOLS}
    with ExitStack() as stack:
        nodes = {pool: stack.enter_context(_running(pool)) for pool in POOLS}
        for running in nodes.values():
            for _ in range(20):
                running.tasks.noop.delay().get(timeout=PATIENCE)
        while len(trips[POOLS[-1]]) < count:
            for pool, running in nodes.items():
                sent = time.perf_counter()
                running.tasks.noop.delay().get(timeout=PATIENCE)
                trips[pool].append(1000 * (time.perf_counter() - sent))
    names = "round trip p50, ms", "round trip p99, ms"
    return {pool: dict(zip(names, (median(t), quantiles(t, n=100)[98]), strict=True)) for pool, t in trips.items()}


def bare(count: int) -> float:
    """What Celery itself makes of tasks of 10 ms in processes that wait for nothing, of the ideal."""
    env = os.environ | {"BENCH_URL": "memory://", "PYTHONPATH": os.pathsep.join([str(_HERE), *filter(None, sys.path)])}
    script = f"import celery_app; print(celery_app.trace({count}))"
    commands = [[sys.executable, "-c", script]] * PROCESSES
    children = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for command in commands]
    return median(count * 0.01 / float(child.communicate()[0]) for child in children)


def report(figures: dict[str, dict[str, list[float]]], bound: list[float], rounds: int, command: str) -> str:
    """The table as markdown: medians, and the spread over the rounds."""
    lines = [
        "# A node with our pool beside prefork",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}: medians of {rounds} alternating rounds, lowest to highest in "
        f"brackets; {len(os.sched_getaffinity(0))} CPUs, {PROCESSES} processes, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}. Results are kept: ours in the journal and in Redis, prefork's in "
        "Redis. Absolute figures are this machine's; compare within a line.",
        "",
        "| | mpworker | prefork | ratio | wanted |",
        "|---|---|---|---|---|",
    ]
    missed = []
    for name, target in TARGETS.items():
        ours, theirs = figures["mpworker"][name], figures["prefork"][name]
        ratio = median(ours) / median(theirs)
        measured = median(ours) if target.alone else ratio
        wanted = ""
        if target.factor:
            met = measured <= target.factor if target.at_most else measured >= target.factor
            limit = f"{'at most' if target.at_most else 'at least'} {target.factor:g}"
            wanted = f"{limit}: {'met' if met else '**not met**'}"
            if not met:
                why = f" {_WHY[name].format(bare=median(bound), processes=PROCESSES)}" if name in _WHY else ""
                missed.append(f"- {name}: {measured:.2f} instead of {target.factor:g}.{why}")
        lines.append(f"| {name} ({target.title}) | {_shown(ours)} | {_shown(theirs)} | {ratio:.2f} | {wanted} |")
    return "\n".join([*lines, "", "## What falls short", "", *(missed or ["Nothing."])]) + "\n"


def _shown(values: list[float]) -> str:
    middle, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in _spread(values))
    return f"{middle} ({low} … {high})"


def _spread(values: list[float]) -> tuple[float, float, float]:
    return median(values), min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=_HERE)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    counts = {"trips": 600, "no-op": 4000, "1 ms": 3000, "10 ms": 1000}
    if options.quick:
        counts = {name: count // 4 for name, count in counts.items()}
    command = " ".join(["python tests/benchmarks/celery_worker.py", *sys.argv[1:]])
    figures: dict[str, dict[str, list[float]]] = {pool: {name: [] for name in TARGETS} for pool in POOLS}
    for pool in POOLS:  # not counted: files come into memory, bytecode is written
        measure(pool, dict.fromkeys(counts, 100))
    bound = []
    for turn in range(options.rounds):
        bound.append(bare(200))
        for pool in POOLS if turn % 2 else POOLS[::-1]:
            for name, value in measure(pool, counts).items():
                figures[pool][name].append(value)
        for pool, found in make_trips(counts["trips"]).items():
            for name, value in found.items():
                figures[pool][name].append(value)
        print(f"round {turn + 1} of {options.rounds} is done", file=sys.stderr, flush=True)
        text = report(figures, bound, turn + 1, command)
        (options.out / "celery-results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
