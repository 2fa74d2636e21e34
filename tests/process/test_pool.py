"""What comes back from a pool: values and every kind of exception, in order; and one clear line per bad argument."""

from __future__ import annotations

import multiprocessing
import operator
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed, wait
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, RemoteTraceback, TimeLimitExceeded, WorkerLost
from mpworker.errors import ConfigurationError, PayloadError, RemoteError


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def test_submit_brings_the_value_from_another_process(pool: ProcessPool) -> None:
    assert isinstance(pool, Executor)
    assert pool.submit(support.add, 1, 2, more=3).result(PATIENCE) == 6
    assert pool.submit(os.getpid).result(PATIENCE) in {worker["pid"] for worker in pool.stats()["workers"]}


def test_schedule_takes_arguments_and_keywords(pool: ProcessPool) -> None:
    future = pool.schedule(support.add, (1, 2), {"more": 3}, timeout=PATIENCE, soft_timeout=PATIENCE)
    assert future.result(PATIENCE) == 6
    assert pool.schedule(support.add).result(PATIENCE) == 0


@pytest.mark.parametrize("chunksize", [1, 7, 1000])
def test_map_keeps_the_order(pool: ProcessPool, chunksize: int) -> None:
    assert list(pool.map(operator.add, range(100), range(0, 200, 2), chunksize=chunksize)) == list(range(0, 300, 3))


def test_map_raises_where_the_task_did(pool: ProcessPool) -> None:
    results = pool.map(operator.floordiv, [4, 4, 4], [2, 0, 1])
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_gives_up_in_time_and_cancels_the_rest(pool: ProcessPool) -> None:
    before = pool.stats()["cancelled"]
    results = pool.map(support.sleep, [0.0, 20.0, 20.0, 20.0], timeout=1.0)
    assert next(results) == 0.0
    with pytest.raises(TimeoutError):
        next(results)
    # The one that was waited for goes on, as with concurrent.futures; those behind it do not.
    wait_until(lambda: pool.stats()["cancelled"] - before >= 2, what="the rest is cancelled")
    for job in list(pool._core.futures.values()):  # type: ignore[union-attr]
        job.cancel()


def test_map_cancels_what_it_has_sent_when_an_item_cannot_travel(pool: ProcessPool) -> None:
    with pytest.raises(PayloadError):
        pool.map(support.sleep, [20.0, 20.0, 20.0, lambda: None])
    wait_until(lambda: not pool.stats()["pending"], 10.0, "nothing of it is left")


def test_map_reads_no_further_than_its_buffer(pool: ProcessPool) -> None:
    numbers = iter(range(12))
    results = pool.map(support.give, numbers, buffersize=2)
    assert next(numbers) == 2
    assert [next(results), next(results)] == [0, 1]
    assert next(numbers) == 5
    assert list(results) == [3, 4, *range(6, 12)]
    everything = pool.map(operator.add, range(10), range(10), chunksize=3, buffersize=2)
    assert list(everything) == list(range(0, 20, 2))


def test_the_helpers_of_concurrent_futures_work(pool: ProcessPool) -> None:
    futures = [pool.submit(support.give, number) for number in range(20)]
    assert sorted(future.result() for future in as_completed(futures, PATIENCE)) == list(range(20))
    done, pending = wait([pool.submit(support.fail), pool.submit(support.give)], PATIENCE)
    assert (len(done), len(pending)) == (2, 0)


def test_many_tiny_tasks_all_come_back(pool: ProcessPool) -> None:
    futures = [pool.submit(support.give, number) for number in range(5000)]
    assert [future.result(PATIENCE) for future in futures] == list(range(5000))
    assert pool.stats()["pending"] == 0


def test_a_large_value_travels_both_ways(pool: ProcessPool) -> None:
    large = os.urandom(1 << 20) * 40
    assert pool.submit(support.give, large).result(PATIENCE) == large


def test_large_values_both_ways_at_once_wedge_nothing(pool: ProcessPool) -> None:
    large = bytes(4 << 20)
    futures = [pool.submit(support.give, large) for _ in range(16)]
    assert all(future.result(PATIENCE) == large for future in futures)


