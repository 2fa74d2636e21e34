"""Celery's own ways to a worker inside a test process, with our pool: the app is in no module there."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from celery import Celery
from celery.contrib.testing.app import TestApp, setup_default_app
from celery.contrib.testing.worker import start_worker
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded
from integration.node import POOL, Server

from mpworker.celery import pool
from mpworker.pool import handle


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


def test_a_restart_beside_a_running_task_spares_it(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process has what cannot be copied: the others follow with what they were made of, and a warning."""
    gate = tmp_path / "gate"
    warnings: list[str] = []
    errors: list[tuple[object, ...]] = []
    monkeypatch.setattr(pool.logger, "warning", warnings.append)
    monkeypatch.setattr(handle.logger, "error", lambda *args: errors.append(args))

    @app.task(shared=False)
    def hold() -> int:
        gate.with_suffix(".here").touch()
        while not gate.exists():
            time.sleep(0.01)
        return os.getpid()

    @app.task(shared=False)
    def whose() -> int:
        return os.getpid()

    with start_worker(app, pool=POOL, concurrency=1, perform_ping_check=False) as worker:
        dispatcher, first = worker.pool.handle.pid, whose.delay().get(timeout=30)
        held = hold.delay()
        support.wait_until(gate.with_suffix(".here").exists, what="it runs")
        worker.pool.restart()
        assert "this process only, and tasks run" in "".join(warnings)
        gate.touch()
        assert held.get(timeout=30) == first
        assert whose.delay().get(timeout=30) != first
        assert worker.pool.handle.pid == dispatcher

        worker.pool.restart()
        support.wait_until(lambda: worker.pool.handle.pid != dispatcher, what="another dispatcher")
        assert whose.delay().get(timeout=30)
        assert not errors


@pytest.mark.parametrize(("method", "expected"), [("auto", "fork"), ("spawn", "spawn"), ("forkserver", "forkserver")])
def test_the_app_that_celery_makes_for_tests_whose_settings_only_it_knows(method: str, expected: str) -> None:
    """With the ping that :func:`start_worker` sends first, and a second worker after the first one."""
    with Server() as server:
        config = {"broker_url": server.broker, "result_backend": server.results, "mpworker_start_method": method}
        app = TestApp(set_as_current=False, config=config)
        with setup_default_app(app):
            app.set_default()
            app.set_current()
            importlib.import_module("celery.contrib.testing.tasks")
            for _ in range(2):
                with start_worker(app, pool=POOL) as worker:
                    assert worker.pool.handle.options.start_method == expected


PROJECT = """
from celery import Celery

app = Celery("proj")
setting = "as it was imported"

@app.task
def who():
    import os
    return os.getpid(), setting
"""
TESTS = """
import os
import proj
import pytest
from celery import shared_task

@pytest.fixture(scope="session")
def celery_config():
    return {"broker_url": os.environ["BROKER"], "result_backend": os.environ["RESULTS"]}

@pytest.fixture(scope="session")
def celery_worker_pool():
    return os.environ["POOL"]

@shared_task
def double(number):
    return 2 * number

def test_the_fixture_for_one_test(celery_app, celery_worker):
    assert [double.delay(number).get(timeout=30) for number in range(5)] == [0, 2, 4, 6, 8]

def test_a_task_that_is_defined_while_it_runs(celery_app, celery_worker):
    @celery_app.task
    def triple(number):
        return 3 * number

    pid = celery_worker.pool.handle.pid
    celery_worker.reload()
    assert [triple.delay(number).get(timeout=30) for number in range(3)] == [0, 3, 6]
    assert celery_worker.pool.handle.pid != pid

@pytest.fixture
def theirs(monkeypatch):
    monkeypatch.setattr(proj, "setting", "patched")
    proj.app.conf.update(broker_url=os.environ["BROKER"], result_backend=os.environ["RESULTS"])

def test_an_app_in_a_module_with_what_the_test_has_patched_and_defines(theirs, celery_worker_pool):
    from celery.contrib.testing.worker import start_worker

    @proj.app.task
    def local(text):
        return text.upper()

    with start_worker(proj.app, pool=celery_worker_pool, perform_ping_check=False):
        pid, seen = proj.who.delay().get(timeout=30)
        assert (pid != os.getpid(), seen) == (True, "patched")
        assert local.delay("a").get(timeout=30) == "A"
"""
SESSION_TESTS = """
from test_one import celery_config, celery_worker_pool, double

def test_first(celery_session_worker):
    assert double.delay(1).get(timeout=30) == 2

def test_second(celery_session_worker):
    assert double.delay(2).get(timeout=30) == 4
"""


def test_celerys_fixtures_in_a_pytest_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(PROJECT)
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "test_two.py").write_text(SESSION_TESTS)
    with Server() as server:
        env = os.environ | {"BROKER": server.broker, "RESULTS": server.results, "POOL": POOL}
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "celery.contrib.pytest", "-p", "no:cacheprovider", "."],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=support.PATIENCE * 4,
            check=False,
        )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout
