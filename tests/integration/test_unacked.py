"""Messages whose connection is lost: nothing runs twice, nothing waits for the visibility timeout, no node ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter

import pytest
from celery import Celery
from integration.node import PATIENCE, Node, Server, eventually

LATE = {
    "task_acks_late": True,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "worker_prefetch_multiplier": 2,
}


class Shop:
    """A broker that keeps what it has said, another server for results, and nodes."""

    def __init__(self, broker, results, client, folder):
        self.broker, self.results, self.client, self.folder = broker, results, client, folder
        self.nodes = []

    @contextlib.contextmanager
    def node(self, *args, **config):
        env = {"SHOP_BROKER": self.broker.broker, "SHOP_RESULTS": self.results.results}
        folder = self.folder / f"node{len(self.nodes)}"
        with Node(folder, *args, env=env, config={**LATE, **config}) as node:
            self.nodes.append(node)
            yield node

    def send(self, name, *args):
        return self.client.send_task(f"shop.tasks.{name}", args=args)

    def hold(self, node, name):
        result = self.send("hold", name)
        node.notes.wait("hold", name=name)
        return result

    def unacked(self):
        with self.broker.client() as redis:
            return redis.hlen("unacked")

    def is_idle(self):
        with self.broker.client() as redis:
            return not (redis.hlen("unacked") or redis.zcard("unacked_index") or redis.llen("celery"))

    def restart(self, node, meanwhile=lambda: None):
        """The broker crashes, and is back when the node has noticed."""
        before = node.log()
        self.broker.kill()
        eventually(lambda: "Connection to broker lost" in node.log()[len(before) :])
        meanwhile()
        self.broker.start()
        eventually(lambda: "messages of a lost connection:" in node.log()[len(before) :])


@pytest.fixture
def shop(tmp_path):
    with Server(appendfsync="always") as broker, Server() as results:
        client = Celery("client", broker=broker.broker, backend=results.results, set_as_current=False)
        yield Shop(broker, results, client, tmp_path)
        client.backend.result_consumer.cancel_for = lambda task_id: None
        client.close()


def test_running_and_waiting_tasks_outlive_a_restart_of_the_broker(shop):
    with shop.node("-c", "2") as node:
        running = [shop.hold(node, name) for name in ("one", "two")]
        waiting = [shop.send("add", n, n) for n in range(2)]
        eventually(lambda: shop.unacked() == 4, what="all are prefetched")
        shop.restart(node)
        assert "2 of tasks that run here, 0 of tasks that have ended, 2 put back" in node.log()
        (node.folder / "one").touch()
        assert [result.get(timeout=PATIENCE) for result in (*waiting, running[0])] == [0, 2, "one"]
        shop.restart(node)  # a second time, for a message that has moved once
        (node.folder / "two").touch()
        assert running[1].get(timeout=PATIENCE) == "two"
        assert [shop.send("add", n, n).get(timeout=PATIENCE) for n in range(5)] == [0, 2, 4, 6, 8]
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 2
        assert "Couldn't ack" not in node.log()


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
def test_a_task_that_ends_while_the_broker_is_away_has_ended(shop, late):
    with shop.node("-c", "1", task_acks_late=late, worker_prefetch_multiplier=1) as node:
        running = shop.hold(node, "gate")
        waiting = shop.send("add", 1, 1)

        def end():
            (node.folder / "gate").touch()
            node.notes.wait("released")
            assert running.get(timeout=PATIENCE) == "gate"

        if not late:
            eventually(lambda: shop.unacked() == 1, what="the other one is prefetched")
        shop.restart(node, end)
        assert waiting.get(timeout=PATIENCE) == 2
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 1


@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("turns", [3, pytest.param(20, marks=pytest.mark.long)])
def test_restarts_under_load_lose_nothing_and_run_nothing_twice(shop, late, turns):
    with shop.node("-c", "3", task_acks_late=late, worker_prefetch_multiplier=4) as node:
        results = []
        for turn in range(turns):
            results += [shop.send("nap", 0.05, f"{turn}.{n}") for n in range(40)]
            node.notes.wait("awake", 40 * turn + 10)
            shop.broker.stop()
            shop.broker.start()
            shop.client._after_fork()  # forgets its connections
        # Not more than one at a time: what Redis has popped, but not sent yet, when it ends is lost (kombu's BRPOP).
        eventually(lambda: len(node.notes.read("awake")) >= len(results) - turns)
        eventually(shop.is_idle, what="everything is acknowledged")
        eventually(lambda: len(node.notes.read("nap")) == len(node.notes.read("awake")), what="none runs any more")
        runs = Counter(note["name"] for note in node.notes.read("nap"))
        assert set(runs.values()) == {1}
        eventually(lambda: [result.state for result in results].count("SUCCESS") == len(runs), what="all have results")


def test_the_end_of_a_node_that_has_lost_its_broker(shop):
    """Asked to end while it connects: the broker is back before its task has ended."""
    with shop.node("-c", "1") as node:
        running = shop.hold(node, "gate")
        waiting = shop.send("add", 1, 1)
        eventually(lambda: shop.unacked() == 2, what="both are taken")
        shop.broker.kill()
        node.await_log("Trying again in")
        node.signal(signal.SIGTERM)
        node.await_log("Warm shutdown")
        shop.broker.start()
        (node.folder / "gate").touch()
        assert node.wait() == 0
        assert running.get(timeout=PATIENCE) == "gate"
        assert shop.unacked() == 0
    with shop.node("-c", "1") as node:
        assert waiting.get(timeout=PATIENCE) == 2
        assert node.notes.read("hold") == []
    eventually(shop.is_idle, what="everything is acknowledged")


def test_a_broker_that_comes_back_empty_is_given_what_was_waiting_here(shop):
    with shop.node("-c", "1") as node:
        running = shop.hold(node, "gate")
        waiting = shop.send("add", 1, 1)
        eventually(lambda: shop.unacked() == 2, what="both are taken")
        shop.restart(node, shop.broker.forget)
        (node.folder / "gate").touch()
        assert [running.get(timeout=PATIENCE), waiting.get(timeout=PATIENCE)] == ["gate", 2]
        eventually(shop.is_idle, what="everything is acknowledged")


def test_a_broker_without_acknowledgements_has_none_of_it(shop):
    options = {"broker_transport_options": {"ack_emulation": False}}
    with shop.node("-c", "1", **options) as node:
        running = shop.hold(node, "gate")
        before = node.log()
        shop.broker.stop()
        shop.broker.start()
        waiting = shop.send("add", 1, 1)
        eventually(lambda: "Connected to" in node.log()[len(before) :] or running.ready())
        (node.folder / "gate").touch()
        assert [running.get(timeout=PATIENCE), waiting.get(timeout=PATIENCE)] == ["gate", 2]
        assert "told later" not in node.log()


def test_connections_that_are_cut_have_nobody_else_run_it(shop):
    one = {"worker_prefetch_multiplier": 1}
    with shop.node("-c", "2", **one) as node, shop.node("-c", "2", **one) as other:  # both wait for a second one
        running = shop.send("hold", "gate")
        eventually(lambda: node.notes.read("hold") or other.notes.read("hold"))
        if other.notes.read("hold"):
            node, other = other, node
        with shop.broker.client() as redis:
            redis.client_kill_filter(_type="normal", skipme=True)
        node.await_log("messages of a lost connection: 1 of tasks that run here")
        assert [shop.send("add", n, n).get(timeout=PATIENCE) for n in range(5)] == [0, 2, 4, 6, 8]
        eventually(lambda: shop.unacked() == 1, what="the others are acknowledged")
        (node.folder / "gate").touch()
        assert running.get(timeout=PATIENCE) == "gate"
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 1
        assert other.notes.read("hold") == []


def test_a_message_that_is_visible_again_is_not_run_beside_itself(shop):
    """What Redis's visibility timeout does to a task that takes longer."""
    with shop.node("-c", "2") as node:
        running = shop.hold(node, "gate")
        with shop.client.connection_for_write() as connection:
            qos = connection.default_channel.qos
            vars(qos)["visibility_timeout"] = -1
            qos.restore_visible(interval=1)
        node.await_log("was delivered again to the node that has it")
        assert shop.unacked() == 1
        (node.folder / "gate").touch()
        assert running.get(timeout=PATIENCE) == "gate"
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 1


