"""A thousand SIGKILLs under load: workers, callback process, template, dispatcher, parent; alone and together.

Not part of a normal run, because it takes many minutes::

    pytest -n 0 -m long -s -o faulthandler_timeout=0 tests/process/test_kill_storm_long.py

``_MPWORKER_STORM_KILLS`` sets how many (1000), ``_MPWORKER_STORM_SEED`` repeats a run; the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import support
from support import PATIENCE, wait_until

KILLS = int(os.environ.get("_MPWORKER_STORM_KILLS", "1000"))
SEED = int(os.environ.get("_MPWORKER_STORM_SEED", "0")) or random.randrange(1, 1 << 32)
SIZE = 3
#: Bytes and descriptors by which a process may differ between its first and its last figure.
GROWTH, MORE_DESCRIPTORS = 12 << 20, 6

PARENT = """
import json, os, random, signal, sys, time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from pathlib import Path
import support
from support import PATIENCE
from mpworker import ProcessPool, WorkerLost

ROLES = ("worker", "callbacks", "template", "dispatcher")

def ours(mine):
    '''The pool's processes by role, found from this process down.'''
    found = {role: [] for role in ROLES}
    for process in support.processes(os.environ[support.MARK]).values():
        words = process.title.split()
        if words[:1] == ["mpworker:"] and words[1] in ROLES and descends(process, mine):
            found[words[1]].append(process)
    return found

def descends(process, mine):
    while process is not None and process.pid > 1:
        if process.parent == mine:
            return True
        process = support.look(process.parent)
    return False

