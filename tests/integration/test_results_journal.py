"""The journal before Redis, on a running node: what is in it, also for tasks whose process did not live to tell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime

import pytest
from celery import chord
from celery.exceptions import ChordError
from integration.node import PATIENCE, Node, Server, ask, client_of, eventually, running

from mpworker import ResultStore

FIELDS = {
    "task_id", "name", "status", "message", "result", "traceback", "timestamp", "runtime", "process_id", "hostname",
    "retries", "key", "payload", "expires",
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    config = {"task_track_started": True, "result_expires": 3600}
    with running(tmp_path_factory.mktemp("shop"), "-c", "2", config=config) as (server, node, client):
        yield server, node, client


def send(shop, name, *args, **options):
    return shop[2].send_task(f"shop.tasks.{name}", args=args, **options)


def journal(node):
    """Every line, as JSON: none may be torn."""
    return [
        json.loads(line) for path in sorted(node.journal.rglob("*.jsonl")) for line in path.read_bytes().splitlines()
    ]


def lines_of(node, result):
    return [line for line in journal(node) if line["task_id"] == result.id]


def ended(result):
    eventually(lambda: result.state in ("SUCCESS", "FAILURE", "REVOKED"))


def test_one_line_for_each_change_of_state(shop):
    server, node, _ = shop
    result = send(shop, "flaky", 1)
    assert result.get(timeout=PATIENCE) == 1
    # Redis tells its subscribers before the line can be marked; the first run may say last that it is to be retried.
    eventually(lambda: [line["shipped"] in (1, 2) for line in lines_of(node, result)] == [True] * 4)
    # By run: the second may begin before the first has said that it is to be retried.
    lines = sorted(lines_of(node, result), key=lambda line: line["retries"])
    assert [line["status"] for line in lines] == ["STARTED", "RETRY", "STARTED", "SUCCESS"]
    for line in lines:
        assert set(line) >= FIELDS
        assert line["shipped"] == 1 or (line["shipped"], line["status"]) == (2, "RETRY")  # said after the SUCCESS
        assert (line["name"], line["hostname"]) == ("shop.tasks.flaky", node.name)
        assert line["process_id"] in node.pids("mpworker: worker")
        assert datetime.fromisoformat(line["timestamp"]).utcoffset().total_seconds() == 0
        assert line["expires"] == 3600
    last = lines[-1]
    assert (last["result"], last["retries"], last["traceback"]) == (1, 1, None)
    assert 0 <= last["runtime"] < 30
    assert 0 <= last["queued"] < 30
    assert server.client().get(last["key"]) == last["payload"]
    assert "OSError: try 0" in lines[1]["message"]


def test_the_files_are_private(shop):
    _, node, _ = shop
    send(shop, "add", 1, 1).get(timeout=PATIENCE)
    assert node.journal.stat().st_mode & 0o077 == 0
    for path in node.journal.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_failure(shop):
    _, node, _ = shop
    result = send(shop, "fail", "no tea")
    ended(result)
    last = lines_of(node, result)[-1]
    assert (last["status"], last["message"]) == ("FAILURE", "ValueError: no tea")
    assert "raise ValueError(text)" in last["traceback"]


def test_a_hard_limit_is_in_the_journal(shop):
    _, node, _ = shop
    result = send(shop, "nap", 60, time_limit=0.5)
    ended(result)
    last = lines_of(node, result)[-1]
    assert (last["status"], last["name"], last["hostname"]) == ("FAILURE", "shop.tasks.nap", node.name)
    assert "TimeLimitExceeded" in last["message"]
    assert last["process_id"] == node.pid  # who wrote it: the main process
    eventually(lambda: lines_of(node, result)[-1]["shipped"] == 1)


def test_a_lost_worker_is_in_the_journal(shop):
    _, node, _ = shop
    result = send(shop, "die", "kill")
    ended(result)
    last = lines_of(node, result)[-1]
    assert (last["status"], last["process_id"]) == ("FAILURE", node.pid)
    assert "SIGKILL" in last["message"]


def test_a_revoked_task_is_in_the_journal(shop):
    _, node, client = shop
    result = send(shop, "nap", 60, "to be revoked")
    node.notes.wait("nap", name="to be revoked")
    client.control.revoke(result.id, terminate=True, reply=True, timeout=PATIENCE, limit=1)
    ended(result)
    assert lines_of(node, result)[-1]["status"] == "REVOKED"


def test_the_store_counts_what_the_journal_holds(shop):
    _, node, _ = shop
    before = ResultStore(node.journal).get_statistics()
    good = [send(shop, "add", n, n) for n in range(8)]
    bad = [send(shop, "fail", "counted") for _ in range(2)]
    for result in good + bad:
        ended(result)
    store = ResultStore(node.journal)
    after = store.get_statistics()
    assert after["total_tasks"] - before["total_tasks"] == 10
    assert after["completed"] - before["completed"] == 8
    assert after["failed"] - before["failed"] == 2
    assert after["success_rate"] == pytest.approx(
        100 * after["completed"] / (after["completed"] + after["failed"]), abs=0.1
    ) or (
        after["success_rate"] == pytest.approx(after["completed"] / (after["completed"] + after["failed"]), abs=0.001)
    )
    assert {record["task_id"] for record in store.get_results_by_status("FAILURE")} >= {result.id for result in bad}
    assert {record["task_id"] for record in store.query(status="SUCCESS", name="shop.tasks.add")} >= {
        r.id for r in good
    }


def test_redis_killed_in_the_middle(tmp_path):
    """The results' server dies while tasks run; their broker lives."""
    with Server() as results:
        env = {"SHOP_RESULTS": results.results}
        with running(tmp_path, "-c", "2", env=env) as (server, node, client):
            parts = [client.signature("shop.tasks.hold", args=(f"gate-{n}",)) for n in range(2)]
            held = chord(parts, app=client)(client.signature("shop.tasks.total")).parent.results
            for n in range(2):
                node.notes.wait("hold", name=f"gate-{n}")
            waiting = [client.send_task("shop.tasks.add", args=(n, n)) for n in range(10)]
            results.kill()
            for n in range(2):
                (node.folder / f"gate-{n}").touch()
            ids = {result.id for result in held + waiting}
            eventually(lambda: ids <= {line["task_id"] for line in journal(node)})
            node.await_log("marked as not shipped")
            node.await_log("will be counted as a part of chord")
            lines = [line for line in journal(node) if line["task_id"] in ids]
            assert {line["status"] for line in lines} == {"SUCCESS"}
            assert {line["shipped"] for line in lines} == {0}
            eventually(lambda: len(node.notes.read("success")) == 12)
            assert ask(client, node, "stats")["total"]["shop.tasks.add"] == 10
            results.forget()
            results.start()
            with client_of(server, result_backend=results.results) as watcher:
                found = [watcher.AsyncResult(result.id) for result in waiting]
                assert [result.get(timeout=PATIENCE) for result in found] == [2 * n for n in range(10)]
                eventually(lambda: {line["shipped"] for line in journal(node)} == {1}, what="all is shipped")
                assert {watcher.AsyncResult(result.id).status for result in held} == {"SUCCESS"}
            assert ResultStore(node.journal).get_statistics()["failed"] == 0


