"""What anybody may expect of a ``concurrent.futures.Executor``, beyond what test_pool and test_shutdown look at."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from functools import partial
from pathlib import Path
from pickle import PicklingError

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


class Gate:
    """Tasks that run until they are let go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.go = folder, Signpost(folder / "go")
        self.numbers = itertools.count()

    def submit(self, pool: ProcessPool) -> Future[int]:
        """One that runs when this returns."""
        here = Signpost(self.folder / f"here{next(self.numbers)}")
        future = pool.submit(support.meet, here, self.go)
        here.wait()
        wait_until(future.running, what="the parent knows that it runs")
        return future


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.go.set()


# -- submit and its futures ------------------------------------------------------------------------------------------


def name_everything(**names: object) -> dict[str, object]:
    return names


def test_any_keyword_is_the_functions_own(pool: ProcessPool) -> None:
    names = {"self": 1, "fn": 2, "args": 3, "timeout": 4, "callback": 5}
    assert pool.submit(name_everything, **names).result(PATIENCE) == names
    assert pool.schedule(name_everything, kwargs=names).result(PATIENCE) == names
    with pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pool.submit(fn=support.give)  # type: ignore[call-arg]


@pytest.mark.parametrize(("function", "argument"), [(lambda: 1, ()), (support.give, (threading.Lock(),))])
def test_a_call_that_cannot_travel_fails_its_future(
    function: Callable[..., object], argument: tuple[object], pool: ProcessPool
) -> None:
    before = pool.stats()["submitted"]
    future = pool.submit(function, *argument)
    assert future.done()
    for kind in (PicklingError, TypeError):
        with pytest.raises(kind, match=r"^the call of .* cannot be pickled"):
            future.result(0)
    assert not future.cancel()
    assert pool.stats()["submitted"] == before
    unused = ProcessPool(1)
    unused.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        unused.submit(function, *argument)


def test_a_future_tells_its_state(pool: ProcessPool, gate: Gate) -> None:
    future = gate.submit(pool)
    assert (future.running(), future.done(), future.cancelled()) == (True, False, False)
    for ask in (future.result, future.exception):
        with pytest.raises(TimeoutError):
            ask(timeout=0)
    gate.go.set()
    assert future.exception(PATIENCE) is None
    assert (future.running(), future.done(), future.cancelled()) == (False, True, False)
    failed = pool.submit(support.fail)
    with pytest.raises(ValueError, match="as asked"):
        failed.result(PATIENCE)
    assert isinstance(failed.exception(0), ValueError)


