"""Storing results, ours beside Celery's own Redis backend: ``python tests/benchmarks/results.py``.

Two processes call ``store_result`` as the workers of a node do; with ours, a shipper and a flusher run beside them as
in a node. All take turns within each round, so that a machine that slows down slows all. The report is
``results-results.md`` beside this file.

    --rounds N    default 5        --count N    results of each process, default 5000        --out FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE.parent)]
import support  # noqa: E402
from celery import Celery  # noqa: E402
from celery.app.task import Context  # noqa: E402

from mpworker.celery import backend as backends  # noqa: E402
from mpworker.celery.shipping import Shipping  # noqa: E402
from mpworker.results.bell import Bell  # noqa: E402
from mpworker.results.journal import Flusher, Journal  # noqa: E402
from mpworker.settings import Settings  # noqa: E402

CHILDREN = 2
NODE = "celery@bench"
PATIENCE = 180.0
#: One result of this many is looked for, where its way is measured.
_PROBED = 20


class Contender(NamedTuple):
    """A way to store results."""

    scheme: str
    fsync: str = ""


CONTENDERS = {
    "ours, batch": Contender("mpworker+redis", "batch"),
    "ours, off": Contender("mpworker+redis", "off"),
    "Celery": Contender("redis"),
}


class Bench:
    """One contender on an empty server, with the processes that it has beside those that store."""

    def __init__(self, contender: Contender, server: Any, folder: Path) -> None:
        self.contender, self.client = contender, server.client()
        self.app = Celery("bench", backend=f"{contender.scheme}://127.0.0.1:{server.port}/0", set_as_current=False)
        self.app.loader.override_backends = {"mpworker": "mpworker.celery.backend:ResultBackend"}
        self.client.flushall()
        self.settings = Settings(journal=folder, journal_fsync=contender.fsync or "off")
        self.bell = Bell() if contender.fsync else None
        self._beside: list[int] = []

    def __enter__(self) -> Bench:
        if self.bell is not None:
            bell, (until, _) = self.bell, os.pipe()
            Journal(self.settings.journal_dir, NODE).prepare()
            self._beside.append(fork(lambda: Shipping(self.app, self.settings, NODE).follow(bell, until)))
            if self.contender.fsync == "batch":
                self._beside.append(fork(Flusher(Journal(self.settings.journal_dir, NODE)).run))
            support.wait_until(bell.has_listener, PATIENCE, "the shipper listens")
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._beside:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if self.bell is not None:
            self.bell.close()
        self.app.close()

    def store(self, prefix: str, count: int, rate: float, told: int) -> None:
        """What a storing process does: so many results, at that rate a second (0: as fast as it goes)."""
        if self.bell is not None:
            backends.enable_journal(self.settings, NODE, self.bell)
        backend = self.app.backend
        request = Context({"id": "x", "task": "bench.task", "hostname": NODE, "retries": 0, "args": (), "kwargs": {}})
        ids = [f"{'probe' if n % _PROBED == 0 else prefix}-{uuid.uuid4()}" for n in range(count)]
        backend.client.ping()
        for warm in range(20):
            backend.store_result(f"warm-{prefix}-{warm}", None, "SUCCESS", request=request)
        os.write(told, b".")
        os.kill(os.getpid(), signal.SIGSTOP)
        begun = time.monotonic()
        for number, task_id in enumerate(ids):
            if rate and (early := begun + number / rate - time.monotonic()) > 0:
                time.sleep(early)
            result = {"rows": number, "at": time.monotonic(), "text": "what a task returns"}
            backend.store_result(task_id, result, "SUCCESS", request=request)
        os.write(told, json.dumps([begun, time.monotonic()]).encode() + b"\n")

    def run(self, count: int, rate: float = 0.0) -> tuple[float, float, list[float]]:
        """Calls a second as each process sees them (their sum), results a second until the last is in Redis, and, where
        the rate is given, seconds from the call of some until a subscriber hears of them."""
        reader, told = os.pipe()
        pids = [fork(lambda n=n: self.store(f"r{n}", count, rate, told)) for n in range(CHILDREN)]  # type: ignore[misc]
        for pid in pids:
            os.read(reader, 1)
            os.waitid(os.P_PID, pid, os.WSTOPPED)
        support.wait_until(lambda: self._stored() == 20 * CHILDREN, PATIENCE, "the first ones are there")
        channel = self.client.pubsub()
        if rate:
            channel.psubscribe("celery-task-meta-probe-*")
            channel.get_message(timeout=PATIENCE)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        wanted, waits = CHILDREN * (20 + count), []
        deadline = time.monotonic() + PATIENCE
        while rate and len(waits) < CHILDREN * -(-count // _PROBED):
            if (message := channel.get_message(timeout=1.0)) and message["type"] == "pmessage":
                waits.append(time.monotonic() - json.loads(message["data"])["result"]["at"])
            assert time.monotonic() < deadline, f"heard of {len(waits)} only"
        while self._stored() < wanted:
            assert time.monotonic() < deadline, f"{self._stored()} of {wanted} are in Redis"
            time.sleep(0.002)
        end = time.monotonic()
        channel.close()
        for pid in pids:
            os.waitpid(pid, 0)
        times = [json.loads(line) for line in os.read(reader, 4096).splitlines()]
        os.close(reader)
        os.close(told)
        calls = sum(count / (last - first) for first, last in times)
        return calls, CHILDREN * count / (end - min(first for first, _ in times)), waits

    def _stored(self) -> int:
        others = self.client.keys("celery-taskset-meta-*") if self.bell is not None else []
        return int(self.client.dbsize()) - len(others)


def fork(do: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(KeyboardInterrupt):
            do()
            code = 0
        os._exit(code)
    return pid


@contextlib.contextmanager
def _bench(name: str, server: Any) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder, Bench(CONTENDERS[name], server, Path(folder)) as bench:
        yield bench


Figures = dict[tuple[str, str], list[float]]


def measure(server: Any, count: int, turn: int, figures: Figures) -> None:
    """One round."""
    names = list(CONTENDERS) if turn % 2 else list(CONTENDERS)[::-1]
    for name in names:
        with _bench(name, server) as bench:
            calls, visible, _ = bench.run(count)
        figures.setdefault((name, "calls/s"), []).append(calls)
        figures.setdefault((name, "visible/s"), []).append(visible)
    half = figures["ours, batch", "visible/s"][-1] / 2 / CHILDREN
    with _bench("ours, batch", server) as bench:
        waits = sorted(1000 * wait for wait in bench.run(int(half * 4), half)[2])
    figures.setdefault(("ours, batch", "p50, ms"), []).append(median(waits))
    figures.setdefault(("ours, batch", "p99, ms"), []).append(quantiles(waits, n=100)[98])


def report(figures: Figures, rounds: int, command: str) -> str:
    """The tables as markdown: medians, and the spread over the rounds."""
    lines = [
        "# Storing results: ours beside Celery's Redis backend",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}: medians of {rounds} alternating rounds, lowest to highest in "
        f"brackets; {len(os.sched_getaffinity(0))} CPUs, {CHILDREN} storing processes, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}, server on a TCP port of this machine. "
        "Absolute figures are this machine's.",
        "",
        "| | calls/s, as the storing processes see them | results/s, until the last is in Redis |",
        "|---|---|---|",
    ]
    for name in CONTENDERS:
        lines.append(f"| {name} | {_shown(figures[name, 'calls/s'])} | {_shown(figures[name, 'visible/s'])} |")

    def ratio(one: str, other: str, what: str) -> float:
        pairs = zip(figures[one, what], figures[other, what], strict=True)
        return median([first / second for first, second in pairs])

    p50, p99 = median(figures["ours, batch", "p50, ms"]), median(figures["ours, batch", "p99, ms"])
    wanted = [
        ("calls/s, ours / Celery's", ratio("ours, batch", "Celery", "calls/s"), 5.0, False),
        ("results/s until in Redis, ours / Celery's", ratio("ours, batch", "Celery", "visible/s"), 3.0, False),
        ("calls/s, fsync batch / off", ratio("ours, batch", "ours, off", "calls/s"), 0.8, False),
        ("from the call until a subscriber hears of it, at half of that load: p50, ms", p50, 10.0, True),
        ("the same: p99, ms", p99, 50.0, True),
    ]
    lines += ["", "| | measured | wanted |", "|---|---|---|"]
    for title, value, limit, at_most in wanted:
        met = value <= limit if at_most else value >= limit
        word = f"{'at most' if at_most else 'at least'} {limit:g}: {'met' if met else '**not met**'}"
        lines.append(f"| {title} | {value:.3g} | {word} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f} … {max(values):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=_HERE)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python tests/benchmarks/results.py", *sys.argv[1:]])
    server = support.RedisServer()
    server.start()
    try:
        measure(server, 500, 0, {})  # not counted: files come into memory, scripts into the server
        figures: Figures = {}
        for turn in range(options.rounds):
            measure(server, options.count, turn, figures)
            print(f"round {turn + 1} of {options.rounds} is done", file=sys.stderr, flush=True)
            text = report(figures, turn + 1, command)
            (options.out / "results-results.md").write_text(text)
    finally:
        server.end()
    print(text)


if __name__ == "__main__":
    main()
