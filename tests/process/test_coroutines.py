"""``async def`` functions as tasks: one loop per worker, and limits that reach a coroutine wherever it is."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, RemoteTraceback, SoftTimeLimitExceeded, TimeLimitExceeded

LIMIT = 0.2
left_behind: list[object] = []


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(1, initializer=import_module, initargs=(__name__,)) as pool:
        yield pool


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2


async def fail() -> None:
    await asyncio.sleep(0)
    raise LookupError("no such thing")


async def leave_by(kind: type[BaseException]) -> None:
    await asyncio.sleep(0)
    raise kind("x")


async def which_loop() -> tuple[int, int]:
    return os.getpid(), id(asyncio.get_running_loop())


class Callable_:
    async def __call__(self) -> str:
        return "called"


def test_coroutine_functions_are_submitted_scheduled_and_mapped(pool: ProcessPool) -> None:
    assert pool.submit(double, 2).result(PATIENCE) == 4
    assert pool.schedule(partial(double, 3), timeout=PATIENCE).result(PATIENCE) == 6
    assert pool.submit(Callable_()).result(PATIENCE) == "called"
    assert list(pool.map(double, range(10), chunksize=4)) == list(range(0, 20, 2))
    error = pool.submit(fail).exception(PATIENCE)
    assert isinstance(error, LookupError)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "no such thing" in str(error.__cause__)


def test_a_worker_has_one_loop_whatever_leaves_it(pool: ProcessPool) -> None:
    before = pool.submit(which_loop).result(PATIENCE)
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):
        assert type(pool.submit(leave_by, kind).exception(PATIENCE)) is kind
    # As it stands it would say that somebody has cancelled the future, or whoever awaits that.
    assert type(pool.submit(leave_by, asyncio.CancelledError).exception(PATIENCE)) is RuntimeError
    assert pool.submit(which_loop).result(PATIENCE) == before


def close_the_loop() -> None:
    asyncio.get_event_loop_policy().get_event_loop().close()  # as many a script does


def test_a_loop_that_a_task_has_closed_is_replaced(pool: ProcessPool) -> None:
    pid, _ = pool.submit(which_loop).result(PATIENCE)
    pool.submit(close_the_loop).result(PATIENCE)
    assert pool.submit(which_loop).result(PATIENCE)[0] == pid


async def leave_a_bomb() -> None:
    async def explode() -> None:
        await asyncio.sleep(0)
        raise SystemExit(9)

    left_behind.append(asyncio.create_task(explode()))


def test_what_a_task_has_left_in_the_loop_costs_nobody_else_anything() -> None:
    with ProcessPool(1) as pool:
        pool.submit(leave_a_bomb).result(PATIENCE)
        assert [pool.submit(double, number).result(PATIENCE) for number in range(3)] == [0, 2, 4]


def test_a_worker_leaves_without_what_does_not_want_to_end(tmp_path: Path) -> None:
    script = """
import asyncio, os
from mpworker.pool import coroutines

async def stay():
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

async def leave_a_mule():
    global mule
    mule = asyncio.create_task(stay())
    await asyncio.sleep(0)

coroutines.settle(leave_a_mule())
coroutines.close()
print("left", flush=True)
os._exit(0)
"""
    assert support.run_script(script, tmp_path).out == "left\n"


async def wait_long() -> None:
    await asyncio.sleep(20)


async def block() -> None:
    time.sleep(20)


async def gather() -> None:
    await asyncio.gather(wait_long(), wait_long())


async def block_in_a_child() -> None:
    await asyncio.gather(wait_long(), block())


async def in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        left_behind.append(group.create_task(wait_long()))


async def in_a_thread() -> None:
    await asyncio.to_thread(time.sleep, 1)


async def spin() -> None:
    while True:
        await asyncio.sleep(0)


WAITS = [wait_long, block, gather, block_in_a_child, in_a_group, in_a_thread, spin]


async def told(how: Callable[[], Awaitable[None]]) -> str:
    """The exception can be caught where the coroutine waits, and the task then goes on."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await how()
    except SoftTimeLimitExceeded as exc:
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):  # would be confused by a cancelling that still counts
            await asyncio.sleep(0)
        return f"{exc.limit} {task.cancelling()}"
    return "not told"


@pytest.mark.parametrize("how", WAITS, ids=lambda how: how.__name__)
def test_the_soft_limit_reaches_the_coroutine(how: Callable[[], Awaitable[None]], pool: ProcessPool) -> None:
    pid, _ = pool.submit(which_loop).result(PATIENCE)
    assert pool.schedule(told, (how,), soft_timeout=LIMIT).result(PATIENCE) == f"{LIMIT} 0"
    assert pool.schedule(how, soft_timeout=LIMIT / 2).exception(PATIENCE).limit == LIMIT / 2  # type: ignore[union-attr]
    assert pool.submit(which_loop).result(PATIENCE)[0] == pid


async def swallow() -> None:
    while True:
        with suppress(BaseException):
            await asyncio.sleep(20)


def test_the_hard_limit_and_cancel_end_it(pool: ProcessPool, tmp_path: Path) -> None:
    error = pool.schedule(swallow, timeout=2 * LIMIT, soft_timeout=LIMIT).exception(PATIENCE)
    assert isinstance(error, TimeLimitExceeded)
    here = Signpost(tmp_path / "here")
    future = pool.submit(say_and_wait, here)
    pid = int(here.wait())
    future.cancel()
    wait_until(lambda: not support.alive(pid), what="its process ends")


async def say_and_wait(here: Signpost) -> None:
    here.set(os.getpid())
    await asyncio.sleep(20)


async def nest() -> list[object]:
    """A fork inherits the loop that runs here."""
    with ProcessPool(1, start_method="fork") as pool:
        error = await asyncio.wrap_future(pool.schedule(told, (wait_long,), soft_timeout=LIMIT))
        return [await pool.run(double, 2), error, await double(3)]


def test_a_coroutine_may_fork_workers_that_run_coroutines(pool: ProcessPool) -> None:
    assert pool.submit(nest).result(PATIENCE) == [4, f"{LIMIT} 0", 6]


async def note(path: Path, value: object) -> None:
    await asyncio.sleep(0)
    support.append(path, value)


def test_a_callback_may_be_a_coroutine_function(pool: ProcessPool, tmp_path: Path) -> None:
    pool.schedule(double, (4,), callback=partial(note, tmp_path / "log"))
    assert wait_until(lambda: support.lines(tmp_path / "log"), what="the callback") == ["8"]


async def leave_behind(then_fail: bool) -> None:
    left_behind[:] = [asyncio.create_task(wait_long())]
    await asyncio.sleep(0)
    if then_fail:
        raise LookupError


async def what_was_left() -> bool:
    return left_behind[0].done()  # type: ignore[attr-defined]


def test_what_a_failed_one_has_started_is_cancelled(pool: ProcessPool) -> None:
    for then_fail in (False, True):
        pool.submit(leave_behind, then_fail).exception(PATIENCE)
        assert pool.submit(what_was_left).result(PATIENCE) is then_fail


SCRIPT = """
import sys
from mpworker import ProcessPool
def has_asyncio():
    return "asyncio" in sys.modules
async def own():
    return has_asyncio()
if __name__ == "__main__":
    with ProcessPool(1) as pool:
        print([pool.submit(function).result(30) for function in (has_asyncio, own)])
"""


def test_a_worker_without_coroutines_does_not_load_asyncio(tmp_path: Path) -> None:
    ended = support.run_script(SCRIPT, tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "[False, True]\n", "")
