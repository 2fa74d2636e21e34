"""What the watchdog takes for a long job."""

from __future__ import annotations

import os
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpworker.pool import linux
from mpworker.pool.watchdog import Watchdog
from mpworker.pool.worker import Current


class Kernel:
    """Says that the thread had no processor for so many seconds."""

    def __init__(self, *words: float) -> None:
        self.words = list(words)

    def seconds(self) -> float:
        return self.words.pop(0)


def held_up(now: float, slow: float, queued: tuple[float, float]) -> tuple[bool, Current]:
    current = Current(1, 0.0, 0.0, 0.0, True, True)
    current.slow, current.queued = slow, queued[0]
    with socket.socket() as control:
        watchdog = Watchdog(cast(Any, SimpleNamespace(current=current)), control)
        watchdog._queueing = cast(Any, Kernel(queued[1]))
        answer = watchdog._held_up(now)
        os.close(watchdog._wake_reader)
        os.close(watchdog._wake_writer)
    return answer, current


def test_a_job_that_could_run_is_long() -> None:
    assert held_up(0.006, 0.004, (1.0, 1.0))[0] is False


def test_a_job_whose_thread_had_no_processor_gets_another_moment() -> None:
    held, current = held_up(0.006, 0.004, (1.0, 1.0015))
    assert held
    assert (current.slow, current.queued) == (0.006, 1.0015)


def test_but_not_for_ever() -> None:
    assert held_up(Watchdog.LATEST, Watchdog.LATEST - 0.001, (1.0, 1.001))[0] is False


def test_where_the_kernel_does_not_tell_nobody_is_held_up() -> None:
    assert linux.Queueing(0).seconds() == 0.0
    assert held_up(0.006, 0.004, (0.0, 0.0))[0] is False


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="the kernel keeps no scheduler statistics")
def test_a_thread_that_has_a_processor_does_not_queue_for_all_of_its_time() -> None:
    queueing = linux.Queueing(threading.get_native_id())
    before, began = queueing.seconds(), time.thread_time()
    while time.thread_time() < began + 0.01:
        pass
    assert queueing.seconds() >= before
