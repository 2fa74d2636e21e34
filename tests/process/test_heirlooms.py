"""Queues, locks and values of multiprocessing as arguments of an initializer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from typing import Any

import pytest
import support
from support import PATIENCE, wait_until

from mpworker import ProcessPool
from mpworker.errors import PayloadError

_kept: dict[str, Any] = {}


def keep(**things: Any) -> None:
    _kept.update(things)
    _kept["queue"].put(os.getpid())


def keep_all(queue: Any, lock: Any, value: Any) -> None:
    keep(queue=queue, lock=lock, value=value)
    queue.close()
    queue.join_thread()  # killed while this one writes, it would leave the queue's lock behind


def count(times: int) -> int:
    for _ in range(times):
        with _kept["lock"]:
            _kept["value"].value += 1
    return os.getpid()


def linger() -> int:
    """Long enough for the other worker to get the next one."""
    time.sleep(0.02)
    return os.getpid()


def things(method: str) -> tuple[Any, Any, Any]:
    context: Any = multiprocessing.get_context("fork" if method == "fork" else "spawn")
    return context.Queue(), context.Lock(), context.Value("i", 0, lock=False)


def await_answers(pool: ProcessPool, pids: set[int]) -> None:
    """Who answers has ended its initializer, and may be killed: it does not write to the queue any more."""
    silent = set(pids)

    def all_have() -> bool:
        silent.difference_update([task.result(PATIENCE) for task in [pool.submit(linger) for _ in range(2)]])
        return not silent

    wait_until(all_have, what="each worker has answered")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn", "auto"])
def test_workers_share_what_the_initializer_was_given(method: str) -> None:
    queue, lock, value = things(method)
    descriptors = len(os.listdir("/proc/self/fd"))
    with ProcessPool(2, start_method=method, initializer=keep_all, initargs=(queue, lock, value)) as pool:
        pool.submit(support.give).result(PATIENCE)
        told = {queue.get(timeout=PATIENCE) for _ in range(2)}
        await_answers(pool, told)
        for task in [pool.submit(count, 200) for _ in range(4)]:
            assert task.result(PATIENCE) in told
        assert value.value == 800
        # A replacement has them too; and so have the workers of a new dispatcher.
        os.kill(told.pop(), signal.SIGKILL)
        told.add(replacement := queue.get(timeout=PATIENCE))
        await_answers(pool, {replacement})
        support.kill_ours(pool.stats()["dispatcher"])
        assert {queue.get(timeout=PATIENCE) for _ in range(2)}.isdisjoint(told)
        assert pool.submit(count, 1).result(PATIENCE)
    queue.close()
    queue.join_thread()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, what="nothing stays open")


def test_one_that_only_forks_can_share_says_so() -> None:
    lock = multiprocessing.get_context("fork").Lock()
    with (
        pytest.raises(PayloadError, match="initializer"),
        ProcessPool(1, start_method="spawn", initializer=support.give, initargs=(lock,)) as pool,
    ):
        pool.submit(support.give, 1)
