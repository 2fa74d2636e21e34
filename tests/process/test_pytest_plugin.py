"""The plugin as a project uses it: in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support

PROJECT = """
from celery import Celery

app = Celery("proj", broker="redis://nowhere.invalid/1", backend="redis://nowhere.invalid/2")
app.conf.task_always_eager = True
"""
TESTS = """
import os, time
import pytest
from celery import group
from celery.exceptions import TimeLimitExceeded
from proj import app

patched = "not yet"

@app.task
def who():
    return os.getpid(), patched

@app.task(time_limit=0.3)
def slow():
    time.sleep(30)

@app.task
def fails():
    raise LookupError("nothing there")

@pytest.fixture
def mpworker_app():
    return app

@pytest.fixture
def before(monkeypatch):
    monkeypatch.setattr(__name__ + ".patched", "yes")

def test_it_runs_in_another_process_that_knows_what_was_patched(before, mpworker_worker):
    pid, seen = who.delay().get(timeout=30)
    assert (pid != os.getpid(), seen) == (True, "yes")
    left.append(slow.delay().id)

left = []

def test_limits_and_errors_are_real_and_nothing_is_left_of_the_test_before(mpworker_worker):
    assert app.AsyncResult(left[0]).state == "PENDING"
    with pytest.raises(TimeLimitExceeded):
        slow.delay().get(timeout=30)
    with pytest.raises(LookupError, match="nothing there"):
        fails.delay().get(timeout=30)

class TestOptions:
    @pytest.fixture
    def mpworker_worker_options(self):
        return {"concurrency": 3}

    def test_they_reach_the_worker(self, mpworker_worker):
        assert mpworker_worker.pool.num_processes == 3
        pids = {pid for pid, _ in group(who.s() for _ in range(20))().get(timeout=30)}
        assert len(pids) <= 3

def test_afterwards_the_app_is_what_it_was():
    assert app.conf.broker_url == "redis://nowhere.invalid/1"
    assert "nowhere.invalid/2" in app.conf.result_backend
    assert app.conf.task_always_eager
    assert who.delay().get()[0] == os.getpid()
"""
DEFAULT = """
from mpworker import app

@app.task
def add(x, y):
    return x + y

def test_without_a_fixture_it_is_the_default_app(mpworker_worker):
    assert add.delay(1, 2).get(timeout=30) == 3
"""


@pytest.mark.parametrize(("tests", "count"), [(TESTS, 4), (DEFAULT, 1)], ids=["own app", "default app"])
def test_a_test_gets_a_real_worker(tests: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "proj.py").write_text(PROJECT)
    (tmp_path / "test_proj.py").write_text(tests)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-q", "-p", "mpworker.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "MPWORKER_", "PYTEST_"))
    }
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_proj.py"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=support.PATIENCE * 2,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr
    assert f"{count} passed" in ended.stdout