def test_an_exception_arrives_with_its_type_and_traceback(pool: ProcessPool) -> None:
    error = pool.submit(support.fail, "the text").exception(PATIENCE)
    assert type(error) is ValueError
    assert str(error) == "the text"
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "support.py" in str(error.__cause__)
    assert "raise kind(text)" in str(error.__cause__)
    assert "pool/worker.py" not in str(error.__cause__)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, RecursionError])
def test_a_worker_outlives_any_exception(pool: ProcessPool, kind: type[BaseException]) -> None:
    before = {worker["pid"] for worker in pool.stats()["workers"]}
    assert type(pool.submit(support.fail, "x", kind).exception(PATIENCE)) is kind
    assert pool.submit(os.getpid).result(PATIENCE) in before or not before


def test_an_exception_that_does_not_unpickle_arrives_as_its_text(pool: ProcessPool) -> None:
    error = pool.submit(support.raise_two).exception(PATIENCE)
    assert isinstance(error, RemoteError)
    assert error.type_name == "support.TwoArguments"
    assert error.text == "1/2"
    assert "raise TwoArguments(1, 2)" in str(error.__cause__)


def test_an_exception_that_refuses_attributes_arrives(pool: ProcessPool) -> None:
    error = pool.submit(support.raise_it, support.Refusing("no")).exception(PATIENCE)
    assert type(error) is support.Refusing
    assert isinstance(error.__cause__, RemoteTraceback)


def test_a_frozen_exception_arrives_as_its_text(pool: ProcessPool) -> None:
    error = pool.submit(support.raise_frozen).exception(PATIENCE)
    assert isinstance(error, RemoteError)
    assert error.type_name == "support.Frozen"


# Fault x stage, as in CPython's test_deadlock: whatever breaks, one task fails and the pool goes on.
@pytest.mark.parametrize("how", ["error", "exit", "crash"])
@pytest.mark.parametrize("stage", ["unpickle the call", "pickle the result", "pickle the exception"])
def test_what_breaks_in_the_worker_stays_with_its_task(pool: ProcessPool, stage: str, how: str) -> None:
    if stage == "unpickle the call":
        future = pool.submit(support.give, support.Unwilling("load", how))
    elif stage == "pickle the result":
        future = pool.submit(support.return_unwilling, "dump", how)
    else:
        future = pool.submit(support.raise_unwilling, "dump", how)
    around = [pool.submit(support.give, number) for number in range(10)]
    error = future.exception(PATIENCE)
    assert isinstance(error, BaseException)
    if how == "crash":
        assert isinstance(error, WorkerLost)
    elif stage == "pickle the exception":
        assert isinstance(error, RemoteError)
        assert error.type_name == "RuntimeError"
    elif how == "error":
        assert isinstance(error, PayloadError)
        assert "it will not travel" in str(error)
    assert [task.result(PATIENCE) for task in around] == list(range(10))


@pytest.mark.parametrize("how", ["error", "exit"])
@pytest.mark.parametrize("what", ["result", "exception"])
def test_what_breaks_in_the_parent_stays_with_its_task(what: str, how: str) -> None:
    with ProcessPool(1) as pool:
        job = support.return_unwilling if what == "result" else support.raise_unwilling
        error = pool.submit(job, "load", how).exception(PATIENCE)
        assert isinstance(error, PayloadError if what == "result" else RemoteError)
        assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_an_unpicklable_result_is_named(pool: ProcessPool) -> None:
    error = pool.submit(threading.Lock).exception(PATIENCE)
    assert isinstance(error, PayloadError)
    assert "the result, a lock, cannot be pickled" in str(error).replace("_thread.", "")


@pytest.mark.parametrize(
    ("function", "argument"), [(lambda: 1, ()), (support.give, (threading.Lock(),)), (support.give, (lambda: 1,))]
)
def test_an_unpicklable_call_is_refused_at_once(pool: ProcessPool, function: object, argument: tuple[object]) -> None:
    before = pool.stats()["submitted"]
    with pytest.raises(PayloadError, match=r"^the call of .* cannot be pickled"):
        pool.schedule(function, argument)  # type: ignore[arg-type]
    with pytest.raises(PayloadError, match="a callback cannot be pickled"):
        pool.schedule(support.give, callback=lambda value: None)
    assert pool.stats()["submitted"] == before
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_task_may_use_multiprocessing_itself(pool: ProcessPool) -> None:
    assert pool.submit(_square_elsewhere, 7).result(PATIENCE) == 49