@pytest.mark.parametrize("last", ["hold", "fail"])
def test_a_chord_whose_parts_end_while_redis_takes_nothing(tmp_path, last):
    with Server() as results, Server() as broker:
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results.results}
        with (
            client_of(broker, result_backend=results.results) as client,
            Node(tmp_path, "-c", "2", env=env) as node,
        ):
            parts = [
                client.signature("shop.tasks.hold", args=("gate",)),
                client.signature("shop.tasks.nap", args=(0, "x")),
            ]
            if last == "fail":
                parts[1] = client.signature("shop.tasks.fail", args=("no",))
            body = chord(parts, app=client)(client.signature("shop.tasks.give_back"))
            node.notes.wait("hold", name="gate")
            eventually(lambda: len(lines_of(node, body.parent.results[1])) == 1)
            results.client().config_set("maxmemory", 1)
            (node.folder / "gate").touch()
            node.await_log("will be counted as a part of chord")
            assert body.status == "PENDING"
            results.client().config_set("maxmemory", 0)
            if last == "fail":
                eventually(lambda: client.AsyncResult(body.id).status == "FAILURE")
                assert isinstance(client.AsyncResult(body.id).result, ChordError)
            else:
                assert body.get(timeout=PATIENCE) == ["gate", "x"]
            eventually(lambda: {line["shipped"] for line in journal(node)} == {1}, what="all is shipped")
            counts = ResultStore(node.journal).get_statistics()
            assert counts["total_tasks"] == 3 if last == "hold" else 2 <= counts["total_tasks"] <= 3


def test_what_a_node_leaves_is_brought_by_the_next_one_or_by_hand(tmp_path):
    with Server() as results, Server() as broker:
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results.results}
        with client_of(broker, result_backend=results.results) as client:
            left = []
            for way in ("killed", "stopped"):
                with Node(tmp_path / way, "-c", "1", env=env) as node:
                    held = client.send_task("shop.tasks.hold", args=("gate",))
                    node.notes.wait("hold", name="gate")
                    eventually(lambda node=node: node.pids("mpworker: shipper"))
                    results.kill()
                    (node.folder / "gate").touch()
                    eventually(lambda node=node, held=held: lines_of(node, held))
                    node.await_log("results wait in the journal")
                    if way == "killed":
                        node.signal(signal.SIGKILL)
                        node.wait()
                    else:
                        assert node.stop() == 0
                results.start()
                assert held.status == "PENDING"
                left.append((node, held))
            (killed, first), (_, second) = left
            command = [sys.executable, "-m", "mpworker", "-A", "shop", "results", "ship", "--path"]
            done = subprocess.run(
                [*command, str(killed.journal)], env=killed.env, cwd=killed.cwd, text=True, capture_output=True
            )
            assert (done.returncode, done.stdout) == (0, f"1 record delivered from {killed.journal}\n")
            assert first.get(timeout=PATIENCE) == "gate"
            again = subprocess.run(
                [*command, str(killed.journal)], env=killed.env, cwd=killed.cwd, text=True, capture_output=True
            )
            assert (again.returncode, again.stdout) == (0, f"nothing to deliver in {killed.journal}\n")
            with Node(tmp_path / "stopped", "-c", "1", env=env):
                assert second.get(timeout=PATIENCE) == "gate"


def test_lines_of_many_processes_stay_whole(shop):
    _, node, _ = shop
    results = [send(shop, "big", 50_000 + n) for n in range(30)]
    for result in results:
        ended(result)
    found = {
        line["task_id"]: len(line["result"])
        for line in journal(node)
        if line["name"] == "shop.tasks.big" and line["result"]
    }
    assert [found[result.id] for result in results] == [50_000 + n for n in range(30)]
