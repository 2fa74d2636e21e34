"""How fast the local pool is, beside its peers: ``python tests/benchmarks/pool.py``.

Each figure is taken in a process of its own, and the peers take turns within each round, so that a machine that slows
down slows all of them. The report is ``pool-results.md`` beside this file, and a plot if matplotlib is there.

    --only noop,map   these cells          --peers "mpworker;pebble"  these pools
    --rounds N        default 5            --quick                   fewer tasks, 3 rounds
    --deep            also 1,000,000 tasks --out FOLDER              where the report goes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peers
from plan import CELLS
from report import Figures, plot, report

_HERE = Path(__file__).resolve().parent
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: Seconds that one figure may take, start and end of its process included; and a little for each task of a long queue.
PATIENCE = 120.0
_PATIENCE_PER_TASK = 0.0004
#: The standard library has its bytecode; without its own, a library would be compiled again and again.
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def collect(cells: list[str], names: list[str], rounds: int, quick: bool, deep: bool) -> Iterator[tuple[int, Figures]]:
    """All figures so far after each round; within it cell by cell, the peers taking turns."""
    figures: Figures = {}
    for name in names:
        measure(name, "start", 0, quick)  # not counted: files come into memory, bytecode is written
    for turn in range(rounds):
        for cell_name in cells:
            cell = CELLS[cell_name]
            pools = [name for name in cell.pools if name in names]
            sizes = (cell.quick_sizes if quick else ()) or cell.sizes
            for size in (*sizes, *(cell.deep_sizes if deep else ())):
                first = turn % len(pools) if pools else 0
                for name in pools[first:] + pools[:first]:
                    for part, value in measure(name, cell_name, size, quick).items():
                        figures.setdefault((cell_name, size, part, name), []).append(value)
        print(f"round {turn + 1} of {rounds} is done", file=sys.stderr, flush=True)
        yield turn + 1, figures


def measure(name: str, cell_name: str, size: int, quick: bool) -> dict[str, float]:
    """One pool's figures of a cell, from a process of its own; none if it fails."""
    cell = CELLS[cell_name]
    workers = size if cell.workers < 0 else cell.workers or CPUS
    numbers = map(str, (workers, cell.quick if quick else cell.count, size))
    process = subprocess.Popen(
        [sys.executable, _HERE / cell.script, name, cell_name, *numbers],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=PATIENCE + _PATIENCE_PER_TASK * size)
        figures: dict[str, float] = json.loads(out.splitlines()[0])
    except subprocess.TimeoutExpired:
        print(f"{cell_name} of {name} took too long", file=sys.stderr)
    except (IndexError, ValueError):
        print(f"{cell_name} of {name} failed: {err.decode().strip().rpartition(chr(10))[2]}", file=sys.stderr)
    else:
        return figures
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers that a pool has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CELLS))
    parser.add_argument("--peers", default=";".join(peers.ALL), help="separated by ;")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--out", type=Path, default=_HERE)
    options = parser.parse_args()
    cells, wanted = options.only.split(","), options.peers.split(";")
    if unknown := [word for word in cells if word not in CELLS] + [word for word in wanted if word not in peers.ALL]:
        parser.error(f"unknown: {', '.join(unknown)}; cells are {', '.join(CELLS)}, pools are {'; '.join(peers.ALL)}")
    names = [name for name in wanted if peers.is_installed(name)]
    skipped = [name for name in wanted if name not in names]
    rounds = options.rounds or (3 if options.quick else 5)
    command = " ".join(["python tests/benchmarks/pool.py", *sys.argv[1:]])
    figures: Figures = {}
    text = ""
    for done, figures in collect(cells, names, rounds, options.quick, options.deep):
        text = report(figures, skipped, done, command, CPUS)
        (options.out / "pool-results.md").write_text(text)  # what there is, should somebody lose patience
    print(text)
    if not plot(figures, options.out / "pool-results.png"):
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