def test_a_task_that_is_given_back_while_the_broker_is_away_runs_again(shop):
    with shop.node("-c", "1", task_reject_on_worker_lost=True) as node:
        running = shop.hold(node, "gate")

        def kill():
            os.kill(node.notes.read("hold")[0]["pid"], signal.SIGKILL)
            node.await_log("exited prematurely")
            (node.folder / "gate").touch()

        shop.restart(node, kill)
        assert running.get(timeout=PATIENCE) == "gate"
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 2


def test_a_broker_that_is_full_costs_no_message(shop):
    with shop.node("-c", "1", worker_prefetch_multiplier=1) as node:
        running = shop.hold(node, "gate")
        waiting = [shop.send("add", n, n) for n in range(3)]
        with shop.broker.client() as redis:
            redis.config_set("maxmemory", "1")
            (node.folder / "gate").touch()
            assert [result.get(timeout=PATIENCE) for result in (running, *waiting)] == ["gate", 0, 2, 4]
            redis.config_set("maxmemory", "0")
        assert "Redis does not note that this node has a message" in node.log()
        eventually(shop.is_idle, what="everything is acknowledged")


@pytest.mark.parametrize("how", ["demoted", "full"])
def test_a_broker_that_refuses_everything_for_a_while(shop, how):
    """As the old master after a failover, or without memory when the node connects again."""
    with shop.node("-c", "1", worker_prefetch_multiplier=2) as node, shop.broker.client() as redis:
        running = shop.hold(node, "gate")
        if how == "demoted":
            redis.replicaof("127.0.0.1", "1")
            node.await_log("read only replica")
        else:
            redis.config_set("maxmemory", "1")
            redis.client_kill_filter(_type="normal", skipme=True)
            node.await_log("used memory > 'maxmemory'")
        (node.folder / "gate").touch()
        assert running.get(timeout=PATIENCE) == "gate"
        assert node.log().count("Cannot connect to") < 60, "it tries again and again without a pause"
        if how == "demoted":
            redis.replicaof("NO", "ONE")
        else:
            redis.config_set("maxmemory", "0")
        assert shop.send("add", 1, 2).get(timeout=PATIENCE) == 3
        eventually(shop.is_idle, what="everything is acknowledged")
        assert len(node.notes.read("hold")) == 1


def test_a_broker_that_refuses_from_the_start_is_a_mistake(shop):
    with shop.broker.client() as redis:
        redis.config_set("maxmemory", "1")
    with pytest.raises(AssertionError, match="the worker ended with 1"), shop.node("-c", "1"):
        pass


def test_without_a_redelivery_nothing_is_held_back(shop):
    """Two messages with one id, as of a task that is tried again, are two."""
    with shop.node("-c", "2") as node:
        first = shop.client.send_task("shop.tasks.hold", args=("gate",), task_id="same")
        node.notes.wait("hold")
        shop.client.send_task("shop.tasks.hold", args=("gate",), task_id="same")
        node.notes.wait("hold", 2)
        (node.folder / "gate").touch()
        assert first.get(timeout=PATIENCE) == "gate"
        eventually(shop.is_idle, what="everything is acknowledged")
