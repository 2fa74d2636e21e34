"""How a node ends: warm, cold, killed, asked twice; and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import time

import pytest
from integration.node import PATIENCE, Node, Server, client_of, eventually

ONE_AT_A_TIME = {"worker_prefetch_multiplier": 4}


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


@pytest.fixture
def node_of(server, tmp_path):
    nodes = []

    def make(*args, **options):
        options["env"] = {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results, **options.get("env", {})}
        nodes.append(Node(tmp_path / f"node{len(nodes)}", *args, **options))
        return nodes[-1].start()

    yield make
    for node in nodes:
        node.kill()


def hold(client, node, name):
    result = client.send_task("shop.tasks.hold", args=(name,))
    node.notes.wait("hold", name=name)
    return result


@pytest.mark.parametrize("late", [False, True], ids=["early-ack", "late-ack"])
def test_warm_shutdown_finishes_what_runs_and_returns_the_rest(server, client, node_of, late):
    node = node_of("-c", "1", config={**ONE_AT_A_TIME, "task_acks_late": late})
    running = hold(client, node, "gate")
    waiting = [client.send_task("shop.tasks.add", args=(n, n)) for n in range(6)]
    eventually(lambda: server.client().hlen("unacked") >= 3, what="some are reserved")
    node.signal(signal.SIGTERM)
    node.await_log("Warm shutdown")
    (node.folder / "gate").touch()
    assert node.wait() == 0
    assert running.get(timeout=PATIENCE) == "gate"
    node.await_gone(2.0)
    done = [result for result in waiting if result.state == "SUCCESS"]
    assert server.client().hlen("unacked") == 0
    assert server.client().llen("celery") == 6 - len(done)
    assert len(done) < 6
    node_of("-c", "1")
    assert [result.get(timeout=PATIENCE) for result in waiting] == [2 * n for n in range(6)]
    assert len(node.notes.read("hold")) == 1


def test_an_idle_node_ends_promptly_and_each_process_says_good_bye(node_of):
    node = node_of("-c", "2")
    pids = set(node.pids("mpworker: worker"))
    assert node.stop(timeout=2.0) == 0
    gone = node.notes.read("process_shutdown")
    assert {note["pid"] for note in gone} == pids  # and no process was started only to leave
    assert {note["exitcode"] for note in gone} == {0}
    node.await_gone(2.0)
    assert "Traceback" not in node.log()


def test_a_node_that_still_loads_its_application_ends_at_once(server, tmp_path):
    config = {"include": ["shop.tasks", "shop.odd"]}
    node = Node(tmp_path / "node", "-c", "1", config=config, env={"SHOP_BROKER": server.broker, "BESIDE": "1"})
    (node.folder / "slow-children").touch()
    try:
        node.launch()
        node.notes.wait("loading")
        node.signal(signal.SIGTERM)
        assert node.wait(10.0) == 0
        node.await_gone(2.0)
    finally:
        node.kill()


def test_a_killed_main_process_leaves_nothing(client, node_of):
    node = node_of("-c", "2")
    client.send_task("shop.hooks.hooked", args=("return", "so that there is a callback process"))
    node.notes.wait("callback")
    hold(client, node, "never")
    assert len(node.processes()) >= 5
    node.signal(signal.SIGKILL)
    assert node.wait() == -signal.SIGKILL
    node.await_gone(2.0)


def test_a_killed_main_process_takes_stopped_workers_with_it(client, node_of):
    node = node_of("-c", "2")
    hold(client, node, "never")
    for pid in node.pids("mpworker: worker"):
        os.kill(pid, signal.SIGSTOP)
    node.signal(signal.SIGKILL)
    node.await_gone(2.0)


def test_cold_shutdown_is_prompt_and_gives_late_acked_messages_back(server, client, node_of):
    node = node_of("-c", "1", config={"task_acks_late": True, "worker_prefetch_multiplier": 1})
    doomed = hold(client, node, "gate")
    node.signal(signal.SIGQUIT)
    node.wait(10.0)
    node.await_gone(2.0)
    assert node.notes.read("released") == []
    assert doomed.state != "SUCCESS"
    assert server.client().llen("celery") + server.client().hlen("unacked") == 1
    second = node_of("-c", "1")
    (second.folder / "gate").touch()
    if server.client().llen("celery") == 0 and doomed.state != "SUCCESS":
        return  # still under the transport's own visibility timeout: not lost, but an hour away
    assert doomed.get(timeout=PATIENCE) == "gate"


def test_ctrl_c_twice_is_cold(client, node_of):
    node = node_of("-c", "2")
    hold(client, node, "never")
    os.killpg(node.pid, signal.SIGINT)
    node.await_log("Warm shutdown")
    os.killpg(node.pid, signal.SIGINT)
    node.wait(10.0)
    node.await_gone(2.0)
    assert node.notes.read("released") == []


def test_sigquit_during_a_warm_shutdown(client, node_of):
    node = node_of("-c", "1")
    hold(client, node, "never")
    node.signal(signal.SIGTERM)
    node.await_log("Warm shutdown")
    node.signal(signal.SIGQUIT)
    node.wait(10.0)
    node.await_gone(2.0)


def test_sigquit_while_the_node_hears_of_a_start(client, node_of):
    node = node_of("-c", "1")
    client.send_task("shop.tasks.interrupts_its_start")
    node.wait(10.0)
    assert "Traceback" not in node.log()
    node.await_gone(2.0)


def test_cold_shutdown_with_a_dispatcher_that_does_not_react(client, node_of):
    node = node_of("-c", "1")
    hold(client, node, "never")
    os.kill(node.pids("mpworker: dispatcher")[0], signal.SIGSTOP)
    node.signal(signal.SIGQUIT)
    node.wait(20.0)
    node.await_gone(2.0)


def test_soft_shutdown_lets_short_tasks_finish(client, node_of):
    node = node_of("-c", "2", config={"worker_soft_shutdown_timeout": 3.0})
    short, long = hold(client, node, "gate"), hold(client, node, "never")
    node.signal(signal.SIGQUIT)
    node.await_log("Initiating Soft Shutdown")
    (node.folder / "gate").touch()
    node.wait(20.0)
    assert short.get(timeout=PATIENCE) == "gate"
    assert long.state != "SUCCESS"
    node.await_gone(2.0)


def test_soft_shutdown_ends_with_the_last_task_and_begins_no_other(server, client, node_of):
    node = node_of("-c", "1", config={"worker_soft_shutdown_timeout": 60.0, **ONE_AT_A_TIME})
    last = hold(client, node, "gate")
    waiting = [client.send_task("shop.tasks.quiet", args=(f"waiting {n}",)) for n in range(2)]
    waiting += [client.send_task("shop.tasks.quiet", args=(f"later {n}",), countdown=0.5) for n in range(2)]
    eventually(lambda: all(f"{result.id}] received" in node.log() for result in waiting))
    node.signal(signal.SIGQUIT)
    node.await_log("Initiating Soft Shutdown")
    waited = time.monotonic() + 1.0
    eventually(lambda: time.monotonic() > waited, what="it is later, and what was to run later does not")
    (node.folder / "gate").touch()
    opened = time.monotonic()
    node.wait(20.0)
    assert time.monotonic() - opened < 5.0
    assert last.get(timeout=PATIENCE) == "gate"
    assert node.notes.read("quiet") == []
    assert server.client().llen("celery") + server.client().hlen("unacked") == 4
    node.await_gone(2.0)


def test_a_term_remapped_to_quit_is_cold(client, node_of):
    node = node_of("-c", "1", env={"REMAP_SIGTERM": "SIGQUIT"})
    hold(client, node, "never")
    node.signal(signal.SIGTERM)
    node.wait(10.0)
    node.await_gone(2.0)


def test_shutdown_by_remote_control(client, node_of):
    node = node_of("-c", "1")
    running = hold(client, node, "gate")
    client.control.shutdown(destination=[node.name])
    node.await_log("Got shutdown from remote")
    (node.folder / "gate").touch()
    assert node.wait() == 0
    assert running.get(timeout=PATIENCE) == "gate"
    node.await_gone(2.0)


@pytest.mark.parametrize("turns", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_broker_killed_and_restarted_under_load(server, client, node_of, turns):
    config = {"broker_connection_retry_on_startup": True, "broker_connection_max_retries": None}
    node = node_of("-c", "2", config=config)
    for turn in range(turns):
        results = [client.send_task("shop.tasks.nap", args=(0.05, f"turn {turn}")) for _ in range(20)]
        node.notes.wait("awake", 3, name=f"turn {turn}")
        server.kill()
        server.start()
        late = [client.send_task("shop.tasks.add", args=(turn, n)) for n in range(10)]
        # Asked for by key: whether this client's own subscriptions survive the restart is not the node's affair.
        eventually(lambda late=late: all(result.ready() for result in late), PATIENCE)
        assert [result.result for result in late] == [turn + n for n in range(10)]
        assert len(results) == 20
    assert len(node.pids("mpworker: worker")) == 2
    assert node.stop() == 0
    node.await_gone(2.0)
