"""What Redis remembers of what all nodes have ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from integration.node import PROJECTS, Server, eventually

from mpworker.celery.backend import disable_journal, enable_journal
from mpworker.celery.history import history_of
from mpworker.celery.shipping import ship
from mpworker.errors import ConfigurationError, StoreError
from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.record import Record, timestamp_now
from mpworker.results.shipper import Pass
from mpworker.settings import Settings

CLASS = "mpworker.celery.backend:ResultBackend"
Store = Callable[..., None]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def app_of(server: Server, **conf: Any) -> Celery:
    app = Celery("t", broker=server.broker, backend=f"mpworker+{server.results}", set_as_current=False)
    app.loader.override_backends = {"mpworker": CLASS}
    app.conf.update(conf)
    return app


def put(app: Celery, folder: Path, node: str, task_id: str, state: str = "SUCCESS", result: Any = "ok") -> None:
    """As a worker of that node would."""
    enable_journal(Settings(journal=folder / node), node)
    try:
        app.backend.store_result(task_id, result, state)
    finally:
        disable_journal()


def found(app: Celery) -> dict[str, str]:
    with history_of(app) as path:
        return {record.task_id: record.status for record in ResultStore(path).query()}


def test_ends_of_all_nodes_are_remembered_and_nothing_else(server: Server, tmp_path: Path) -> None:
    app = app_of(server)
    put(app, tmp_path, "one@here", "a", result="x" * 10_000)
    put(app, tmp_path, "two@there", "b", "FAILURE", ValueError("n" * 1000))
    put(app, tmp_path, "two@there", "c", "STARTED")
    put(app, tmp_path, "two@there", "a", "FAILURE", ValueError("late"))  # nothing replaces a SUCCESS
    with history_of(app) as path:
        store = ResultStore(path)
        assert {record.task_id: record.status for record in store.query()} == {"a": "SUCCESS", "b": "FAILURE"}
        assert {record.hostname for record in store.query()} == {"one@here", "two@there"}
        (failed,) = store.query(status="failed")
        assert failed.message.startswith("ValueError: nnn")
        assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0
        assert path.stat().st_size < 2000
    assert not path.exists()


def test_what_is_brought_late_is_remembered_too(server: Server, tmp_path: Path) -> None:
    app = app_of(server)
    late = Record(task_id="a", status="SUCCESS", key="celery-task-meta-a", payload="{}", timestamp=timestamp_now())
    Journal(tmp_path, "n").append(late)
    ship(app, tmp_path)
    assert found(app) == {"a": "SUCCESS"}


def test_it_is_bounded_or_off(server: Server, tmp_path: Path) -> None:
    app = app_of(server, mpworker_history=100)
    for number in range(500):
        put(app, tmp_path, "n", str(number))
    assert 100 <= server.client().xlen("celery-taskset-meta-mpworker-history") < 300  # Redis cuts whole pieces
    app = app_of(server, mpworker_history=0)
    server.client().flushdb()
    put(app, tmp_path, "n", "a")
    assert found(app) == {}


def test_a_user_who_may_not_use_it_stores_results_all_the_same(server: Server, tmp_path: Path) -> None:
    app = app_of(server)
    rules = ("on", ">x", "+@all", "allchannels", "~celery-task-meta-*", "~mpworker-*")
    server.client().execute_command("ACL", "SETUSER", "few", *rules)
    app.backend.connparams.update(username="few", password="x")
    late = Record(task_id="b", status="SUCCESS", key="celery-task-meta-b", payload="{}", timestamp=timestamp_now())
    Journal(tmp_path, "n").append(late)
    assert ship(app, tmp_path) == Pass(1)
    put(app, tmp_path, "n", "a")
    assert app.backend.scripted
    assert server.client().exists("celery-task-meta-a", "celery-task-meta-b") == 2
    assert not server.client().keys("*history*")


def test_who_asks_in_vain_is_told_why(server: Server) -> None:
    app = app_of(server)
    server.kill()
    with pytest.raises(StoreError, match="the history cannot be read"), history_of(app):
        pass
    with pytest.raises(ConfigurationError, match="keeps a journal"), history_of(Celery(set_as_current=False)):
        pass


def test_the_command(server: Server, tmp_path: Path) -> None:
    app = app_of(server)
    for node, task_id in (("one@here", "a"), ("one@here", "b"), ("two@there", "c")):
        put(app, tmp_path, node, task_id)
    env = {**os.environ, "SHOP_NOTES": str(tmp_path / "notes"), "SHOP_INSTALL": "1"}
    env |= {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results}
    mpworker = [sys.executable, "-m", "mpworker", "-A", "shop"]

    def told(*words: str) -> list[dict[str, Any]]:
        done = subprocess.run([*mpworker, *words], cwd=PROJECTS, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    assert [row["task_id"] for row in told("results", "--cluster", "--worker", "one@*")] == ["a", "b"]
    assert {row["worker"]: row["total_tasks"] for row in told("stats", "--cluster", "--by", "worker")} == {
        "one@here": 2,
        "two@there": 1,
    }
    out, beside = tmp_path / "out", tmp_path / "beside"
    beside.mkdir()
    env["TMPDIR"] = str(beside)
    with (
        out.open("wb") as file,
        subprocess.Popen(
            [*mpworker, "results", "--cluster", "--follow", "--limit", "1"], cwd=PROJECTS, env=env, stdout=file
        ) as process,
    ):
        try:
            eventually(lambda: out.read_text().count("\n") == 1, what="what was there")
            put(app, tmp_path, "two@there", "d")
            eventually(lambda: out.read_text().count("\n") == 2, what="what came")
            assert list(beside.iterdir())
        finally:
            process.terminate()
    assert not list(beside.iterdir())
    assert [json.loads(line)["task_id"] for line in out.read_text().splitlines()] == ["c", "d"]