def test_threads_may_submit_and_cancel_at_the_same_time(pool: ProcessPool) -> None:
    def submit_many(start: int) -> int:
        futures = [pool.submit(support.give, start + number) for number in range(200)]
        dropped = {future for future in futures[::7] if future.cancel()}
        return sum(future.result(PATIENCE) == start + n for n, future in enumerate(futures) if future not in dropped)

    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(submit_many, range(0, 8000, 1000)))
    assert min(counts) >= 200 - 29
    wait_until(lambda: not pool.stats()["pending"], what="everything has ended")
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_a_pool_whose_thread_cannot_start_leaves_nothing_and_may_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before, started = set(support.processes()), []

    def refuse(thread: threading.Thread) -> None:
        started.extend(set(support.processes()) - before)
        raise RuntimeError("can't start new thread")

    pool = ProcessPool(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(support.give)
        pool.shutdown()
    assert started
    assert not any(map(support.alive, started))
    pool = ProcessPool(1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            pool.submit(support.give)
    with pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1


# -- map -------------------------------------------------------------------------------------------------------------


def test_map_of_nothing_and_of_unequal_lengths(pool: ProcessPool) -> None:
    assert list(pool.map(support.give, [])) == []
    assert list(pool.map(support.add, range(3), range(100))) == [0, 2, 4]
    assert list(pool.map(support.add, itertools.count(), range(5), chunksize=3)) == [0, 2, 4, 6, 8]


def test_map_starts_at_once_and_not_when_its_results_are_asked_for(pool: ProcessPool, tmp_path: Path) -> None:
    results = pool.map(support.append, [tmp_path / "ran"] * 3, range(3))
    wait_until(lambda: len(support.lines(tmp_path / "ran")) == 3, what="all have run")
    assert list(results) == [None] * 3


@pytest.mark.parametrize("chunksize", [1, 2])
def test_map_times_out_also_with_chunks(chunksize: int, pool: ProcessPool, gate: Gate) -> None:
    occupied = [gate.submit(pool), gate.submit(pool)]
    results = pool.map(support.give, range(4), timeout=0, chunksize=chunksize)
    with pytest.raises(TimeoutError):
        next(results)
    gate.go.set()
    assert all(future.result(PATIENCE) for future in occupied)
    assert list(pool.map(support.give, range(4), timeout=PATIENCE, chunksize=chunksize)) == [0, 1, 2, 3]


def test_an_exception_in_a_chunk_comes_at_its_chunks_place(pool: ProcessPool) -> None:
    results = pool.map(divmod, [6] * 4, [1, 2, 0, 3], chunksize=2)
    assert [next(results), next(results)] == [(6, 0), (3, 0)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


class Thing:
    """Something that can be weakly referenced, and travels."""


def make(_: object) -> Thing:
    return Thing()


@pytest.mark.parametrize("chunksize", [1, 3])
def test_map_keeps_no_result_that_it_has_handed_out(chunksize: int, pool: ProcessPool) -> None:
    for thing in pool.map(make, range(6), chunksize=chunksize):
        known = weakref.ref(thing)
        del thing
        gc.collect()
        wait_until(lambda known=known: known() is None, 5, "nobody holds it")  # type: ignore[misc]


# -- wait and as_completed -------------------------------------------------------------------------------------------


def test_wait_for_the_first(pool: ProcessPool, gate: Gate) -> None:
    long, quick = gate.submit(pool), pool.submit(support.give)
    done, pending = wait([long, quick], PATIENCE, FIRST_COMPLETED)
    assert (done, pending) == ({quick}, {long})
    assert wait([long, quick], PATIENCE, FIRST_COMPLETED) == ({quick}, {long})  # some are done already
    cancelled = pool.submit(support.sleep)
    cancelled.cancel()
    assert wait([long, cancelled], PATIENCE, FIRST_COMPLETED) == ({cancelled}, {long})


def test_wait_for_the_first_exception(pool: ProcessPool, gate: Gate) -> None:
    long, good, bad = gate.submit(pool), pool.submit(support.give), pool.submit(support.fail)
    done, pending = wait([long, good, bad], PATIENCE, FIRST_EXCEPTION)
    assert bad in done
    assert long in pending
    assert wait([long, bad], PATIENCE, FIRST_EXCEPTION) == ({bad}, {long})  # which has come long ago
    lost = pool.submit(support.die, "exit")
    assert wait([long, lost], PATIENCE, FIRST_EXCEPTION) == ({lost}, {long})
    gate.go.set()
    assert wait([long, good], PATIENCE, FIRST_EXCEPTION) == ({long, good}, set())  # none at all


def test_wait_for_all(pool: ProcessPool, gate: Gate) -> None:
    long, quick, bad = gate.submit(pool), pool.submit(support.give), pool.submit(support.fail)
    wait([quick, bad], PATIENCE)
    assert wait([long, quick, bad], 0.05, ALL_COMPLETED) == ({quick, bad}, {long})
    gate.go.set()
    assert wait([long, quick, bad, quick], PATIENCE) == ({long, quick, bad}, set())


def test_as_completed_yields_each_once_in_the_order_of_their_ends(pool: ProcessPool, gate: Gate) -> None:
    long, quick, bad = gate.submit(pool), pool.submit(support.give), pool.submit(support.fail)
    wait([quick, bad], PATIENCE)
    ended = as_completed([long, quick, bad, quick, long], PATIENCE)
    assert {next(ended), next(ended)} == {quick, bad}
    gate.go.set()
    assert list(ended) == [long]
    cancelled = pool.submit(support.sleep)
    cancelled.cancel()
    assert list(as_completed([cancelled])) == [cancelled]


def test_as_completed_gives_up_but_tells_what_it_has(pool: ProcessPool, gate: Gate) -> None:
    long, quick = gate.submit(pool), pool.submit(support.give)
    wait([quick], PATIENCE)
    ended = as_completed([long, quick], timeout=0)
    assert next(ended) is quick
    with pytest.raises(TimeoutError, match="futures unfinished"):
        next(ended)


# -- callbacks of futures --------------------------------------------------------------------------------------------


def test_done_callbacks_run_in_order_and_once(pool: ProcessPool, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[object] = []
    future = gate.submit(pool)
    future.add_done_callback(lambda f: calls.append((1, f.result())))
    future.add_done_callback(lambda f: 1 // 0)
    future.add_done_callback(lambda f: calls.append((2, threading.current_thread() is threading.main_thread())))
    assert not calls
    gate.go.set()
    pid = future.result(PATIENCE)
    wait_until(lambda: len(calls) == 2, what="the callbacks")
    assert calls == [(1, pid), (2, False)]
    assert "ZeroDivisionError" in caplog.text
    future.add_done_callback(lambda f: calls.append(threading.current_thread() is threading.main_thread()))
    assert calls[2:] == [True]
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_done_callback_may_raise_anything(
    kind: type[BaseException], pool: ProcessPool, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[object] = []
    future = pool.submit(support.meet_and_fail, Signpost(gate.folder / "here"), gate.go, kind)
    future.add_done_callback(lambda f: f.result())  # raises what the task has raised
    future.add_done_callback(heard.append)
    gate.go.set()
    assert type(future.exception(PATIENCE)) is kind
    wait_until(lambda: heard, what="the second one is called")
    assert kind.__name__ in caplog.text
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_done_callbacks_hear_of_every_kind_of_end(pool: ProcessPool, gate: Gate) -> None:
    heard: list[Future[object]] = []
    futures = [pool.submit(support.fail), pool.submit(support.die, "exit"), gate.submit(pool)]
    for future in futures:
        future.add_done_callback(heard.append)
    futures[2].cancel()
    wait_until(lambda: len(heard) == 3, what="the callbacks")
    assert set(heard) == set(futures)


def test_a_done_callback_may_submit(pool: ProcessPool) -> None:
    chain: list[Future[object]] = []
    ended = threading.Event()

    def go_on(_: object) -> None:
        if len(chain) == 5:
            ended.set()
        else:
            chain.append(pool.submit(support.give, len(chain)))
            chain[-1].add_done_callback(go_on)

    pool.submit(support.give).add_done_callback(go_on)
    assert ended.wait(PATIENCE)
    assert [future.result(0) for future in chain] == [0, 1, 2, 3, 4]


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("patient", [False, True])
def test_shutdown_in_every_mode(patient: bool, cancel: bool, gate: Gate) -> None:
    pool = ProcessPool(1)
    running, waiting = gate.submit(pool), [pool.submit(support.give, number) for number in range(5)]
    dispatcher = pool.stats()["dispatcher"]
    if patient:
        thread = threading.Thread(target=pool.shutdown, kwargs={"wait": True, "cancel_futures": cancel})
        thread.start()
        wait_until(lambda: pool._closed, what="the pool takes no more")
        thread.join(0.05)
        assert thread.is_alive()
    else:
        pool.shutdown(wait=False, cancel_futures=cancel)
    assert running.running()
    if cancel:
        assert wait(waiting, PATIENCE).done == set(waiting)
        assert all(future.cancelled() for future in waiting)
    gate.go.set()
    assert running.result(PATIENCE) > 0
    if patient:
        thread.join(PATIENCE)
        assert not support.alive(dispatcher)
    if not cancel:
        assert [future.result(PATIENCE) for future in waiting] == [0, 1, 2, 3, 4]
    pool.shutdown()
    pool.shutdown(wait=False, cancel_futures=True)
    wait_until(lambda: not support.alive(dispatcher), what="its processes end")


def test_shutdown_from_a_done_callback_does_not_wait_for_itself() -> None:
    pool = ProcessPool(1)
    ended = threading.Event()

    def end(_: object) -> None:
        pool.shutdown()
        ended.set()

    pool.submit(support.give).add_done_callback(end)
    last = pool.submit(support.give, 2)
    assert ended.wait(PATIENCE)
    assert last.result(PATIENCE) == 2
    pool.shutdown()


def test_who_submits_while_another_thread_shuts_down_is_told_or_served() -> None:
    pool = ProcessPool(1)
    futures: list[Future[object]] = []
    refused = threading.Event()

    def submit_on() -> None:
        try:
            for number in itertools.count():
                futures.append(pool.submit(support.give, number))
        except RuntimeError:
            refused.set()

    threads = [threading.Thread(target=submit_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(futures) > 20, what="both submit")
    pool.shutdown()
    assert refused.wait(PATIENCE)
    for thread in threads:
        thread.join(PATIENCE)
    assert len(wait(futures, PATIENCE).done) == len(futures)
    assert not any(future.exception(0) for future in futures)


def test_threads_may_cancel_the_same_task_and_shut_down_at_the_same_time(gate: Gate) -> None:
    pool = ProcessPool(2)
    running, waiting = [gate.submit(pool), gate.submit(pool)], [pool.submit(support.give, n) for n in range(50)]
    heard: list[Future[object]] = []
    for future in running + waiting:
        future.add_done_callback(heard.append)
    dispatcher = pool.stats()["dispatcher"]
    together = threading.Barrier(6)

    def cancel_all() -> list[bool]:
        together.wait(PATIENCE)
        return [future.cancel() for future in running + waiting[::2]]

    def shut_down(patient: bool) -> None:
        together.wait(PATIENCE)
        pool.shutdown(wait=patient)

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(cancel_all) for _ in range(3)]
        ends = [threads.submit(shut_down, patient) for patient in (True, True, False)]
        assert all(answer.result(PATIENCE)[:2] == [True, True] for answer in answers)
        assert [end.result(PATIENCE) for end in ends] == [None] * 3
    assert not support.alive(dispatcher)
    assert wait(running + waiting, 0).not_done == set()
    assert all(future.cancelled() for future in running)
    assert [future.result(0) for future in waiting[1::2]] == list(range(1, 50, 2))
    wait_until(lambda: len(heard) == 52, what="the callbacks")
    assert set(heard) == {*running, *waiting}


def test_a_pool_is_collected_though_it_has_worked(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    pool = ProcessPool(1)
    known = weakref.ref(pool)
    running, waiting = gate.submit(pool), pool.submit(support.give, 2)
    dispatcher = pool.stats()["dispatcher"]
    results = pool.map(support.give, range(3))
    del pool
    gc.collect()
    assert known() is None
    gate.go.set()
    assert list(results) == [0, 1, 2]
    assert (running.result(PATIENCE) > 0, waiting.result(PATIENCE)) == (True, 2)
    del results
    gc.collect()
    wait_until(lambda: known() is None and not support.alive(dispatcher), what="it is gone")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_parent_keeps_neither_calls_nor_results(pool: ProcessPool) -> None:
    thing = Thing()
    future = pool.submit(support.give, thing)
    known = [weakref.ref(thing), weakref.ref(future), weakref.ref(future.result(PATIENCE))]
    del thing, future
    gc.collect()
    wait_until(lambda: not any(ref() for ref in known), 5, "nobody holds them")


class Telling:
    """Says when it is collected."""

    def __init__(self, path: Path) -> None:
        self.path, self.pid = path, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.pid:
            support.append(self.path, os.getpid())


def ignore(_: object) -> None: ...


def test_a_worker_keeps_neither_arguments_nor_results(pool: ProcessPool, tmp_path: Path) -> None:
    for task in (ignore, support.give):
        pool.submit(task, Telling(tmp_path / task.__name__)).result(PATIENCE)
        wait_until(partial(support.lines, tmp_path / task.__name__), 5, "the idle worker has let go of it")


# -- pools in pools --------------------------------------------------------------------------------------------------


def in_a_pool(method: str, depth: int) -> list[int]:
    if not depth:
        return [os.getpid()]
    with ProcessPool(1, start_method=method) as pool:
        return [os.getpid(), *pool.submit(in_a_pool, method, depth - 1).result(PATIENCE)]


@pytest.mark.parametrize("method", ["fork", "auto"])
def test_a_task_may_have_a_pool_of_its_own(method: str, pool: ProcessPool) -> None:
    pids = pool.submit(in_a_pool, method, 1).result(PATIENCE)
    assert len({os.getpid(), *pids}) == 3
    wait_until(lambda: not support.alive(pids[1]), what="the inner pool has ended")


def test_a_killed_task_takes_its_own_pool_along(pool: ProcessPool, tmp_path: Path) -> None:
    future = pool.submit(stay_with_a_pool, Signpost(tmp_path / "inner"))
    inner = int(Signpost(tmp_path / "inner").wait())
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result(0)
    wait_until(lambda: not support.alive(inner), what="the inner pool ends with its parent")


def stay_with_a_pool(note: Signpost) -> None:
    with ProcessPool(1) as inner:
        inner.submit(support.give).result(PATIENCE)
        note.set(inner.stats()["dispatcher"])
        inner.submit(support.sleep).result(PATIENCE)
