"""``revoke``: of a task that waits, of one that runs, and of one whose worker has gone on to the next."""

from __future__ import annotations

import signal
import time

import pytest
from celery.exceptions import TaskRevokedError
from integration.node import PATIENCE, ask, eventually, running, send, shop_of

shop = shop_of("-c", "1")


def revoked(result):
    with pytest.raises(TaskRevokedError):
        result.get(timeout=PATIENCE)
    assert result.state == "REVOKED"


def test_a_waiting_task_never_runs(shop):
    _, node, client = shop
    running_one = send(shop, "hold", "gate-waiting")
    node.notes.wait("hold", name="gate-waiting")
    waiting, next_one = send(shop, "nap", 0, "revoked while waiting"), send(shop, "add", 1, 2)
    eventually(lambda: waiting.id in str(ask(client, node, "reserved")))
    client.control.revoke(waiting.id, reply=True, timeout=PATIENCE, limit=1)
    (node.folder / "gate-waiting").touch()
    assert running_one.get(timeout=PATIENCE) == "gate-waiting"
    assert next_one.get(timeout=PATIENCE) == 3
    revoked(waiting)
    assert node.notes.read("nap", name="revoked while waiting") == []


@pytest.mark.parametrize("signame", ["SIGTERM", "SIGKILL", "SIGINT", "SIGQUIT"])
def test_a_running_task_is_ended_and_stays_revoked(shop, signame):
    _, node, client = shop
    doomed = send(shop, "nap", 60, f"doomed {signame}")
    node.notes.wait("nap", name=f"doomed {signame}")
    (pid,) = node.pids("mpworker: worker")
    next_one = send(shop, "describe")
    client.control.revoke(doomed.id, terminate=True, signal=signame, reply=True, timeout=PATIENCE, limit=1)
    revoked(doomed)
    assert next_one.get(timeout=PATIENCE)["pid"] != pid
    node.notes.wait("revoked", id=doomed.id, terminated=True)
    # What follows from the worker's end may not overwrite it.
    assert send(shop, "add", 2, 2).get(timeout=PATIENCE) == 4
    assert doomed.state == "REVOKED"
    assert node.notes.read("failure", id=doomed.id) == []
    assert node.notes.read("awake", name=f"doomed {signame}") == []
    assert f"[{doomed.id}] raised unexpected" not in node.log()


def test_terminating_a_finished_task_leaves_the_next_one_alone(shop):
    _, node, client = shop
    done = send(shop, "add", 1, 1)
    assert done.get(timeout=PATIENCE) == 2
    current = send(shop, "hold", "gate-next")
    node.notes.wait("hold", name="gate-next")
    client.control.revoke(done.id, terminate=True, signal="SIGKILL", reply=True, timeout=PATIENCE, limit=1)
    (node.folder / "gate-next").touch()
    assert current.get(timeout=PATIENCE) == "gate-next"
    assert done.state == "SUCCESS"


def test_tasks_that_follow_each_other_closely_are_never_hit(shop):
    """Terminates tasks at about the moment they end; every other one must succeed."""
    _, node, client = shop
    short = [send(shop, "nap", 0.03, "short") for _ in range(20)]
    for doomed in short[::2]:
        node.notes.wait("prerun", id=doomed.id)
        time.sleep(0.02)  # the pace of the attack, not of the test: whichever comes first is right
        client.control.revoke(doomed.id, terminate=True, signal="SIGTERM")
    assert [result.get(timeout=PATIENCE) for result in short[1::2]] == ["short"] * 10
    for doomed in short[::2]:
        eventually(lambda result=doomed: result.state in ("SUCCESS", "REVOKED"))


def test_a_revoked_task_that_is_sent_later(shop):
    _, node, client = shop
    client.control.revoke("a-known-id", reply=True, timeout=PATIENCE, limit=1)
    revoked(send(shop, "nap", 0, "after its revocation", task_id="a-known-id"))
    assert node.notes.read("nap", name="after its revocation") == []


def test_terminating_a_task_of_late_acks_settles_its_message(tmp_path):
    config = {"task_acks_late": True, "worker_prefetch_multiplier": 1}
    with running(tmp_path, "-c", "1", config=config) as shop:
        server, node, client = shop
        doomed = send(shop, "nap", 60, "late")
        node.notes.wait("nap", name="late")
        client.control.revoke(doomed.id, terminate=True, reply=True, timeout=PATIENCE, limit=1)
        revoked(doomed)
        assert send(shop, "add", 1, 1).get(timeout=PATIENCE) == 2
        eventually(lambda: server.client().hlen("unacked") == 0)
        assert node.stop() == 0
        assert server.client().llen("celery") == 0


def test_the_soft_limits_signal_ends_no_process(shop):
    """SIGUSR1 is how Celery's users raise ``SoftTimeLimitExceeded`` by hand."""
    _, node, client = shop
    careful = send(shop, "careful", 60)
    node.notes.wait("prerun", id=careful.id)
    (pid,) = node.pids("mpworker: worker")
    client.control.revoke(careful.id, terminate=True, signal=signal.SIGUSR1.name, reply=True, timeout=PATIENCE, limit=1)
    node.notes.wait("postrun", id=careful.id)
    assert node.pids("mpworker: worker") == [pid]
