"""What a queue costs: ``python tests/benchmarks/queued.py [jobs] [bytes per job]`` queues jobs behind a stopped one.

Prints the memory of the dispatcher and of the parent, before and with the queue, per job; then lets all of them run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support

from mpworker import ProcessPool


def private(pid: int) -> int:
    """Bytes of memory that are a process' own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty:"))


def hold(here: support.Signpost, go: support.Signpost) -> None:
    """Occupies the worker while the queue grows."""
    here.set()
    go.wait(900.0)


def main(jobs: int, weight: int) -> None:
    folder = Path(tempfile.mkdtemp())
    here, go = support.Signpost(folder / "here"), support.Signpost(folder / "go")
    with ProcessPool(1) as pool:
        pool.submit(hold, here, go)
        here.wait()
        dispatcher = pool.stats()["dispatcher"]
        before = private(dispatcher), private(os.getpid())
        begun = time.monotonic()
        futures = [pool.submit(support.give, bytes(weight) if weight else None) for _ in range(jobs)]
        submitted = time.monotonic() - begun
        held, stable = 0, 0
        while stable < 5:  # until the dispatcher has read it all
            time.sleep(0.2)
            now = private(dispatcher)
            held, stable = now, stable + 1 if now == held else 0
        for name, was, now in (("dispatcher", before[0], held), ("parent", before[1], private(os.getpid()))):
            print(
                f"{name}: {was / 2**20:.0f} → {now / 2**20:.0f} MiB, {(now - was) / jobs:.0f} bytes per job", flush=True
            )
        begun = time.monotonic()
        go.set()
        for future in futures:
            future.result()
        took = time.monotonic() - begun
        print(f"{jobs} jobs of {weight} bytes: submitted in {submitted:.1f} s, done {took:.1f} s after that")
        print(f"dispatcher afterwards: {private(dispatcher) / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main(*map(int, (sys.argv[1:] + ["1000000", "0"][len(sys.argv) - 1 :])))