def _square_elsewhere(number: int) -> int:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_send_square, args=(there, number))
    process.start()
    process.join(PATIENCE)
    return int(here.recv())


def _send_square(there: object, number: int) -> None:
    there.send(number * number)  # type: ignore[attr-defined]


def test_a_child_that_a_task_forked_does_not_come_back_as_a_worker(pool: ProcessPool) -> None:
    future = pool.submit(_fork_and_return)
    assert future.result(PATIENCE) > 0
    assert [pool.submit(support.give, number).result(PATIENCE) for number in range(20)] == list(range(20))


def _fork_and_return() -> int:
    return os.fork() or -1


def test_a_task_that_closes_every_descriptor_harms_only_itself(pool: ProcessPool) -> None:
    error = pool.submit(os.closerange, 0, 1024).exception(PATIENCE)
    assert isinstance(error, WorkerLost)
    assert error.signal is None  # a SIGKILL would be taken for the kernel's, which was out of memory
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_max_pending_makes_submit_wait(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, max_pending=2) as pool:
        first, second = pool.submit(support.meet, here, go), pool.submit(support.give, 2)
        here.wait()
        third: list[object] = []
        thread = threading.Thread(target=lambda: third.append(pool.submit(support.give, 3).result(PATIENCE)))
        thread.start()
        thread.join(0.3)
        assert pool.stats()["submitted"] == 2
        go.set()
        thread.join(PATIENCE)
        assert third == [3]
        assert first.result(0) > 0
        assert second.result(PATIENCE) == 2


def test_max_pending_counts_a_task_until_its_callback_has_run(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, max_pending=1) as pool:
        first = pool.schedule(support.give, (1,), callback=partial(_hold_up, here, go))
        here.wait()
        assert first.result(PATIENCE) == 1
        thread = threading.Thread(target=pool.submit, args=(support.give, 2))
        thread.start()
        thread.join(0.3)
        assert pool.stats()["submitted"] == 1
        go.set()
        thread.join(PATIENCE)
        assert pool.stats()["submitted"] == 2


def _hold_up(here: Signpost, go: Signpost, value: object) -> None:
    support.meet(here, go)


def test_a_done_callback_that_would_wait_for_ever_is_told_so() -> None:
    """It runs in the thread that alone makes room, so there it cannot be waited for."""
    told: list[BaseException] = []
    both = threading.Event()

    def submit_two(_: object) -> None:
        try:
            for number in range(2):
                pool.submit(support.give, number)
        except RuntimeError as exc:
            told.append(exc)
        both.set()

    with ProcessPool(1, max_pending=1) as pool:
        pool.submit(time.sleep, 0.2).add_done_callback(submit_two)
        assert both.wait(PATIENCE)
        assert pool.submit(support.give, 3).result(PATIENCE) == 3
    assert "max_pending" in str(told[0])


@pytest.mark.parametrize("seed", range(3))
def test_no_task_waits_behind_a_long_one_while_a_worker_is_idle(pool: ProcessPool, seed: int) -> None:
    """Tiny tasks travel in batches; those behind a task that turns out long are handed back, read or not."""
    luck, futures = random.Random(seed), []
    place = luck.randrange(1000, 2500)
    for number in range(3000):
        if number == place:
            long = pool.submit(support.sleep, 2 + support.SLACK)
        futures.append(pool.submit(support.give, number))
    wait(futures, PATIENCE)
    assert not long.done(), "the last tiny task ended behind the long one"
    long.cancel()


def _in_a_fork(function: Callable[[], object], folder: Path) -> str:
    """Runs a function in a fork of this process and returns the repr of what came of it."""
    pid = os.fork()
    if not pid:
        try:
            outcome = repr(function())
        except BaseException as exc:
            outcome = type(exc).__name__
        Signpost(folder / "outcome").set(outcome)
        os._exit(0)
    text = Signpost(folder / "outcome").wait()
    os.waitpid(pid, 0)
    return text


