"""Messages that kill every worker that runs them: how often, what is heard of them, and how they are sent again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from integration.node import HOME, PATIENCE, Node, Notes, Server, ask, client_of, eventually

from mpworker.results.query import ResultStore
from mpworker.results.record import Record

CONFIG = {"include": ["shop.tasks", "shop.hooks", "shop.signals", "shop.poison"]}


class Shop:
    """Nodes that write to the same notes, and a client."""

    def __init__(self, broker: Server, results: Server, client: Any, nodes: list[Node]) -> None:
        self.broker, self.results, self.client, self.nodes = broker, results, client, nodes
        self.notes = Notes(Path(nodes[0].env["SHOP_NOTES"]))

    def send(self, task: str, name: str, **options: Any) -> Any:
        return self.client.send_task(f"shop.poison.{task}", args=(name,), **options)

    def runs(self, name: str) -> int:
        return len(self.notes.read("poison", name=name))

    def failures(self, task_id: str) -> list[Record]:
        """Of a task, in the journals of all nodes."""
        failed = (record for node in self.nodes for record in ResultStore(node.journal).get_results_by_status("failed"))
        return [record for record in failed if record.task_id == task_id]

    def heal(self, name: str) -> None:
        (self.notes.path.parent / f"antidote-{name}").touch()

    def mpworker(self, *words: str, **env: str) -> subprocess.Popen[str]:
        node = self.nodes[0]
        return subprocess.Popen(
            [sys.executable, "-m", "mpworker", "-A", "shop", *words],
            cwd=node.cwd,
            env={**node.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(self, *words: str, **env: str) -> tuple[int, str, str]:
        process = self.mpworker(*words, **env)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with Server() as server:
        env = {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results, "SHOP_NOTES": str(folder / "notes")}
        nodes = [Node(folder / name, "-c", "1", env=env, config=CONFIG) for name in ("one", "two")]
        try:
            for node in nodes:
                node.launch()
            for node in nodes:
                node.await_ready()
            with client_of(server) as client:
                yield Shop(server, server, client, nodes)
        finally:
            for node in nodes:
                node.kill()


def test_a_poison_message_runs_three_times_on_all_nodes_together(shop: Shop) -> None:
    result = shop.send("poison", "thrice", priority=6, link_error="shop.poison.errback")
    with pytest.raises(Exception, match=f"killed 3 workers; not run again; .* mpworker requeue {result.id}"):
        result.get(timeout=PATIENCE)
    assert result.state == "FAILURE"
    (note,) = shop.notes.wait("error_callback", type="PoisonMessage")
    assert "SIGKILL" in note["text"]
    assert [note["exc"] for note in shop.notes.wait("failure", id=result.id)] == ["PoisonMessage"]
    assert [note["type"] for note in shop.notes.wait("errback")] == ["PoisonMessage"]
    assert shop.runs("thrice") == 3
    eventually(lambda: shop.broker.client().hlen("unacked") == 0)
    assert [record.dead for record in shop.failures(result.id)] == [True]

    code, out, err = shop.told("results", "--dead", "--json")
    assert (code, err) == (0, "")
    (row,) = [json.loads(line) for line in out.splitlines()]
    assert (row["id"], row["name"], row["deaths"]) == (result.id, "shop.poison.poison", 3)
    assert row["node"] in {node.name for node in shop.nodes}
    assert "SIGKILL" in row["reason"]
    assert sum(ask(shop.client, node, "stats")["pool"]["dead-messages"] for node in shop.nodes) == 1

    # Sent again while it is still poison: it has three more lives, not none and not two.
    assert shop.told("requeue", result.id)[0] == 0
    eventually(lambda: shop.runs("thrice") == 6)
    eventually(lambda: len(shop.notes.read("failure", id=result.id)) == 2)
    shop.heal("thrice")
    senders = [shop.mpworker("requeue", result.id) for _ in range(2)]
    said = [sender.communicate(timeout=PATIENCE) for sender in senders]
    assert sorted(sender.returncode for sender in senders) == [0, 1]
    assert sum(f"[{result.id}] was sent again to celery" in out for out, _ in said) == 1
    eventually(lambda: shop.client.AsyncResult(result.id).state == "SUCCESS")
    assert shop.client.AsyncResult(result.id).result == "thrice healed"
    assert shop.runs("thrice") == 7
    assert not shop.broker.client().keys("mpworker-*")


@pytest.mark.skipif(version("celery") < "5.7", reason="task_retry_on_worker_lost is new in Celery 5.7")
def test_retries_of_a_lost_task_count_as_one_message(shop: Shop) -> None:
    result = shop.send("poison_retried", "retried")
    with pytest.raises(Exception, match="killed 3 workers"):
        result.get(timeout=PATIENCE)
    assert shop.runs("retried") == 3


@pytest.mark.skipif(version("celery") < "5.7", reason="task_retry_on_worker_lost is new in Celery 5.7")
def test_a_task_that_has_had_its_retries_fails_as_with_any_pool_and_is_kept(shop: Shop) -> None:
    """Celery gives it up at the same death: whoever expects its error gets that."""
    result = shop.send("poison_retried_twice", "twice more")
    with pytest.raises(WorkerLostError, match=rf"signal 9 \(SIGKILL\).*killed 3 workers.*requeue {result.id}"):
        result.get(timeout=PATIENCE)
    assert shop.runs("twice more") == 3
    code, out, _ = shop.told("results", "--dead", "--json")
    assert (code, [json.loads(line)["deaths"] for line in out.splitlines() if result.id in line]) == (0, [3])
    assert [record.dead for record in shop.failures(result.id)] == [True]


def test_a_task_that_always_exits_is_poison_too(shop: Shop) -> None:
    result = shop.send("leaves", "leaves")
    with pytest.raises(Exception, match="killed 3 workers"):
        result.get(timeout=PATIENCE)
    assert shop.runs("leaves") == 3


def test_the_bundled_server_need_not_run(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MPWORKER_", "CELERY_"))}
    env |= {"MPWORKER_DATA_DIR": str(tmp_path), "PYTHONPATH": HOME}
    command = [sys.executable, "-m", "mpworker", "requeue", "unknown"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "Error: no dead message has the id unknown\n"


def test_a_node_without_redis_counts_and_keeps_alone(tmp_path: Path) -> None:
    with Server() as broker, Server() as results:
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results.results, "MPWORKER_MAX_DEATHS": "2"}
        node = Node(tmp_path, "-c", "1", env=env, config=CONFIG)
        with client_of(broker) as client, node:
            shop = Shop(broker, results, client, [node])
            results.kill()
            task_id = shop.send("poison", "alone", task_id=str(uuid.uuid4())).id
            node.await_log(f"[{task_id}] has killed 2 workers; not run again")
            shop.notes.wait("error_callback", type="PoisonMessage")
            assert shop.runs("alone") == 2
            (kept,) = (node.journal / "dead").glob("*.json")
            assert kept.stat().st_mode & 0o077 == 0
            code, out, err = shop.told("results", "--dead", "--json")
            assert code == 1
            assert [json.loads(line)["id"] for line in out.splitlines()] == [task_id]
            assert err.startswith("Error: the dead letters cannot be read: ")
            assert len(err.splitlines()) == 1
            results.start()
            code, out, err = shop.told("requeue", task_id, SHOP_BROKER="redis+socket:///nobody/here")
            assert (code, out) == (1, "")
            assert f"{task_id} could not be sent, and stays dead" in err
            assert len(err.splitlines()) == 1
            shop.heal("alone")
            code, out, err = shop.told("requeue", task_id, "unknown")
            assert f"[{task_id}] was sent again to celery" in out
            assert (code, err) == (1, "Error: no dead message has the id unknown\n")
            eventually(lambda: shop.runs("alone") == 3)
            assert not list((node.journal / "dead").iterdir())
            assert shop.told("results", "--dead") == (0, "", "")
