"""Celery's own ways to a worker inside a test process, with our pool: the app is in no module there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from integration.node import POOL, Server


@pytest.fixture(scope="module")
def app() -> Iterator[Celery]:
    with Server() as server:
        app = Celery("unplaced", broker=server.broker, backend=server.results, set_as_current=False)
        app.conf.worker_pool = POOL
        yield app
        app.backend.result_consumer.cancel_for = lambda task_id: None
        app.close()


def test_tasks_of_a_function_and_their_limits(app: Celery) -> None:
    seen = "what the test has set"

    @app.task(shared=False)
    def who() -> tuple[int, str]:
        return os.getpid(), seen

    @app.task(shared=False, time_limit=0.3)
    def slow() -> None:
        time.sleep(30)

    @app.task(shared=False, soft_time_limit=0.3)
    def careful() -> None:
        time.sleep(30)

    with start_worker(app, pool=POOL, concurrency=2, perform_ping_check=False) as worker:
        assert worker.pool.handle.options.start_method == "fork"
        pid, told = who.delay().get(timeout=30)
        assert (pid != os.getpid(), told) == (True, seen)
        with pytest.raises(TimeLimitExceeded):
            slow.delay().get(timeout=30)
        with pytest.raises(SoftTimeLimitExceeded):
            careful.delay().get(timeout=30)


def test_one_worker_after_the_other(app: Celery) -> None:
    @app.task(shared=False)
    def double(number: int) -> int:
        return 2 * number

    for _ in range(2):
        with start_worker(app, pool=POOL, concurrency=1, perform_ping_check=False):
            assert [double.delay(number).get(timeout=30) for number in range(3)] == [0, 2, 4]