def test_a_pool_inherited_through_fork_is_not_its_parents(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1

        def child() -> object:
            try:
                return pool.submit(support.give, "the child's secret").result(PATIENCE)
            finally:
                pool.shutdown()

        outcome = _in_a_fork(child, tmp_path)
        assert outcome in (repr("the child's secret"), "RuntimeError")
        for number in range(20):
            assert pool.submit(support.give, number).result(PATIENCE) == number


def test_stats_count(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    pool = ProcessPool(2)
    assert pool.stats()["workers"] == []
    assert pool.stats()["dispatcher"] is None
    with pool:
        futures = [pool.submit(support.give), pool.submit(support.fail), pool.submit(support.die, "exit")]
        futures.append(pool.schedule(support.sleep, timeout=0.1))
        wait(futures, PATIENCE)
        pool.submit(support.meet, here, go)
        here.wait()
        stats = wait_until(lambda: pool.stats() if pool.stats()["running"] else None, what="it is seen to run")
        counts = {"submitted": 5, "done": 1, "failed": 1, "lost": 1, "timed_out": 1, "cancelled": 0}
        assert {key: stats[key] for key in counts} == counts
        assert (stats["pending"], stats["running"]) == (1, 1)
        assert support.alive(stats["dispatcher"])
        go.set()


BAD = [
    ({"max_workers": 0}, "max_workers"),
    ({"max_workers": -1}, "max_workers"),
    ({"max_workers": 1.5}, "max_workers"),
    ({"max_workers": True}, "max_workers"),
    ({"max_workers": "2"}, "max_workers"),
    ({"start_method": "thread"}, "start_method"),
    ({"max_tasks_per_worker": 0}, "max_tasks_per_worker"),
    ({"max_memory_per_worker": -1}, "max_memory_per_worker"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": "1"}, "timeout"),
    ({"timeout": float("nan")}, "timeout"),
    ({"timeout": float("inf")}, "timeout"),
    ({"timeout": 10**400}, "timeout"),
    ({"soft_timeout": -0.1}, "soft_timeout"),
    ({"max_pending": 0}, "max_pending"),
    ({"callback_timeout": 0}, "callback_timeout"),
    ({"ready_timeout": -1}, "ready_timeout"),
    ({"max_workers": 1, "slot_env": {0: {"A=B": "x"}}}, "slot_env"),
    ({"max_workers": 1, "slot_env": {0: {"": "x"}}}, "slot_env"),
    ({"max_workers": 1, "slot_env": {0: {"A": None}}}, "slot_env"),
    ({"max_workers": 1, "slot_env": lambda slot: {"A": "\0"}}, "slot_env"),
    ({"max_workers": 1, "slot_env": lambda slot: None}, "slot_env"),
    ({"max_workers": 1, "slot_env": [{}]}, "slot_env"),
]


@pytest.mark.parametrize(("arguments", "name"), BAD)
def test_a_bad_argument_gets_one_clear_line(arguments: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ProcessPool(**arguments)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{name} must be ")
    assert "\n" not in str(caught.value)


def test_an_initializer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="initializer"):
        ProcessPool(initializer=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", ["timeout", "soft_timeout"])
@pytest.mark.parametrize("value", [0, -1, "1", True, float("inf"), 10**400])
def test_a_bad_limit_of_one_task_is_refused(pool: ProcessPool, limit: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"^{limit} must be "):
        pool.schedule(support.give, **{limit: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 1.5])
def test_a_bad_buffersize_is_refused(pool: ProcessPool, value: int) -> None:
    with pytest.raises(ConfigurationError, match="buffersize"):
        pool.map(support.give, [1], buffersize=value)


def test_a_bad_chunksize_is_refused(pool: ProcessPool) -> None:
    with pytest.raises(ConfigurationError, match="chunksize"):
        pool.map(support.give, [1], chunksize=0)


def test_the_errors_fit_the_standard_trees() -> None:
    assert issubclass(TimeLimitExceeded, TimeoutError)
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(PayloadError, TypeError)


def test_results_before_a_failing_item_of_the_same_chunk_are_given(pool: ProcessPool) -> None:
    results = pool.map(operator.floordiv, [4, 4, 4, 4], [1, 2, 0, 1], chunksize=4)
    assert [next(results), next(results)] == [4, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
