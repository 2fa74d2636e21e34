"""``map`` without a chunk size: items travel together, and each is as well off as if it were a task of its own."""

from __future__ import annotations

import asyncio
import gc
import itertools
import operator
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import pytest
import support
from support import PATIENCE, SLACK, Signpost, wait_until

from mpworker import (
    MemoryLimitExceeded,
    ProcessPool,
    RemoteTraceback,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLost,
)
from mpworker.errors import PayloadError, PoolFull

#: Importing this module does not eat up a limit.
READY: Any = {"initializer": import_module, "initargs": (__name__,)}
METHODS = ["fork", "forkserver", "spawn", "auto"]
LIMIT = 0.5
MB = 1 << 20


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        pool.submit(support.give).result(PATIENCE)
        yield pool


class Odd:
    """Travels by itself."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]


def note(log: Path, number: int) -> int:
    """One line, then its number."""
    support.append(log, number)
    return number


def ran(log: Path) -> list[int]:
    return sorted(map(int, support.lines(log)))


def act(log: Path, deeds: dict[int, Callable[[], Any]], number: int) -> int:
    """One line; then what is to be done at this number, or nothing."""
    support.append(log, number)
    if number in deeds:
        deeds[number]()
    return number


def taken_from(results: Iterator[int]) -> tuple[list[int], Exception | None]:
    """What comes, and what ends it."""
    got: list[int] = []
    try:
        got.extend(results)
    except Exception as exc:
        return got, exc
    return got, None


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 15, 16, 17, 100, 1001, 20_000])
def test_all_results_come_in_order(size: int, pool: ProcessPool) -> None:
    assert list(pool.map(support.give, range(size))) == list(range(size))
    assert list(pool.map(support.give, iter(range(size)))) == list(range(size))
    assert list(pool.map(operator.add, range(size), itertools.count(1))) == list(range(1, 2 * size, 2))


@pytest.mark.parametrize(
    "make",
    [str, float, lambda n: None, lambda n: b"%d" % n, lambda n: (n, "x"), lambda n: (n, [n]), lambda n: [n], Odd],
    ids=["str", "float", "None", "bytes", "tuple", "deep tuple", "list", "object"],
)
def test_values_of_any_kind_travel_both_ways(make: Callable[[int], Any], pool: ProcessPool) -> None:
    values = [make(number) for number in range(200)]
    assert list(pool.map(support.give, values)) == values
    assert list(pool.map(support.give, tuple(values))) == values
    assert list(pool.map(support.add, *[map(len, [[n] * n, "ab" * n]) for n in range(50)])) == [1225, 2450]


def test_values_of_many_kinds_travel_together(pool: ProcessPool) -> None:
    values = [1, "x", None, [1], (1, 2), ((1,), 2), Odd(3), 2.5, b"", {}, True] * 20
    assert list(pool.map(support.give, values)) == values
    assert [type(value) for value in pool.map(support.give, values)] == list(map(type, values))


@pytest.mark.parametrize("method", METHODS)
def test_many_items_are_few_tasks(method: str) -> None:
    with ProcessPool(2, start_method=method) as pool:
        pool.submit(support.give).result(PATIENCE)
        assert sum(pool.map(abs, range(-999, 1))) == 499_500
        stats = pool.stats()
        assert stats["submitted"] < 50
        wait_until(lambda: pool.stats()["done"] == pool.stats()["submitted"], what="all are counted")


def test_equal_items_are_not_the_same_object(pool: ProcessPool) -> None:
    same: list[int] = []
    assert list(pool.map(grow, [same] * 40)) == [1] * 40


def grow(items: list[int]) -> int:
    items.append(0)
    return len(items)


def test_a_result_is_what_it_was_when_its_item_ended(pool: ProcessPool) -> None:
    lengths = [len(result) for result in pool.map(collect, range(80))]
    assert all(after > before for before, after in itertools.pairwise(lengths[:10]))


collected: list[int] = []


def collect(number: int) -> list[int]:
    collected.append(number)
    return collected


@pytest.mark.parametrize("limits", [{"max_tasks_per_worker": 3}, {}])
def test_what_counts_items_or_bounds_memory_gets_single_ones(limits: dict[str, int]) -> None:
    with ProcessPool(1, **limits) as pool:  # type: ignore[arg-type]
        results = pool.map(support.getpid, range(20), **({} if limits else {"buffersize": 3}))  # type: ignore[arg-type]
        pids = Counter(results)
        assert pool.stats()["submitted"] == 20
    assert max(pids.values()) <= limits.get("max_tasks_per_worker", 20)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 12, 24, 25, 99])
@pytest.mark.parametrize("kind", [IndexError, SystemExit, KeyboardInterrupt])
def test_an_item_that_fails_takes_nobody_along(
    at: int, kind: type[BaseException], pool: ProcessPool, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    results = pool.map(partial(act, log, {at: partial(support.fail, kind=kind)}), range(100))
    wait_until(lambda: len(ran(log)) == 100, what="all have run, also those behind it")
    assert [next(results) for _ in range(at)] == list(range(at))
    with pytest.raises(kind, match="as asked") as caught:
        next(results)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    text = str(caught.value.__cause__)
    assert "as asked" in text
    assert "pool/chunks.py" not in text
    assert list(results) == []
    assert ran(log) == list(range(100))


def test_an_item_that_raises_stop_iteration_does_not_end_the_map_in_silence(pool: ProcessPool) -> None:
    results = pool.map(next, [iter([1]), iter([2]), iter([]), *[iter([3]) for _ in range(30)]])
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(results)


def test_only_the_first_of_several_errors_is_told(pool: ProcessPool) -> None:
    results = pool.map(operator.floordiv, [6] * 64, [3, 2, 0, 1, 0, *[1] * 59])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("when", ["dump", "load"])
def test_a_result_that_cannot_travel_costs_only_itself(when: str, pool: ProcessPool) -> None:
    results = pool.map(returned, [5] * 50, [when] * 50, range(50))
    assert [next(results) for _ in range(5)] == list(range(5))
    with pytest.raises(PayloadError, match="it will not travel"):
        next(results)
    assert list(results) == []


def returned(bad: int, when: str, number: int) -> Any:
    return support.Unwilling(when) if number == bad else number


def test_an_item_that_cannot_be_unpacked_costs_only_itself(pool: ProcessPool, tmp_path: Path) -> None:
    items: list[Any] = [[number] for number in range(60)]
    items[7] = support.Unwilling("load")
    results = pool.map(support.give, items)
    assert [next(results) for _ in range(7)] == items[:7]
    with pytest.raises(PayloadError, match="it will not travel"):
        next(results)


def test_an_item_that_cannot_be_packed_cancels_what_was_sent(pool: ProcessPool) -> None:
    with pytest.raises(PayloadError, match="sleep cannot be pickled"):
        pool.map(support.sleep, [20.0] * 99 + [threading.Lock()])
    wait_until(lambda: not pool.stats()["pending"], 10.0, "nothing of it is left")


def test_a_function_that_cannot_be_unpacked_fails_the_map(pool: ProcessPool) -> None:
    results = pool.map(partial(support.give, support.Unwilling("load")), range(50))
    with pytest.raises(PayloadError, match="cannot be unpickled in the worker"):
        next(results)


# -- a long item -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [0, 10, 24])
def test_nobody_waits_behind_a_long_item_while_a_worker_is_idle(method: str, at: int, tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(2, start_method=method) as pool:
        pool.submit(support.give).result(PATIENCE)
        results = pool.map(partial(act, log, {at: partial(support.meet, here, go)}), range(200))
        here.wait()
        wait_until(lambda: len(ran(log)) == 200, what="all others have run meanwhile")
        assert [next(results) for _ in range(at)] == list(range(at))  # what exists is there to be had
        go.set()
        assert list(results) == list(range(at, 200))
    assert ran(log) == list(range(200))


def test_nobody_waits_for_long_items_each_of_which_has_a_worker(tmp_path: Path) -> None:
    """Three of four workers are stuck; the fourth does all the rest."""
    pairs = {number: (Signpost(tmp_path / f"here{number}"), Signpost(tmp_path / "go")) for number in (3, 4, 150)}
    log = tmp_path / "log"
    with ProcessPool(4) as pool:
        results = pool.map(
            partial(act, log, {n: partial(support.meet, *pair) for n, pair in pairs.items()}), range(320)
        )
        wait_until(lambda: len(ran(log)) == 320, what="all have begun")
        Signpost(tmp_path / "go").set()
        assert list(results) == list(range(320))
    assert ran(log) == list(range(320))


def test_c_functions_are_cut_as_well(pool: ProcessPool, tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    calls: list[Any] = [partial(support.append, log, number) for number in range(100)]
    calls[3] = partial(support.meet, here, go)
    results = pool.map(operator.call, calls)
    here.wait()
    wait_until(lambda: len(ran(log)) == 99, what="all others have run meanwhile")
    go.set()
    assert len(list(results)) == 100


def test_a_row_of_short_items_is_divided_too(tmp_path: Path) -> None:
    """One worker is busy, the other one has a chunk that takes long but no item that does."""
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(2) as pool:
        busy = pool.submit(support.meet, here, go)
        here.wait()
        results = pool.map(partial(nap, log), range(80))
        wait_until(lambda: pool.stats()["submitted"] > 1 + 8, what="something was cut off")
        go.set()
        assert list(results) == list(range(80))
        assert busy.result(PATIENCE) > 0
    assert ran(log) == list(range(80))


def nap(log: Path, number: int) -> int:
    time.sleep(0.005)
    return note(log, number)


# -- limits ----------------------------------------------------------------------------------------------------------


def clean_up_late(*_: object) -> NoReturn:
    try:
        support.sleep()
    except SoftTimeLimitExceeded:
        support.sleep()
    raise AssertionError


@pytest.mark.parametrize("stubborn", [support.sleep, clean_up_late], ids=["sleeps", "swallows the soft limit"])
def test_the_hard_limit_is_that_of_an_item(stubborn: Callable[[], Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, timeout=LIMIT, soft_timeout=LIMIT / 2 if stubborn is clean_up_late else None, **READY) as pool:
        pool.submit(support.give).result(PATIENCE)
        began = time.monotonic()
        results = pool.map(partial(act, log, {300: stubborn}), range(1000))
        wait_until(lambda: len(ran(log)) == 1000, what="all have begun, also those behind it")
        assert [next(results) for _ in range(300)] == list(range(300))
        with pytest.raises(TimeLimitExceeded) as caught:
            next(results)
        assert LIMIT <= time.monotonic() - began < LIMIT + 1 + SLACK
        assert caught.value.limit == LIMIT
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
    assert ran(log) == list(range(1000))


def test_the_soft_limit_is_that_of_an_item(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, soft_timeout=LIMIT, **READY) as pool:
        pool.submit(support.give).result(PATIENCE)
        results = pool.map(partial(act, log, {300: support.sleep}), range(1000))
        wait_until(lambda: len(ran(log)) == 1000, what="all have begun, also those behind it")
        assert [next(results) for _ in range(300)] == list(range(300))
        with pytest.raises(SoftTimeLimitExceeded) as caught:
            next(results)
        assert caught.value.limit == LIMIT
        assert pool.stats()["lost"] == pool.stats()["timed_out"] == 0
    assert ran(log) == list(range(1000))


def test_limits_are_not_shared_by_the_items_of_a_chunk(tmp_path: Path) -> None:
    with ProcessPool(1, timeout=LIMIT, soft_timeout=LIMIT, **READY) as pool:
        assert list(pool.map(time.sleep, [LIMIT / 20] * 100)) == [None] * 100


@pytest.mark.parametrize("stage", ["unpickle", "pickle"])
def test_the_limit_of_an_item_holds_where_its_values_travel(stage: str, tmp_path: Path) -> None:
    items: list[Any] = [["dump" if stage == "pickle" else "never", "error"] for _ in range(100)]
    with ProcessPool(2, timeout=LIMIT, **READY) as pool:
        if stage == "pickle":
            results = pool.map(slow_to_pack, range(100))
        else:
            items = [[number] for number in range(100)]
            items[30] = support.Unwilling("load", "slow")
            results = pool.map(support.give, items)
        assert len([next(results) for _ in range(30)]) == 30
        with pytest.raises(TimeLimitExceeded):
            next(results)


def slow_to_pack(number: int) -> Any:
    return support.Unwilling("dump", "slow") if number == 30 else [number]


def fill(number: int) -> int:
    if number == 30:
        block = b"x" * (120 * MB)
        support.sleep()
        del block
    return number


def test_too_much_memory_is_the_items_own_error() -> None:
    with ProcessPool(2, max_memory_per_worker=100 * MB) as pool:
        results = pool.map(fill, range(100))
        assert [next(results) for _ in range(30)] == list(range(30))
        with pytest.raises(MemoryLimitExceeded):
            next(results)


# -- deaths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_that_dies_in_a_chunk_costs_what_it_had_begun_and_nothing_twice(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, start_method=method) as pool:
        pool.submit(support.give).result(PATIENCE)
        results = pool.map(partial(act, log, {130: partial(support.die, "kill")}), range(400))
        got, error = taken_from(results)
        assert isinstance(error, WorkerLost)
        assert got == list(range(len(got)))
        assert 100 <= len(got) <= 130
        assert list(pool.map(support.give, range(100))) == list(range(100))
        assert pool.stats()["lost"] == 1
    assert set(Counter(ran(log)).values()) == {1}


def test_what_was_cut_off_before_a_worker_died_runs_elsewhere(pool: ProcessPool, tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    results = pool.map(partial(act, log, {10: partial(support.meet, here, go)}), range(400))
    pid = int(here.wait())
    wait_until(lambda: len(ran(log)) == 400, what="all others have run meanwhile")
    os.kill(pid, signal.SIGKILL)
    assert [next(results) for _ in range(10)] == list(range(10))
    with pytest.raises(WorkerLost):
        next(results)
    assert ran(log) == list(range(400))


@pytest.mark.parametrize("seed", range(2))
def test_nothing_runs_twice_whoever_is_killed(seed: int, tmp_path: Path) -> None:
    choose, log = random.Random(seed), tmp_path / "log"
    with ProcessPool(2) as pool:
        pool.submit(support.give).result(PATIENCE)
        for first in range(0, 800, 400):
            if choose.random() < 0.5:
                function: Any = partial(note, log)
            else:
                function = partial(nap, log)
            results = pool.map(function, range(first, first + 400))
            goal = len(ran(log)) + choose.randrange(300)
            wait_until(lambda goal=goal, end=first + 400: len(ran(log)) >= min(goal, end - 100), what="some have run")  # type: ignore[misc]
            if choose.random() < 0.7:
                support.kill_ours(pool.stats()["dispatcher"])
            else:
                for worker in pool.stats()["workers"][:1]:
                    support.kill_ours(worker["pid"])
            got, error = taken_from(results)
            assert isinstance(error, WorkerLost) or len(got) == 400
            assert got == list(range(first, first + len(got)))
            assert set(got) <= set(ran(log))
            wait_until(lambda: not pool.stats()["pending"], what="all has come to its end")
        assert list(pool.map(support.give, range(100))) == list(range(100))
    assert set(Counter(ran(log)).values()) == {1}


def fork(log: Path, number: int) -> int:
    support.append(log, number)
    if number % 10 == 3 and os.fork() == 0:
        return -1  # comes back out of the item, in a process that is not the worker
    return number


def test_a_fork_that_comes_back_runs_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2) as pool:
        assert list(pool.map(partial(fork, log), range(100))) == list(range(100))
    assert ran(log) == list(range(100))


# -- ends ------------------------------------------------------------------------------------------------------------


def doze(log: Path, number: int) -> int:
    time.sleep(0.001)
    return note(log, number)


def test_leaving_the_pool_finishes_what_was_cut_off(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(1) as pool:
        results = pool.map(partial(doze, log), range(400))
    assert ran(log) == list(range(400))
    assert list(results) == list(range(400))
    assert pool.stats()["submitted"] > 4


def test_the_pool_stays_open_until_it_is_known_that_nothing_was_cut_off(tmp_path: Path) -> None:
    """The thread that reads results is busy, and does not hear of the chunks before all of them have ended."""
    log = tmp_path / "log"

    def be_busy(_: object) -> None:
        end = time.monotonic() + 1.5
        while time.monotonic() < end and support.alive(dispatcher):
            time.sleep(0.01)

    with ProcessPool(1, **READY) as pool:
        pool.submit(support.give).result(PATIENCE)
        dispatcher = pool.stats()["dispatcher"]
        pool.submit(support.give).add_done_callback(be_busy)
        results = pool.map(partial(doze, log), range(400))
    assert list(results) == ran(log) == list(range(400))


def test_a_shutdown_that_does_not_wait_finishes_it_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = ProcessPool(2)
    results = pool.map(partial(doze, log), range(800))
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.map(support.give, range(100))
    assert list(results) == list(range(800))
    pool.shutdown()


def test_so_does_a_pool_that_nobody_has_any_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pool = ProcessPool(2)
    results = pool.map(partial(doze, log), range(800))
    dispatcher = pool.stats()["dispatcher"]
    del pool
    gc.collect()
    assert list(results) == list(range(800))
    wait_until(lambda: not support.alive(dispatcher), what="it is gone")


@pytest.mark.parametrize("way", ["end", "sys.exit(0)"])
def test_so_does_the_end_of_a_script(way: str, tmp_path: Path) -> None:
    text = (
        "import sys\nfrom functools import partial\nfrom pathlib import Path\nimport test_map_chunks as here\n"
        "from mpworker import ProcessPool\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPool(2)\n"
        "    pool.map(partial(here.doze, Path('log')), range(800))\n" + (f"    {way}\n" if way != "end" else "")
    )
    folder = str(Path(__file__).parent)
    ended = support.run_script(text.replace("import sys\n", f"import sys\nsys.path.append({folder!r})\n"), tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ran(tmp_path / "log") == list(range(800))


@pytest.mark.parametrize("cut_before", [True, False])
def test_cancelled_futures_are_not_sent_again(cut_before: bool, tmp_path: Path) -> None:
    here, go, log = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), tmp_path / "log"
    with ProcessPool(1) as pool:
        results = pool.map(partial(act, log, {0: partial(support.meet, here, go)}), range(100))
        here.wait()
        if cut_before:
            wait_until(lambda: pool.stats()["submitted"] > 4, what="the rest of its chunk has been sent again")
        thread = threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": True})
        thread.start()
        wait_until(lambda: pool.stats()["pending"] == 1, what="the others are cancelled")
        go.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    got, error = taken_from(results)
    assert isinstance(error, CancelledError)
    assert got == ran(log)
    assert got == [0] if cut_before else len(got) <= 25


def test_closing_the_iterator_cancels_what_is_left(pool: ProcessPool, tmp_path: Path) -> None:
    pair = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        results: Any = pool.map(partial(act, tmp_path / "log", {5: partial(support.meet, *pair)}), range(100))
        pid = int(pair[0].wait())
        assert next(results) == 0
        results.close()
        wait_until(lambda: not pool.stats()["pending"], what="nothing of it is left")
        wait_until(lambda: not support.alive(pid), what="the one that ran was ended")
        assert list(results) == []
        assert pool.submit(support.give, 1).result(PATIENCE) == 1


@pytest.mark.parametrize("values", [range(100), [[number] for number in range(100)]], ids=["plain", "parcels"])
def test_nothing_comes_out_of_a_closed_iterator(values: Any, pool: ProcessPool) -> None:
    results: Any = pool.map(support.give, values)
    assert next(results) == values[0]
    results.close()
    assert list(results) == []
    results = pool.map(support.give, values)
    assert next(results) == values[0]
    del results
    gc.collect()
    wait_until(lambda: not pool.stats()["pending"], what="nothing of it is left")


def test_a_map_that_has_no_time_gives_what_there_is(tmp_path: Path) -> None:
    pair = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, **READY) as pool:
        pool.submit(support.give).result(PATIENCE)
        results = pool.map(partial(act, tmp_path / "log", {5: partial(support.meet, *pair)}), range(100), timeout=2.0)
        assert [next(results) for _ in range(5)] == list(range(5))
        with pytest.raises(TimeoutError):
            next(results)
        pair[1].set()
    assert len(ran(tmp_path / "log")) < 100


def test_what_is_cut_off_when_nobody_wants_it_any_more_does_not_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(1, **READY) as pool:
        pool.submit(support.give).result(PATIENCE)
        results = pool.map(partial(act, log, {0: partial(support.sleep, 0.3)}), range(100), timeout=0)
        with pytest.raises(TimeoutError):
            next(results)
    assert ran(log) == [0]


def test_a_map_takes_room_only_for_what_it_submits(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessPool(2, max_pending=3) as pool:
        for _ in range(3):
            assert list(pool.map(partial(nap, log), range(160))) == list(range(160))
        assert pool.stats()["submitted"] > 3 * 8
        here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
        wait_until(lambda: not pool.stats()["pending"], what="there is room")
        pool._blocks = False  # so that the fourth one is refused
        held = [pool.submit(support.meet, here, go) for _ in range(3)]
        with pytest.raises(PoolFull):
            pool.submit(support.give)
        go.set()
        assert all(future.result(PATIENCE) for future in held)


# -- coroutines ------------------------------------------------------------------------------------------------------


async def double(number: int) -> int:
    await asyncio.sleep(0)
    if number < 0:
        raise LookupError(number)
    return 2 * number


def sometimes(number: int) -> Any:
    return double(number) if number % 3 == 1 else 2 * number


async def hang_at(bad: int, number: int) -> int:
    if number == bad:
        await asyncio.sleep(20)
    return number


@pytest.mark.parametrize("function", [double, sometimes])
def test_coroutines_are_run_one_by_one(function: Callable[[int], Any], pool: ProcessPool) -> None:
    assert list(pool.map(function, range(200))) == list(range(0, 400, 2))
    results = pool.map(double, [*range(30), -1, *range(30)])
    assert [next(results) for _ in range(30)] == list(range(0, 60, 2))
    with pytest.raises(LookupError):
        next(results)


def test_the_soft_limit_gets_into_a_coroutine() -> None:
    with ProcessPool(2, soft_timeout=LIMIT, **READY) as pool:
        results = pool.map(partial(hang_at, 30), range(200))
        assert [next(results) for _ in range(30)] == list(range(30))
        with pytest.raises(SoftTimeLimitExceeded):
            next(results)


# -- large values ----------------------------------------------------------------------------------------------------


def inflate(here: Signpost, go: Signpost, size: int, at: int, number: int) -> list[Any]:
    if number == at:
        support.meet(here, go)
    return [number, b"x" * size]


@pytest.mark.parametrize("size", [200, 20_000, 200_000, 3_000_000])
def test_large_values_travel_in_chunks_and_out_of_what_is_cut(size: int, pool: ProcessPool, tmp_path: Path) -> None:
    values = [[number, bytearray(size)] for number in range(40)]
    assert list(pool.map(support.give, values)) == values
    texts = [b"%d" % number * size for number in range(40)]
    assert list(pool.map(support.give, texts)) == texts
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    results = pool.map(partial(inflate, here, go, size, 3), range(40))
    here.wait()
    assert [next(results)[0] for _ in range(3)] == [0, 1, 2]
    go.set()
    assert [number for number, _ in results] == list(range(3, 40))


def weigh(here: Signpost, go: Signpost, value: tuple[int, bytes]) -> int:
    if value[0] == 3:
        support.meet(here, go)
    return value[0]


@pytest.mark.parametrize("wrap", [tuple, list])
def test_large_items_can_be_cut_off(wrap: Callable[[Any], Any], pool: ProcessPool, tmp_path: Path) -> None:
    """Chunks of several of them, which are larger than what travels as a descriptor elsewhere."""
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    before = pool.stats()["done"]
    results = pool.map(partial(weigh, here, go), [wrap((n, b"%d" % n * 10_000)) for n in range(200)])
    here.wait()
    wait_until(lambda: pool.stats()["done"] - before > 10 and pool.stats()["pending"] == 1, what="all others are done")
    go.set()
    assert list(results) == list(range(200))
