"""Limits of time, tasks, memory and size, as users give them: by option, call, command line, remote control."""

from __future__ import annotations

import time

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from integration.node import PATIENCE, ask, control, eventually, running, send, shop_of

#: Seconds: a hard limit takes effect within one second; the rest is this machine's slowness.
SLACK = 1.0


shop = shop_of("-c", "2")


def started(node, result):
    node.notes.wait("prerun", id=result.id)
    return time.monotonic()


def fails_with(result, error):
    with pytest.raises(error) as caught:
        result.get(timeout=PATIENCE)
    assert result.state == "FAILURE"
    return caught.value


def test_a_soft_limit_can_be_caught(shop):
    begun = time.monotonic()
    assert send(shop, "careful", 60, soft_time_limit=0.4).get(timeout=PATIENCE) == "cleaned up"
    assert time.monotonic() - begun < 30
    assert send(shop, "careful", 0, soft_time_limit=30).get(timeout=PATIENCE) == "in time"


def test_a_soft_limit_from_the_option_of_a_task(shop):
    result = send(shop, "soft_by_option")
    fails_with(result, SoftTimeLimitExceeded)
    assert "time.sleep(60)" in result.traceback
    shop[1].await_log(f"Soft time limit (0.4s) exceeded for shop.tasks.soft_by_option[{result.id}]")


def test_a_hard_limit_from_the_option_of_a_task(shop):
    _, node, _ = shop
    result = send(shop, "hard_by_option")
    begun = started(node, result)
    error = fails_with(result, TimeLimitExceeded)
    assert 0.3 < time.monotonic() - begun < 0.6 + SLACK + 0.5
    assert "0.6" in str(error)
    node.await_log(f"Hard time limit (0.6s) exceeded for shop.tasks.hard_by_option[{result.id}]")
    assert len(node.notes.wait("failure", id=result.id)) == 1
    assert node.notes.read("failure", id=result.id)[0]["exc"] == "TimeLimitExceeded"


def test_a_hard_limit_from_the_call(shop):
    _, node, _ = shop
    result = send(shop, "counted", "sleep", time_limit=1)
    begun = started(node, result)
    error = fails_with(result, TimeLimitExceeded)
    assert str(error) == "TimeLimitExceeded(1,)"
    assert time.monotonic() - begun < 1 + SLACK + 0.5
    # Once the worker is dead: exactly once each.
    node.notes.wait("on_failure", id=result.id)
    send(shop, "add", 1, 1).get(timeout=PATIENCE)
    assert [note["exc"] for note in node.notes.read("failure", id=result.id)] == ["TimeLimitExceeded"]
    assert [note["exc"] for note in node.notes.read("on_failure", id=result.id)] == ["TimeLimitExceeded"]


def test_an_errback_of_a_hard_limit_runs_once(shop):
    _, node, client = shop
    errback = client.signature("shop.tasks.quiet", args=("errback of a limit",), immutable=True)
    result = send(shop, "nap", 60, time_limit=0.5, link_error=errback)
    fails_with(result, TimeLimitExceeded)
    node.notes.wait("quiet", name="errback of a limit")
    send(shop, "add", 1, 1).get(timeout=PATIENCE)
    assert len(node.notes.read("quiet", name="errback of a limit")) == 1


def test_limits_by_remote_control(shop):
    """They hold from the next start of that task on, and give way to those of a call."""
    _, _node, client = shop
    assert send(shop, "careful", 0).get(timeout=PATIENCE) == "in time"  # the node has made its request class by now
    answers = client.control.time_limit("shop.tasks.careful", soft=0.3, hard=30, reply=True, timeout=PATIENCE, limit=1)
    assert "ok" in next(iter(answers[0].values()))
    try:
        assert send(shop, "careful", 60).get(timeout=PATIENCE) == "cleaned up"
        assert send(shop, "careful", 0.6, soft_time_limit=30).get(timeout=PATIENCE) == "in time"
        client.control.time_limit("shop.tasks.careful", soft=None, hard=0.4, reply=True, timeout=PATIENCE, limit=1)
        fails_with(send(shop, "careful", 60), TimeLimitExceeded)
    finally:
        client.control.time_limit("shop.tasks.careful", reply=True, timeout=PATIENCE, limit=1)
    assert send(shop, "careful", 0.5).get(timeout=PATIENCE) == "in time"


def test_a_swallowed_soft_limit_ends_at_the_hard_one(shop):
    _, node, _ = shop
    result = send(shop, "swallows")
    fails_with(result, TimeLimitExceeded)
    assert len(node.notes.read("swallowed")) == 1


def test_the_dispatcher_enforces_the_limit_when_c_code_holds_the_gil(shop):
    _, node, _ = shop
    result = send(shop, "holds_the_gil")
    begun = started(node, result)
    fails_with(result, TimeLimitExceeded)
    assert time.monotonic() - begun < 0.6 + SLACK + 0.5


