"""A consumer that is connected and deaf: it is noticed, restarted, and at last given up; and nobody else is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from integration.node import PATIENCE, Node, ask, eventually, running
from integration.test_filesystem_broker import Files

from mpworker.celery.stalls import EX_STALLED

DEAF = {"app": "deaf", "config": {"include": ["shop.tasks", "deaf"]}}
TIMEOUT = {"MPWORKER_STALL_TIMEOUT": "1"}


def seen(client: Any, node: Node) -> dict[str, Any]:
    return ask(client, node, "stats")["mpworker"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with running(tmp_path_factory.mktemp("shop"), "-c", "2", env=TIMEOUT, **DEAF) as shop:
        yield shop


def test_a_consumer_that_hangs_in_a_system_call(shop: Any) -> None:
    _, node, client = shop
    (node.folder / "hang-once").touch()
    node.notes.wait("hang-once")
    assert client.send_task("shop.tasks.add", args=(20, 22)).get(timeout=PATIENCE) == 42
    assert "nothing was delivered for 1 s: the consumer is restarted" in node.log()
    assert seen(client, node)["stalls"] == 1


def test_a_deaf_consumer_is_restarted_and_no_task_runs_twice(shop: Any) -> None:
    server, node, client = shop
    held = client.send_task("deaf.late_hold", args=("gate",))
    node.notes.wait("hold", name="gate")
    (node.folder / "deaf-once").touch()
    node.notes.wait("deaf-once")
    waiting = client.send_task("shop.tasks.add", args=(1, 2))
    node.await_log("is restarted, when the tasks that are to be acknowledged late have ended")
    assert seen(client, node)["stalls"] == 2
    assert not waiting.ready()
    assert "StallError" not in node.log()
    (node.folder / "gate").touch()
    assert waiting.get(timeout=PATIENCE) == 3
    assert held.get(timeout=PATIENCE) == "gate"
    eventually(lambda: not server.client().exists("unacked", "celery"))
    assert len(node.notes.read("hold", name="gate")) == 1
    assert sorted(map(str, node.pids("mpworker: worker"))) == sorted(
        map(str, ask(client, node, "stats")["pool"]["processes"])
    )


def test_a_node_that_stays_deaf_ends(shop: Any) -> None:
    server, node, client = shop
    (node.folder / "deaf").touch()
    node.notes.wait("deaf")
    client.send_task("shop.tasks.add", args=(1, 2))
    assert node.wait() == EX_STALLED
    log = node.log()
    assert log.count("is restarted") == 3
    assert log.count("restarting the consumer did not help: this node ends") == 1
    node.await_gone()
    assert server.client().llen("celery") == 1


def test_without_an_event_loop_and_without_false_alarms(tmp_path: Any) -> None:
    files = Files(tmp_path / "broker")
    node = files.node(tmp_path / "node", "-c", "2", include=["shop.tasks", "deaf"])
    node.app, node.command[node.command.index("-A") + 1] = "deaf", "deaf"
    node.env |= TIMEOUT
    with node:
        # For two timeouts all slots are busy and messages wait.
        busy = [files.send("nap", 2, name) for name in "ab"]
        more = [files.send("add", n, 0) for n in range(20)]
        assert [result.get(timeout=PATIENCE) for result in [*busy, *more]] == ["a", "b", *range(20)]

        (node.folder / "deaf-once").touch()
        node.notes.wait("deaf-once")
        assert "is restarted" not in node.log()
        assert files.send("add", 20, 22).get(timeout=PATIENCE) == 42
        assert node.log().count("is restarted") == 1

        # For two timeouts a slot is free and messages wait, but those that were delivered may not run yet.
        last = files.send("nap", 2, "c")
        for n in range(20):
            files.send("deaf.limited", n)
        node.notes.wait("limited")
        assert last.get(timeout=PATIENCE) == "c"
        assert any(files.queue.glob("*celery.msg"))
        assert node.log().count("is restarted") == 1
    files.app.close()
