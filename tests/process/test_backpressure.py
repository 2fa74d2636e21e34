"""``max_pending``: whoever submits waits or is told, by choice, and what waits in the pool costs what it weighs."""

from __future__ import annotations

import asyncio
import queue
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool
from mpworker.errors import ConfigurationError, PoolFull


def test_a_full_pool_says_so_and_takes_more_when_a_task_is_done(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1, max_pending=2, on_full="raise") as pool:
        first, second = pool.submit(support.meet, here, go), pool.submit(support.give, 2)
        here.wait()
        for _ in range(3):
            with pytest.raises(PoolFull, match=r"^2 tasks are unfinished, which is all that max_pending allows$"):
                pool.submit(support.give, 3)
        with pytest.raises(queue.Full):
            pool.schedule(support.give, (3,), callback=support.give)
        with pytest.raises(queue.Full):
            asyncio.run(pool.run(support.give, 3))
        assert pool.stats()["submitted"] == 2
        go.set()
        assert [first.result(PATIENCE) > 0, second.result(PATIENCE)] == [True, 2]
        assert pool.submit(support.give, 3).result(PATIENCE) == 3
        assert asyncio.run(pool.run(support.give, 4)) == 4


def test_what_a_full_pool_refuses_of_a_map_cancels_the_rest_of_it(tmp_path: Path) -> None:
    with ProcessPool(1, max_pending=3, on_full="raise") as pool:
        with pytest.raises(PoolFull):
            pool.map(support.sleep, [20.0] * 9)
        wait_until(lambda: not pool.stats()["pending"], what="nothing of it is left")
        assert list(pool.map(support.give, range(20), buffersize=3)) == list(range(20))


def test_a_callback_of_a_future_is_told_like_anybody(tmp_path: Path) -> None:
    told: list[BaseException] = []
    here, go, done = Signpost(tmp_path / "here"), Signpost(tmp_path / "go"), Signpost(tmp_path / "done")

    def submit_two(pool: ProcessPool, _: object) -> None:
        try:
            pool.submit(support.meet, here, go)
            pool.submit(support.give, 2)
        except queue.Full as exc:
            told.append(exc)
        done.set()

    with ProcessPool(1, max_pending=1, on_full="raise") as pool:
        pool.submit(support.give, 1).add_done_callback(partial(submit_two, pool))
        done.wait()
        go.set()
    assert isinstance(told[0], PoolFull)


@pytest.mark.parametrize(
    ("how", "word"), [({"on_full": "drop", "max_pending": 1}, "on_full"), ({"on_full": "raise"}, "max_pending")]
)
def test_a_choice_that_is_none_is_refused(how: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        ProcessPool(1, **how)  # type: ignore[arg-type]


def rss(pid: int) -> int:
    """Bytes of memory that are a process' own (not shared with what it was forked from)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not tell")


def test_what_waits_costs_the_dispatcher_what_it_weighs_and_a_little(tmp_path: Path) -> None:
    """Bytes per queued job, measured; the margin is for its record and the frame's header."""
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    count, payload = 20_000, 1000
    with ProcessPool(1) as pool:
        pool.submit(support.meet, here, go)
        here.wait()
        dispatcher = pool.stats()["dispatcher"]
        before = rss(dispatcher)
        for _ in range(count):
            pool.submit(len, bytes(payload))
        handle = pool._core.handle  # type: ignore[union-attr]
        wait_until(lambda: handle.waiting == handle.loose, what="the dispatcher has all but what waits for company")
        each = (rss(dispatcher) - before) / count
        print(f"{each:.0f} bytes of the dispatcher per queued job of {payload} bytes")
        assert payload * 0.9 < each < payload + 1500
        go.set()
        pool.shutdown(cancel_futures=True)
