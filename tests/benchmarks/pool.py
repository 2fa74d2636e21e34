"""How fast the local pool is, beside its peers: ``python tests/benchmarks/pool.py``.

Each figure is taken in a process of its own, and the peers take turns within each round, so that a machine that slows
down slows all of them. The report is ``pool-results.md`` beside this file, and a plot if matplotlib is there.

    --only noop,map   these cells          --peers "mpworker;pebble"  these pools
    --rounds N        default 5            --quick                   fewer tasks, 3 rounds
    --deep            also 1,000,000 tasks --out FOLDER              where the report goes
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
from peers import PEERS, Peer

#: Seconds that one figure may take, start and end of its process included.
PATIENCE = 120.0
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_MEGABYTES = 10
_BASELINE = "multiprocessing"


# -- tasks -----------------------------------------------------------------------------------------------------------


def noop(number: int) -> int:
    return number


def echo(data: bytes) -> bytes:
    return data


def spin(_: int) -> None:
    """One millisecond of processor time."""
    end = time.thread_time() + 0.001
    while time.thread_time() < end:
        pass


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# -- cells: each takes a warm pool and how much to do, and returns figures by name ------------------------------------


def _all(peer: Peer, fn: Callable[..., Any], arguments: Any) -> float:
    """Seconds until every future of these calls has its result."""
    began = time.perf_counter()
    futures = [peer.submit(fn, argument) for argument in arguments]
    for future in futures:
        peer.result(future)
    return time.perf_counter() - began


def throughput(peer: Peer, count: int) -> dict[str, float]:
    return {"": count / _all(peer, noop, range(count))}


def mapped(peer: Peer, count: int) -> dict[str, float]:
    began = time.perf_counter()
    assert peer.map(noop, range(count)) == list(range(count))
    return {"": count / (time.perf_counter() - began)}


def busy(peer: Peer, count: int) -> dict[str, float]:
    return {"": 100 * count * 0.001 / WORKERS / _all(peer, spin, range(count))}


def payload(peer: Peer, count: int) -> dict[str, float]:
    data = os.urandom(_MEGABYTES << 20)
    times = [_all(peer, echo, [data]) for _ in range(count)]
    return {"": 1000 * statistics.median(times)}


def latency(peer: Peer, count: int) -> dict[str, float]:
    times = []
    for number in range(count):
        time.sleep(0.001)  # idle again
        times.append(1e6 * _all(peer, noop, [number]))
    times.sort()
    return {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}


def mixed(peer: Peer, count: int) -> dict[str, float]:
    """A nap of 0.5 s in the midst of tiny tasks: when the last tiny one is done, after it was submitted."""
    first = [peer.submit(noop, number) for number in range(count // 2)]
    began = time.perf_counter()
    long = peer.submit(nap, 0.5)
    rest = [peer.submit(noop, number) for number in range(count // 2)]
    for future in first + rest:
        peer.result(future)
    delay = time.perf_counter() - began
    peer.result(long)
    return {"": 1000 * delay}


@dataclass(frozen=True)
class Cell:
    """One thing to measure. ``sizes`` are several runs of the same cell, shown as columns."""

    title: str
    unit: str
    run: Callable[[Peer, int], dict[str, float]]
    count: int
    quick: int
    more_is_better: bool = True
    sizes: tuple[int, ...] = ()
    warm: bool = True
    needs_futures: bool = True


CELLS = {
    "noop": Cell("no-op tasks, every future awaited", "tasks/s", throughput, 20_000, 5_000),
    "map": Cell("no-op tasks through map", "tasks/s", mapped, 50_000, 10_000, needs_futures=False),
    "busy": Cell("tasks of 1 ms on all cores", "% of ideal", busy, 2_000, 500),
    "payload": Cell(f"{_MEGABYTES} MB argument and result", "ms", payload, 10, 3, more_is_better=False),
    "latency": Cell("round trip on an idle pool", "µs", latency, 500, 200, more_is_better=False),
    "start": Cell("import to first result", "ms", mapped, 1, 1, more_is_better=False, warm=False, needs_futures=False),
    "mixed": Cell("tiny tasks around one of 0.5 s: the last is done", "ms", mixed, 2_000, 500, more_is_better=False),
    "queued": Cell("no-op tasks by tasks queued", "tasks/s", throughput, 0, 0, sizes=(1_000, 10_000, 100_000)),
    "workers": Cell("no-op tasks by workers", "tasks/s", throughput, 10_000, 2_000, sizes=(1, 2, 4, 8, 16, 32, 64)),
}


def measure(name: str, cell_name: str, size: int, quick: bool) -> dict[str, float]:
    """One figure, in this process. For ``start`` the clock includes the import of the library."""
    cell = CELLS[cell_name]
    began = time.perf_counter()
    count = size if cell_name == "queued" else cell.quick if quick else cell.count
    peer = PEERS[name](size if cell_name == "workers" else WORKERS)
    if not cell.warm:
        cell.run(peer, count)
        figures = {"": 1000 * (time.perf_counter() - began)}
    else:
        if cell.needs_futures:
            _all(peer, noop, range(500))
        else:
            peer.map(noop, range(500))
        figures = cell.run(peer, count)
    print(json.dumps(figures), flush=True)
    peer.close()
    return figures


# -- the rounds ------------------------------------------------------------------------------------------------------

Figures = dict[tuple[str, int, str, str], list[float]]  # by cell, size, name of the figure, peer


def collect(cells: list[str], names: list[str], rounds: int, quick: bool, deep: bool) -> Iterator[tuple[int, Figures]]:
    """All figures so far after each round; within it cell by cell, the peers taking turns."""
    figures: Figures = {}
    for turn in range(rounds):
        for cell_name in cells:
            for size in sizes_of(cell_name, quick, deep):
                order = names[turn % len(names) :] + names[: turn % len(names)]
                for name in order:
                    peer = PEERS[name]
                    if (CELLS[cell_name].needs_futures and not peer.has_futures) or cell_name not in (
                        peer.only or cells
                    ):
                        continue
                    for part, value in _in_a_process(name, cell_name, size, quick).items():
                        figures.setdefault((cell_name, size, part, name), []).append(value)
        print(f"round {turn + 1} of {rounds} is done", file=sys.stderr, flush=True)
        yield turn + 1, figures


def sizes_of(cell_name: str, quick: bool, deep: bool) -> tuple[int, ...]:
    sizes = CELLS[cell_name].sizes or (0,)
    if quick and len(sizes) > 2:
        return sizes[:2]
    return (*sizes, 1_000_000) if deep and cell_name == "queued" else sizes


def _in_a_process(name: str, cell_name: str, size: int, quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", name, cell_name, str(size), *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True)
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[0])
    except (subprocess.SubprocessError, IndexError, ValueError) as exc:
        last = (getattr(exc, "stderr", b"") or b"").decode().strip().splitlines()[-1:]
        print(f"{cell_name} of {name} failed: {type(exc).__name__} {''.join(last)}", file=sys.stderr)
        return {}
    return figures


# -- the report ------------------------------------------------------------------------------------------------------


def report(figures: Figures, names: list[str], skipped: list[str], rounds: int) -> str:
    """The tables as markdown: median, and the spread from the lowest to the highest round."""
    cpus, python, system = WORKERS, platform.python_version(), f"{platform.system()} {platform.machine()}"
    lines = [
        "# The local pool beside its peers",
        "",
        f"`python tests/benchmarks/pool.py`, {time.strftime('%Y-%m-%d')}: medians of {rounds} alternating rounds, "
        f"lowest to highest in brackets; {cpus} CPUs, Python {python}, {system}.",
        "Ours has a time limit armed on every task. Absolute figures are this machine's; compare within a table.",
    ]
    if skipped:
        lines += ["", f"Skipped, because not installed: {', '.join(skipped)}."]
    for cell_name in dict.fromkeys(key[0] for key in figures):
        cell = CELLS[cell_name]
        columns = list(dict.fromkeys((key[1], key[2]) for key in figures if key[0] == cell_name))
        heads = [f"{size:,}" if size else part or "median" for size, part in columns]
        better = "more" if cell.more_is_better else "less"
        lines += ["", f"## `{cell_name}`: {cell.title} ({cell.unit}, {better} is better)", ""]
        lines += [f"| pool | {' | '.join(heads)} | beside {_BASELINE} |", f"|---|{'---|' * (len(heads) + 1)}"]
        for name in names:
            cells = [figures.get((cell_name, *column, name), []) for column in columns]
            if any(cells):
                base = figures.get((cell_name, *columns[0], _BASELINE), [])
                lines.append(f"| {name} | {' | '.join(map(_shown, cells))} | {_ratio(cells[0], base)} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    if not values:
        return "-"
    low, middle, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (min(values), _median(values), max(values)))
    return f"{middle} ({low} … {high})"


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _ratio(values: list[float], base: list[float]) -> str:
    return f"{_median(values) / _median(base):.2f}x" if values and base else "-"


def plot(figures: Figures, names: list[str], target: Path) -> bool:
    """One panel a cell; ``False`` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = list(dict.fromkeys(key[0] for key in figures))
    figure, axes = pyplot.subplots(len(cells), 1, figsize=(9, 2.6 * len(cells)), squeeze=False)
    for axis, cell_name in zip(axes[:, 0], cells, strict=True):
        columns = list(dict.fromkeys((key[1], key[2]) for key in figures if key[0] == cell_name))
        for name in names:
            points = [(column, figures.get((cell_name, *column, name))) for column in columns]
            known = [(column[0], _median(values)) for column, values in points if values]
            if CELLS[cell_name].sizes and known:
                axis.plot(*zip(*known, strict=True), marker="o", label=name)
            elif known:
                axis.barh(name, known[0][1])
        if CELLS[cell_name].sizes:
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=6)
        else:
            axis.invert_yaxis()
        axis.set_title(f"{CELLS[cell_name].title} ({CELLS[cell_name].unit})", fontsize=9)
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CELLS))
    parser.add_argument("--peers", default=";".join(PEERS), help="separated by ;")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, cell_name, size = options.measure
        measure(name, cell_name, int(size), options.quick)
        return
    cells, wanted = options.only.split(","), options.peers.split(";")
    if unknown := [word for word in cells if word not in CELLS] + [word for word in wanted if word not in PEERS]:
        parser.error(f"unknown: {', '.join(unknown)}; cells are {', '.join(CELLS)}, pools are {', '.join(PEERS)}")
    names = [name for name in wanted if peers.is_installed(name)]
    skipped = [name for name in wanted if name not in names]
    rounds = options.rounds or (3 if options.quick else 5)
    figures: Figures = {}
    text = ""
    for done, figures in collect(cells, names, rounds, options.quick, options.deep):
        text = report(figures, names, skipped, done)
        (options.out / "pool-results.md").write_text(text)  # what there is, should somebody lose patience
    print(text)
    if not plot(figures, names, options.out / "pool-results.png"):
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
