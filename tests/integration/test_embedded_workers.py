"""Celery's own ways to a worker inside a test process, with our pool: the app is in no module there."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from celery import Celery, Task, signals
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


def test_a_restart_that_this_very_process_waits_for(app: Celery) -> None:
    """The fork is taken while another thread reads an answer from the broker: that is not the fork's to read."""
    app.conf.worker_pool_restarts = True

    @app.task(shared=False)
    def once_more() -> int:
        return os.getpid()

    with start_worker(app, pool=POOL, concurrency=2, perform_ping_check=False) as worker:
        for _ in range(3):
            dispatcher = worker.pool.handle.pid
            assert once_more.delay().get(timeout=30)
            answers = app.control.broadcast("pool_restart", reply=True, timeout=1)  # and listens that long
            assert ["ok" in told for answer in answers for told in answer.values()] == [True]
            support.wait_until(lambda old=dispatcher: worker.pool.handle.pid != old, what="another dispatcher")
            assert app.control.inspect(timeout=30, limit=1).ping()
            assert once_more.delay().get(timeout=30)


def test_what_one_worker_has_left_is_run_by_the_next_of_this_process(app: Celery, tmp_path: Path) -> None:
    """The end of an embedded worker is a cold one. The whole process knows its requests, which are not the next's."""
    notes = tmp_path / "notes"

    @app.task(shared=False, acks_late=True)
    def late(seconds: float) -> None:
        with notes.open("a") as file:
            file.write("began\n")
        time.sleep(seconds)

    with start_worker(app, pool=POOL, concurrency=1, perform_ping_check=False):
        result = late.delay(30 if not notes.exists() else 0)
        support.wait_until(notes.exists, what="it runs")
    late.run = late.__wrapped__ = lambda seconds: "the second time"  # in the next worker's processes
    with start_worker(app, pool=POOL, concurrency=1, perform_ping_check=False):
        assert result.get(timeout=support.PATIENCE) == "the second time"


def test_processes_of_a_worker_that_ends_say_goodbye(app: Celery, tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def goodbye(**_: object) -> None:
        with notes.open("a") as file:
            file.write(f"{os.getpid()}\n")

    signals.worker_process_shutdown.connect(goodbye)
    try:
        with start_worker(app, pool=POOL, concurrency=2, perform_ping_check=False) as worker:
            pids = {process["pid"] for process in worker.pool.handle.workers if process["slot"] in (0, 1)}
        assert set(map(int, notes.read_text().split())) == pids
    finally:
        signals.worker_process_shutdown.disconnect(goodbye)


def test_an_app_that_cannot_be_pickled(app: Celery) -> None:
    """As with Flask, whose guide makes the tasks' class in a function."""

    class FlaskTask(Task):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            return "in its context", self.run(*args, **kwargs)

    own = Celery("own", broker=app.conf.broker_url, backend=app.conf.result_backend, task_cls=FlaskTask)
    own.conf.task_routes = (lambda *_, **__: None,)

    @own.task(shared=False)
    def one() -> int:
        return 1

    with start_worker(own, pool=POOL, perform_ping_check=False):
        assert one.delay().get(timeout=30) == ["in its context", 1]
    own.conf.mpworker_start_method = "spawn"
    with pytest.raises(SystemExit, match=r"^mpworker: the app.* cannot be pickled: .*; set mpworker_start_method"):
        start_worker(own, pool=POOL, perform_ping_check=False).__enter__()
    own.close()


def test_each_of_several_apps_has_its_own_processes_again(app: Celery, tmp_path: Path) -> None:
    def other(name: str) -> Celery:
        made = Celery(name, broker="filesystem://", backend=app.conf.result_backend, set_as_current=False)
        folder = tmp_path / name
        folder.mkdir()
        control = folder / "control"
        control.mkdir()
        ways = {"data_folder_in": folder, "data_folder_out": folder, "control_folder": control}
        made.conf.broker_transport_options = {which: str(path) for which, path in ways.items()}

        @made.task(name=f"whose.{name}", shared=False)
        def whose() -> str:
            return name

        return made

    one, two = other("one"), other("two")
    options = {"pool": POOL, "concurrency": 1, "perform_ping_check": False}
    with start_worker(one, **options) as first, start_worker(two, **options):
        assert two.tasks["whose.two"].delay().get(timeout=30) == "two"
        os.kill(dispatcher := first.pool.handle.pid, signal.SIGKILL)
        support.wait_until(lambda: first.pool.handle.pid != dispatcher, what="another dispatcher")
        assert one.tasks["whose.one"].delay().get(timeout=30) == "one"


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