def test_a_killed_task_leaves_its_slot_to_others(shop):
    _, node, _ = shop
    doomed = [send(shop, "nap", 60, time_limit=0.4) for _ in range(4)]
    others = [send(shop, "add", n, n) for n in range(10)]
    assert [other.get(timeout=PATIENCE) for other in others] == [2 * n for n in range(10)]
    for result in doomed:
        fails_with(result, TimeLimitExceeded)
    eventually(lambda: len(node.pids("mpworker: worker")) == 2, what="the replacement of the last one")


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """Limits from the command line. Memory in KiB, as Celery counts."""
    options = ["--time-limit=1.0", "--soft-time-limit=0.5", "--max-tasks-per-child=3", "--max-memory-per-child=200000"]
    with running(tmp_path_factory.mktemp("limited"), "-c", "1", *options) as (server, node, client):
        yield server, node, client


def pid_of(shop):
    return send(shop, "describe").get(timeout=PATIENCE)["pid"]


def test_time_limits_of_the_command_line(limited):
    assert send(limited, "careful", 60).get(timeout=PATIENCE) == "cleaned up"
    fails_with(send(limited, "nap", 60, soft_time_limit=30), TimeLimitExceeded)
    assert send(limited, "careful", 1.2, time_limit=30, soft_time_limit=20).get(timeout=PATIENCE) == "in time"


def test_a_worker_leaves_after_its_share_of_tasks(limited):
    _, node, client = limited
    fails_with(send(limited, "die", "exit"), WorkerLostError)  # so that a new one begins to count
    pids = [pid_of(limited) for _ in range(6)]
    assert pids[0] == pids[1] == pids[2] != pids[3] == pids[4] == pids[5]
    assert ask(client, node, "stats")["pool"]["max-tasks-per-child"] == 3
    flood = [send(limited, "describe") for _ in range(15)]
    served = [result.get(timeout=PATIENCE)["pid"] for result in flood]
    assert max(served.count(pid) for pid in served) <= 3


def test_a_worker_that_used_much_memory_leaves(limited):
    fails_with(send(limited, "die", "exit"), WorkerLostError)
    first = pid_of(limited)
    assert send(limited, "big_then_small", 300_000_000, time_limit=30, soft_time_limit=20).get(timeout=PATIENCE) == "30"
    assert pid_of(limited) != first


def test_late_acks_with_a_prefetch_of_one_and_a_timed_out_message(tmp_path):
    config = {"worker_prefetch_multiplier": 1}
    with running(tmp_path, "-c", "1", config=config) as shop:
        server, node, _ = shop
        fails_with(send(shop, "nap", 60, "early", time_limit=0.4), TimeLimitExceeded)
        fails_with(send(shop, "late_nap", 60, "late", time_limit=0.4), TimeLimitExceeded)
        results = [send(shop, "late_add", n, n) for n in range(50)]
        assert [result.get(timeout=PATIENCE) for result in results] == [2 * n for n in range(50)]
        assert node.stop() == 0
        assert server.client().hlen("unacked") == 0
        assert server.client().llen("celery") == 0
        assert [note["name"] for note in node.notes.read("nap")] == ["early", "late"]


def test_the_pool_grows_and_shrinks_on_demand(tmp_path):
    with running(tmp_path, "-c", "1", config={"worker_prefetch_multiplier": 1}) as (_, node, client):
        assert "ok" in control(client, node, "pool_grow", n=2)
        eventually(lambda: len(node.pids("mpworker: worker")) == 3)
        held = [client.send_task("shop.tasks.hold", args=(f"gate-{n}",)) for n in range(3)]
        for n in range(3):
            node.notes.wait("hold", name=f"gate-{n}")  # all three at once
        assert ask(client, node, "stats")["pool"]["max-concurrency"] == 3
        assert "ok" in control(client, node, "pool_shrink", n=2)
        for n in range(3):
            (node.folder / f"gate-{n}").touch()
        assert [result.get(timeout=PATIENCE) for result in held] == ["gate-0", "gate-1", "gate-2"]
        eventually(lambda: len(node.pids("mpworker: worker")) == 1)
        assert [client.send_task("shop.tasks.add", args=(n, 1)).get(timeout=PATIENCE) for n in range(5)] == [
            1,
            2,
            3,
            4,
            5,
        ]
        for command, n in ("pool_shrink", 5), ("pool_shrink", -1), ("pool_grow", -1):
            assert "cannot" in control(client, node, command, n=n)["error"]


def test_autoscale(tmp_path):
    options = {"config": {"worker_prefetch_multiplier": 1}, "env": {"AUTOSCALE_KEEPALIVE": "1"}}
    with running(tmp_path, "--autoscale=4,1", **options) as (_, node, client):
        eventually(lambda: len(node.pids("mpworker: worker")) == 1, what="one worker")
        held = [client.send_task("shop.tasks.hold", args=(f"gate-{n}",)) for n in range(4)]
        for n in range(4):
            node.notes.wait("hold", name=f"gate-{n}")
        for n in range(4):
            (node.folder / f"gate-{n}").touch()
        assert [result.get(timeout=PATIENCE) for result in held] == [f"gate-{n}" for n in range(4)]
        eventually(lambda: len(node.pids("mpworker: worker")) < 4)
        assert client.send_task("shop.tasks.add", args=(1, 1)).get(timeout=PATIENCE) == 2
