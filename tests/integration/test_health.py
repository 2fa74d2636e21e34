"""``mpworker health``: what is well and what is not, from the outside."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from integration.node import PATIENCE, Node, Server, client_of, eventually

from mpworker.results.journal import Journal
from mpworker.results.record import Record

Parts = tuple[Server, Server, Node, Celery]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = tmp_path_factory.mktemp("health")
    with Server() as broker, Server() as results:
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results.results}
        with client_of(broker, result_backend=results.results) as client, Node(folder, "-c", "2", env=env) as node:
            yield broker, results, node, client


def ask(node: Node, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mpworker", "-A", "shop", "health", *options]
    return subprocess.run(command, env={**node.env, **env}, cwd=node.cwd, text=True, capture_output=True)


def health(node: Node, path: Path | None = None) -> tuple[int, dict[str, str]]:
    """The exit code, and what is said of each part."""
    done = ask(node, "--path", str(path or node.journal))
    assert not done.stderr, done.stderr
    found = re.findall(r"^(ok|BAD) +([a-z]+) +(.*)$", done.stdout, re.MULTILINE)
    return done.returncode, {f"{verdict} {about}": text for verdict, about, text in found}


def test_all_is_well(parts: Parts) -> None:
    _, _, node, client = parts
    assert [client.send_task("shop.tasks.add", args=(n, 1)).get(timeout=PATIENCE) for n in range(3)] == [1, 2, 3]
    eventually(lambda: health(node)[1].get("ok journal", "").endswith("all is in Redis"))
    code, found = health(node)
    assert code == 0
    assert set(found) == {"ok broker", "ok results", "ok journal", "ok disk", "ok node"}
    assert found["ok node"] == f"{node.name}: 2 processes, 3 tasks taken"
    assert "MiB are free" in found["ok disk"]


def test_results_that_wait_for_long_are_no_good_sign(parts: Parts) -> None:
    _, results, node, _ = parts
    results.kill()
    try:
        long_ago = (datetime.now(UTC) - timedelta(minutes=5)).isoformat(timespec="microseconds")
        journal = Journal(node.journal, "another")
        for task_id, stamp in (("a", long_ago), ("b", None)):
            stamped: dict[str, Any] = {"timestamp": stamp} if stamp else {}
            journal.append(Record(task_id=task_id, status="SUCCESS", key=f"k{task_id}", payload="{}", **stamped))
        with journal.path().open("ab") as file:
            file.write(b"nonsense\n")
        code, found = health(node)
        assert code == 1
        assert "does not answer" in found["BAD results"]
        assert re.search(r": 2 results wait for Redis, the first for 3\d\d s; 1 broken lines", found["BAD journal"])
    finally:
        results.start()
    eventually(lambda: health(node)[0] == 0)
    eventually(lambda: "1 broken lines passed over" in health(node)[1]["ok node"], what="the node has counted it")
    node.await_log("1 broken lines in")


def test_what_could_not_be_journaled_is_counted(parts: Parts) -> None:
    _, _, node, client = parts
    away = node.journal.with_name("away")
    node.journal.rename(away)
    node.journal.write_text("not a folder")
    try:

        def counted() -> bool:
            assert client.send_task("shop.tasks.add", args=(1, 1)).get(timeout=PATIENCE) == 2
            return "results in Redis only" in health(node, away)[1].get("ok node", "")

        eventually(counted)
        node.await_log("goes to Redis only")
    finally:
        node.journal.unlink()
        away.rename(node.journal)


def test_nobody_answers(parts: Parts, tmp_path: Path) -> None:
    _, _, node, _ = parts
    options = "--path", str(tmp_path / "none"), "--timeout", "0.3"
    with Server() as other:
        done = ask(node, *options, SHOP_BROKER=other.broker)
        assert done.returncode == 1
        assert "BAD nodes    none has answered within 0.3 s" in done.stdout
        assert "is not there; a node makes it" in done.stdout
        other.kill()
        done = ask(node, *options, SHOP_BROKER=other.broker)
        assert (done.returncode, done.stderr) == (1, "")
        assert "BAD broker" in done.stdout
    done = ask(node, "--timeout", "-1")
    assert done.returncode == 2
    assert "--timeout must be more than 0" in done.stderr