def figures(pid):
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    (rss,) = [int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS:")]
    return rss, len(os.listdir(f"/proc/{pid}/fd"))

def zombies(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for child in children if " Z " in Path(f"/proc/{child}/stat").read_text()]

def at_rest(pool):
    stats = pool.stats()
    tasks = [worker for worker in stats["workers"] if not worker["lane"]]
    if len(tasks) == 3 and not zombies(os.getpid()):
        with suppress(FileNotFoundError):  # it was dead, and the parent had not heard of it yet
            return not zombies(stats["dispatcher"]) and stats["dispatcher"]

def kill(process, told):
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return 0
    try:
        now = support.look(process.pid)
        if now is None or now.title != process.title or now.parent != process.parent:
            return 0
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    finally:
        os.close(fd)
    told[process.title.split()[1]] += 1
    return 1

def tell(**word):
    print(json.dumps(word), flush=True)

def main(seed, kills, method, weights="12,3,2,2"):
    weights = [int(weight) for weight in weights.split(",")]
    choose, killed, lost = random.Random(int(seed)), Counter(), 0
    ends = bytearray(b"\\xff" * 4_000_000)  # how often each job has ended, and one less; all of it touched beforehand
    hooks_log = Path("hooks")
    with ProcessPool(3, start_method=method, max_pending=200, callback_timeout=20) as pool:
        first = pool.schedule(support.give, (0,), callback=support.give)
        first.add_done_callback(lambda future: ends.__setitem__(future.job, 0))
        first.result(PATIENCE)
        unfinished, number, hooked, old = deque(), 0, 0, None
        kinds = [
            lambda: pool.submit(support.give, b"x" * choose.choice((0, 10, 100_000))),
            lambda: pool.submit(time.sleep, choose.random() * 0.02),
            lambda: pool.schedule(time.sleep, (30,), timeout=0.05),
            lambda: pool.schedule(support.fail, error_callback=partial(support.note, hooks_log, "e")),
            lambda: pool.schedule(support.give, (1,), callback=partial(support.note, hooks_log, "c")),
        ]
        samples = {"parent": [], "dispatcher": []}
        def done(future):
            ends[future.job] = (ends[future.job] + 1) % 256
        while sum(killed.values()) < int(kills):
            for _ in range(choose.randrange(5, 40)):
                future = pool.submit(support.give, 1) if choose.random() < 0.6 else choose.choice(kinds)()
                future.add_done_callback(done)
                unfinished.append(future)
            time.sleep(choose.random() * 0.03)  # when, not whether: the moment is to be any
            found = ours(os.getpid())
            roles = choose.choices(ROLES, weights, k=choose.choice((1, 1, 1, 2, 3, 5)))
            victims = {}
            for role in roles:
                if found[role]:
                    victim = choose.choice(found[role])
                    victims[victim.pid] = victim
            before = pool.stats()["dispatcher"]
            for victim in victims.values():
                kill(victim, killed)
            while len(unfinished) > 60:
                future = unfinished.popleft()
                error = None if future.cancelled() else future.exception(PATIENCE)
                lost += isinstance(error, WorkerLost)
                number += 1
            if number and sum(killed.values()) // 50 != old:  # at rest, for a figure that compares
                old = sum(killed.values()) // 50
                while unfinished:
                    future = unfinished.popleft()
                    future.exception(PATIENCE)
                    number += 1
                dispatcher = support.wait_until(lambda: at_rest(pool), what="the pool is at full size, without zombies")
                samples["parent"].append(figures(os.getpid()))
                samples["dispatcher"].append(figures(dispatcher))
                tell(kills=sum(killed.values()), jobs=number, lost=lost, parent=samples["parent"][-1],
                     dispatcher=samples["dispatcher"][-1], pid=dispatcher, killed=dict(killed))
        for future in unfinished:
            future.exception(PATIENCE)
            number += 1
    stats = pool.stats()
    assert stats["pending"] == 0
    assert ends.count(0) == number + 1, "a job has no end, or two"
    assert ends.count(255) + ends.count(0) == len(ends), "a job has two ends"
    counts = {name: value for name, value in stats.items() if isinstance(value, int)}
    tell(end=True, jobs=number, lost=lost, killed=dict(killed), stats=counts)

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("share", "weights"), [(1, "12,3,2,2"), (3, "12,3,2,0")], ids=["of everybody", "the dispatcher stays"]
)
def test_a_thousand_kills_below_one_parent(share: int, weights: str, tmp_path: Path) -> None:
    """And a third of that for one dispatcher, whose own figures are to stay as they are."""
    mark = support.new_mark()
    kills = str(KILLS // share)
    print(f"\nseed {SEED}, {kills} kills")
    script = support.start_script(PARENT, tmp_path, str(SEED), kills, "auto", weights, **{support.MARK: mark})
    said = []
    assert script.stdout is not None
    for line in script.stdout:
        said.append(json.loads(line))
        print(line, end="", flush=True)
    _, err = script.communicate(timeout=PATIENCE)
    assert script.returncode == 0, err[-4000:]
    assert share == 1 or len({word["pid"] for word in said[:-1]}) == 1, "the dispatcher was replaced"
    figures = said[2:-1]  # the first two are of a pool that is still warming up
    for who in ("parent", "dispatcher") if len(figures) > 3 else ():
        sizes, descriptors = zip(*(word[who] for word in figures), strict=True)
        half = len(sizes) // 2
        assert max(sizes[half:]) < max(sizes[:half]) + GROWTH, f"{who} grows: {sizes}"
        assert max(descriptors[half:]) <= max(descriptors[:half]) + MORE_DESCRIPTORS, f"{who}: {descriptors}"
    wait_until(lambda: not support.processes(mark), what=f"nothing is left: {support.table(support.processes(mark))}")


@pytest.mark.long
def test_parents_that_are_killed_leave_nobody(tmp_path: Path) -> None:
    """Now and then together with some of what is below them."""
    choose, begun = random.Random(SEED), Counter[str]()
    print(f"\nseed {SEED}")
    for turn in range(max(1, KILLS // 20)):
        mark, folder = support.new_mark(), tmp_path / str(turn)
        folder.mkdir()
        method = choose.choice(["auto", "fork", "forkserver", "spawn"])
        script = support.start_script(PARENT, folder, str(SEED + turn), "10000", method, **{support.MARK: mark})
        try:
            wait_until(lambda m=mark: len(support.processes(m)) > 3, what="the pool is there")
            time.sleep(choose.random() * 0.5)
            victims = [script.pid]
            found = [process for process in support.processes(mark).values() if process.title.startswith("mpworker: ")]
            if choose.random() < 0.5 and found:
                victims += [process.pid for process in choose.choices(found, k=choose.randrange(1, 4))]
            choose.shuffle(victims)
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL) if pid == script.pid else _kill_marked(pid, mark)
                except ProcessLookupError:
                    pass
            at = time.monotonic()
            script.wait(PATIENCE)
            wait_until(
                lambda m=mark: not support.processes(m),
                what=f"nothing is left: {support.table(support.processes(mark))}",
            )
            begun[f"{method}, gone within {0.5 * int(2 * (time.monotonic() - at)) + 0.5} s"] += 1
        finally:
            for pid in support.processes(mark):
                _kill_marked(pid, mark)
            script.kill()
            script.communicate()
    print(dict(begun))


def _kill_marked(pid: int, mark: str) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if pid in support.processes(mark):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)
