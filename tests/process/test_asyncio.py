"""The pool from inside an event loop: awaited results, and cancelling that reaches the process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLost


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def in_time(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(main())


def test_results_and_errors_are_awaited(pool: ProcessPool, tmp_path: Path) -> None:
    async def main() -> None:
        assert await pool.run(support.add, 1, 2, kwargs={"more": 3}) == 6
        assert await asyncio.gather(*(pool.run(support.give, number) for number in range(50))) == list(range(50))
        with pytest.raises(ValueError, match="as asked"):
            await pool.run(support.fail)
        with pytest.raises(TimeLimitExceeded):
            await pool.run(support.sleep, timeout=0.1)
        with pytest.raises(SoftTimeLimitExceeded):
            await pool.run(support.sleep, soft_timeout=0.1)
        with pytest.raises(WorkerLost):
            await pool.run(support.die, "exit")
        with pytest.raises(RuntimeError, match="StopIteration"):  # what becomes of it in any coroutine
            await pool.run(support.fail, "x", StopIteration)
        await pool.run(support.give, 1, callback=partial(support.note, tmp_path / "log", "ok"))

    in_time(main())
    assert wait_until(lambda: support.lines(tmp_path / "log"), what="the callback")


def by_run(pool: ProcessPool, *call: Any) -> Awaitable[Any]:
    return pool.run(*call)


def by_wrap_future(pool: ProcessPool, *call: Any) -> Awaitable[Any]:
    return asyncio.wrap_future(pool.submit(*call))


def by_run_in_executor(pool: ProcessPool, *call: Any) -> Awaitable[Any]:
    return asyncio.get_running_loop().run_in_executor(pool, *call)


@pytest.mark.parametrize("way", [by_run, by_wrap_future, by_run_in_executor])
def test_cancelling_kills_the_work(way: Callable[..., Awaitable[Any]], pool: ProcessPool, tmp_path: Path) -> None:
    here = Signpost(tmp_path / "here")

    async def main() -> int:
        assert await way(pool, support.add, 1, 2) == 3
        with pytest.raises(ValueError, match="as asked"):
            await way(pool, support.fail)
        work = asyncio.ensure_future(way(pool, support.meet, here, Signpost(tmp_path / "never")))
        pid = await asyncio.to_thread(here.wait)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return int(pid)

    pid = in_time(main())
    wait_until(lambda: not support.alive(pid), what="the process of the cancelled work ends")
    assert pool.submit(support.give, 1).result(PATIENCE) == 1


def test_waiting_for_room_does_not_block_the_loop(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")

    async def main() -> None:
        first = asyncio.ensure_future(pool.run(support.meet, here, go))
        await asyncio.to_thread(here.wait)
        waiting = [asyncio.ensure_future(pool.run(support.append, tmp_path / "ran", number)) for number in range(4)]
        await asyncio.sleep(0)  # each has asked for room; the loop goes on
        assert pool.stats()["submitted"] == 1
        for given_up in (waiting[0], waiting[2]):
            given_up.cancel()
        go.set()
        assert await first > 0
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError, type(None)] * 2

    with ProcessPool(1, max_pending=1) as pool:
        in_time(main())
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
    assert [line for line in support.lines(tmp_path / "ran") if line in "123"][-1] == "3"


def test_a_loop_that_is_closed_meanwhile_harms_nothing(pool: ProcessPool, tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    loop = asyncio.new_event_loop()
    work = loop.create_task(pool.run(support.meet, here, go))
    loop.run_until_complete(asyncio.sleep(0))
    here.wait()
    loop.close()
    go.set()
    assert pool.submit(support.give, 1).result(PATIENCE) == 1
    work._log_destroy_pending = False  # type: ignore[attr-defined]
