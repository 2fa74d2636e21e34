"""Processes that die: what the client hears, what goes on, what is delivered again."""

from __future__ import annotations

import os
import signal

import pytest
from celery.exceptions import WorkerLostError
from integration.node import PATIENCE, ask, eventually, running, send, shop_of
from support import alive

shop = shop_of("-c", "2")


def lost(result):
    with pytest.raises(WorkerLostError) as caught:
        result.get(timeout=PATIENCE)
    assert result.state == "FAILURE"
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "says"), [("exit", "exitcode 7"), ("kill", "signal 9 (SIGKILL)"), ("segv", "signal 11 (SIGSEGV)")]
)
def test_a_worker_that_ends_itself(shop, how, says):
    _, node, _ = shop
    others = [send(shop, "add", n, 1) for n in range(5)]
    result = send(shop, "die", how)
    more = [send(shop, "add", n, 1) for n in range(5)]
    text = lost(result)
    assert f"Worker exited prematurely: {says}: worker process" in text
    assert [other.get(timeout=PATIENCE) for other in others + more] == [1, 2, 3, 4, 5] * 2
    assert [note["exc"] for note in node.notes.wait("failure", id=result.id)] == ["WorkerLostError"]


def test_a_worker_killed_from_outside(shop):
    _, node, _ = shop
    result, innocent = send(shop, "hold", "gate-never"), send(shop, "hold", "gate-innocent")
    (note,) = node.notes.wait("hold", name="gate-never")
    node.notes.wait("hold", name="gate-innocent")
    os.kill(note["pid"], signal.SIGKILL)
    text = lost(result)
    assert str(note["pid"]) in text
    assert "SIGKILL" in text
    assert "out of memory?" in text
    (node.folder / "gate-innocent").touch()
    assert innocent.get(timeout=PATIENCE) == "gate-innocent"
    eventually(lambda: len(node.pids("mpworker: worker")) == 2)


def test_an_idle_worker_killed_from_outside_is_replaced(shop):
    _, node, client = shop
    before = set(node.pids("mpworker: worker"))
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(node.pids("mpworker: worker")) == 2 and victim not in node.pids("mpworker: worker"))
    assert [send(shop, "add", n, 0).get(timeout=PATIENCE) for n in range(4)] == [0, 1, 2, 3]
    eventually(lambda: set(ask(client, node, "stats")["pool"]["processes"]) == set(node.pids("mpworker: worker")))


def test_sys_exit_is_a_failure_of_the_task_and_the_end_of_its_process(shop):
    _, node, _ = shop
    before = set(node.pids("mpworker: worker"))
    result = send(shop, "die", "sysexit")
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - whichever class Celery makes of it
        result.get(timeout=PATIENCE)
    assert "Worker exited prematurely: exitcode 3" in str(caught.value)
    assert result.state == "FAILURE"
    assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
    eventually(lambda: len(now := set(node.pids("mpworker: worker"))) == 2 and len(now - before) == 1)


def test_no_process_runs_another_task_after_sys_exit(shop):
    _, node, _ = shop
    known = len(node.notes.read("die", how="sysexit"))
    exits = [send(shop, "die", "sysexit") for _ in range(8) if send(shop, "add", 1, 1)]
    for result in exits:
        with pytest.raises(BaseException, match="exitcode 3"):
            result.get(timeout=PATIENCE)
    notes = node.notes.read("die", how="sysexit")[known:]
    assert len({note["pid"] for note in notes}) == len(notes) == 8


def test_a_message_that_shall_survive_its_worker_is_delivered_once_more(shop):
    server, node, _ = shop
    result = send(shop, "once_more", "again")
    assert result.get(timeout=PATIENCE) == "second"
    assert len(node.notes.read("once_more", name="again")) == 2
    eventually(lambda: server.client().hlen("unacked") == 0)


def test_a_dispatcher_killed_under_load(shop):
    _, node, _ = shop
    held = [send(shop, "hold", f"gate-dispatcher-{n}") for n in range(2)]
    for n in range(2):
        node.notes.wait("hold", name=f"gate-dispatcher-{n}")
    waiting = [send(shop, "add", n, n) for n in range(30)]
    workers = node.pids("mpworker: worker")
    (dispatcher,) = eventually(lambda: node.pids("mpworker: dispatcher"))
    os.kill(dispatcher, signal.SIGKILL)
    for result in held:
        assert "dispatcher" in lost(result)
    assert [result.get(timeout=PATIENCE) for result in waiting] == [2 * n for n in range(30)]
    assert not any(alive(pid) for pid in workers)
    eventually(lambda: len(node.pids("mpworker: worker")) == 2)
    assert node.pids("mpworker: dispatcher") not in ([], [dispatcher])


def test_a_dispatcher_killed_while_idle(shop):
    _, node, _ = shop
    (dispatcher,) = eventually(lambda: node.pids("mpworker: dispatcher"))
    os.kill(dispatcher, signal.SIGKILL)
    assert send(shop, "add", 20, 22).get(timeout=PATIENCE) == 42
    assert node.pids("mpworker: dispatcher") not in ([], [dispatcher])


def test_a_killed_template_is_replaced(shop):
    _, node, _ = shop
    eventually(lambda: len(node.pids("mpworker: worker")) == 2)
    template = node.the_one("mpworker: template")
    os.kill(template, signal.SIGKILL)
    victim = node.pids("mpworker: worker")[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: len(node.pids("mpworker: worker")) == 2 and victim not in node.pids("mpworker: worker"))
    assert send(shop, "add", 1, 2).get(timeout=PATIENCE) == 3
    eventually(lambda: node.pids("mpworker: template") not in ([], [template]))


def test_a_killed_callback_process_is_replaced(shop):
    _, node, client = shop
    client.send_task("shop.hooks.hooked", args=("return", "before the kill"))
    node.notes.wait("callback", of="before the kill")
    (callbacks,) = node.pids("mpworker: callbacks")
    os.kill(callbacks, signal.SIGKILL)
    client.send_task("shop.hooks.hooked", args=("return", "after the kill"))
    (note,) = node.notes.wait("callback", of="after the kill")
    assert note["pid"] != callbacks
    assert send(shop, "add", 1, 2).get(timeout=PATIENCE) == 3


def test_replacements_that_cannot_start_harm_no_running_task(tmp_path):
    """They die five times in a row and more; what runs goes on, and the node recovers when they can start again."""
    config = {"include": ["shop.tasks", "shop.hooks", "shop.signals", "shop.odd"]}
    with running(tmp_path, "-c", "2", config=config) as (_, node, client):
        held = client.send_task("shop.tasks.hold", args=("gate",))
        (note,) = node.notes.wait("hold", name="gate")
        (node.folder / "no-more-workers").touch()
        (idle,) = [pid for pid in node.pids("mpworker: worker") if pid != note["pid"]]
        os.kill(idle, signal.SIGKILL)
        node.await_log("5 workers in a row died before they were ready")
        (node.folder / "gate").touch()
        assert held.get(timeout=PATIENCE) == "gate"
        (node.folder / "no-more-workers").unlink()
        eventually(lambda: len(node.pids("mpworker: worker")) == 2)
        assert client.send_task("shop.tasks.add", args=(1, 2)).get(timeout=PATIENCE) == 3
