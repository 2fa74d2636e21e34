"""What a node of Celery's offers besides running tasks, and what projects rely on: each clause once, with our pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from integration.node import (
    PATIENCE,
    Node,
    Server,
    ask,
    await_subscribed,
    client_of,
    control,
    eventually,
    running,
    send,
    shop_of,
)

#: Nothing is fetched before there is room for it.
ONE = {"worker_prefetch_multiplier": 1}


shop = shop_of("-c", "1")


def gated(shop, name):
    """A task that runs until ``open_gate``."""
    held = send(shop, "hold", name)
    shop[1].notes.wait("hold", name=name)
    return held


def open_gate(shop, name):
    (shop[1].folder / name).touch()


# -- what runs, and when ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGABRT", "SIGUSR2", "SIGKILL", "SIGALRM"])
def test_terminating_with_each_signal(shop, name):
    _, node, client = shop
    doomed = send(shop, "nap", 60, name)
    node.notes.wait("nap", name=name)
    client.control.revoke(doomed.id, terminate=True, signal=name, reply=True, timeout=PATIENCE, limit=1)
    with pytest.raises(TaskRevokedError):
        doomed.get(timeout=PATIENCE)
    assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
    assert doomed.state == "REVOKED"


def test_what_has_expired_while_it_waited_never_runs(shop):
    held = gated(shop, "gate-expiry")
    late, sent = send(shop, "nap", 0, "expired", expires=0.2), time.monotonic()
    eventually(lambda: time.monotonic() > sent + 0.3, what="it is too late")
    open_gate(shop, "gate-expiry")
    assert held.get(timeout=PATIENCE) == "gate-expiry"
    with pytest.raises(TaskRevokedError):
        late.get(timeout=PATIENCE)
    assert shop[1].notes.read("nap", name="expired") == []


def test_a_countdown_is_waited_for_and_seen(shop):
    later = send(shop, "add", 2, 2, countdown=3600)
    eventually(lambda: [entry["request"]["id"] for entry in ask(shop[2], shop[1], "scheduled")] == [later.id])
    assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
    shop[2].control.revoke(later.id, reply=True, timeout=PATIENCE, limit=1)
    assert send(shop, "add", 2, 1, countdown=0.2).get(timeout=PATIENCE) == 3


def test_a_rate_limit_holds_tasks_back(tmp_path):
    with running(tmp_path, "-c", "1") as shop:
        _, node, client = shop
        assert "ok" in control(client, node, "rate_limit", task_name="shop.tasks.nap", rate_limit="1/h")
        limited = [send(shop, "nap", 0, f"limited-{number}") for number in range(3)]
        assert limited[0].get(timeout=PATIENCE)
        assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
        assert [result.state for result in limited[1:]] == ["PENDING", "PENDING"]
        assert "ok" in control(client, node, "rate_limit", task_name="shop.tasks.nap", rate_limit="0")
        assert send(shop, "nap", 0, "free").get(timeout=PATIENCE) == "free"


def test_queues_come_and_go(shop):
    _, node, client = shop
    assert "ok" in control(client, node, "add_consumer", queue="annex")
    eventually(lambda: {queue["name"] for queue in ask(client, node, "active_queues")} == {"celery", "annex"})
    assert send(shop, "add", 3, 4, queue="annex").get(timeout=PATIENCE) == 7
    assert "ok" in control(client, node, "cancel_consumer", queue="annex")
    waits = send(shop, "add", 4, 4, queue="annex")
    assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
    assert waits.state == "PENDING"


def test_events_are_sent_while_somebody_asks_for_them(shop):
    _, node, client = shop
    seen = []
    assert "ok" in control(client, node, "enable_events")
    with client.connection() as connection:
        receiver = client.events.Receiver(connection, handlers={"*": seen.append})
        with receiver.consumer_context() as (live, _, _):
            while not seen:  # a heartbeat: from here on it hears everything
                live.drain_events(timeout=PATIENCE)
            result, until = send(shop, "add", 5, 5), time.monotonic() + PATIENCE
            wanted = {"task-received", "task-started", "task-succeeded"}
            while wanted - {event["type"] for event in seen if event.get("uuid") == result.id}:
                assert time.monotonic() < until, seen
                live.drain_events(timeout=PATIENCE)
    assert "ok" in control(client, node, "disable_events")
    (received,) = [event for event in seen if (event["type"], event.get("uuid")) == ("task-received", result.id)]
    assert received["hostname"] == node.name


def test_every_question_has_an_answer(shop):
    _, node, client = shop
    for question in ("ping", "stats", "conf", "registered", "active", "reserved", "scheduled", "revoked", "report"):
        assert ask(client, node, question) is not None
    assert ask(client, node, "query_task", ["nobody"]) == {}
    assert ask(client, node, "clock")["clock"] > 0


def test_what_is_more_urgent_comes_first(tmp_path):
    transport = {"queue_order_strategy": "priority", "priority_steps": [0, 3, 6, 9]}
    config = {**ONE, "broker_transport_options": transport}
    with running(tmp_path, "-c", "1", config=config) as (server, node, _):
        with client_of(server, broker_transport_options=transport) as client:
            shop = server, node, client
            held = gated(shop, "gate-order")
            first = send(shop, "nap", 0, "fetched before", priority=9)
            eventually(lambda: first.id in str(ask(client, node, "reserved")))
            later = [
                send(shop, "nap", 0, f"{priority}-{n}", priority=priority) for priority in (9, 3, 0) for n in (1, 2)
            ]
            open_gate(shop, "gate-order")
            for result in (held, first, *later):
                result.get(timeout=PATIENCE)
            names = [note["name"] for note in node.notes.read("nap")]
            assert names == ["fetched before", "0-1", "0-2", "3-1", "3-2", "9-1", "9-2"]


# -- options of the command line --------------------------------------------------------------------------------------


def test_the_autoscaler_can_be_told(tmp_path):
    with running(tmp_path, "--autoscale=2,1", config=ONE) as (_, node, client):
        assert "autoscale now" in control(client, node, "autoscale", max=3, min=2)["ok"]
        eventually(lambda: len(node.pids("mpworker: worker")) >= 2, what="there are as many as at least wanted")


@pytest.mark.parametrize("options", [("-O", "fair"), ("--disable-prefetch",)], ids="".join)
def test_nothing_is_fetched_that_could_run_elsewhere(options, tmp_path):
    config = {"task_acks_late": True, **ONE}
    with running(tmp_path, "-c", "2", *options, config=config) as shop:
        held = gated(shop, "gate-fair")
        results = [send(shop, "add", number, 1) for number in range(10)]
        assert [result.get(timeout=PATIENCE) for result in results] == [number + 1 for number in range(10)]
        open_gate(shop, "gate-fair")
        assert held.get(timeout=PATIENCE) == "gate-fair"


def test_revocations_outlive_a_node_with_a_state_file(tmp_path):
    state = f"--statedb={tmp_path / 'state'}"
    with running(tmp_path / "one", "-c", "1", state) as (server, node, client):
        await_subscribed(client, node)
        client.control.revoke("not-today", reply=True, timeout=PATIENCE, limit=1)
        assert node.stop() == 0
        env = {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results}
        with Node(tmp_path / "two", "-c", "1", state, env=env) as second:
            assert ask(client, second, "revoked") == ["not-today"]
            shop = server, second, client
            with pytest.raises(TaskRevokedError):
                send(shop, "nap", 0, "revoked", task_id="not-today").get(timeout=PATIENCE)


def test_beat_in_the_node(tmp_path):
    schedule = {"often": {"task": "shop.tasks.nap", "schedule": 0.2, "args": [0, "from beat"]}}
    options = ("-B", "--schedule", str(tmp_path / "beat"))
    with running(tmp_path / "node", "-c", "1", *options, config={"beat_schedule": schedule}) as (_, node, _):
        node.notes.wait("nap", 2, name="from beat")
        assert node.stop() == 0
        node.await_gone()


# -- in the background ------------------------------------------------------------------------------------------------


@pytest.fixture
def background(tmp_path):
    """A server, a client, and a node that is not started: its folder and environment serve other commands."""
    with Server() as server, client_of(server) as client:
        node = Node(tmp_path / "node", env={"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results})
        try:
            yield node, client
        finally:
            node.kill()


def celery(node: Node, *words: str) -> str:
    command = [sys.executable, "-m", "celery", "-A", "shop", *words]
    done = subprocess.run(
        command, cwd=node.cwd, env=node.env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def works(client: Celery) -> bool:
    return client.send_task("shop.tasks.add", args=(1, 1)).get(timeout=PATIENCE) == 2


def test_a_detached_node(background):
    node, client = background
    files = [f"--pidfile={node.folder / 'pid'}", f"--logfile={node.log_path}"]
    celery(node, "worker", "--detach", "-c", "1", "-l", "INFO", *files)
    assert works(client)
    pid = int(eventually(lambda: Path(node.folder / "pid").exists() and (node.folder / "pid").read_text()))
    assert any(title.startswith("mpworker: worker") for title in node.processes().values())
    os.kill(pid, signal.SIGTERM)
    node.await_gone()
    assert not (node.folder / "pid").exists()


def test_celery_multi(background):
    node, client = background
    files = [f"--pidfile={node.folder}/%n.pid", f"--logfile={node.folder}/%n%I.log"]
    celery(node, "multi", "start", "2", "-c", "1", "-l", "INFO", *files)
    assert works(client)
    eventually(lambda: len(list(node.folder.glob("*.pid"))) == 2, what="two nodes run")
    celery(node, "multi", "stopwait", "2", *files)
    node.await_gone()
