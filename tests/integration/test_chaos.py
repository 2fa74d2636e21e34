"""Two nodes work while the results' server is killed again and again, with and without its data, and so are they.

Whatever happens, each task ends once, its record is in the journal, and the same is in Redis afterwards; what ends
while the disk is full is in Redis alone. The long form is not part of a normal run::

    pytest -n 0 -m long -s -o faulthandler_timeout=0 tests/integration/test_chaos.py

``_MPWORKER_CHAOS_SEED`` repeats a run; the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from integration.node import Node, Server, client_of, eventually

from mpworker import ResultStore
from mpworker.results.journal import Journal

SEED = int(os.environ.get("_MPWORKER_CHAOS_SEED", "0")) or random.randrange(1, 1 << 32)
#: Seconds after which a message whose node was killed is delivered again.
AGAIN = 5


class Chaos:
    """The attack: one of its moves after the other, at random moments."""

    def __init__(self, results: Server, nodes: list[Node], seed: int) -> None:
        self.results, self.nodes, self.choose = results, nodes, random.Random(seed)
        self.moves: list[str] = []

    def attack(self, move: str) -> None:
        self.moves.append(move)
        if move == "worker":
            pids = [pid for node in self.nodes for pid in node.pids("mpworker: worker")]
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(self.choose.choice(pids), signal.SIGKILL)
        elif move == "shipper":
            for pid in self.choose.choice(self.nodes).pids("mpworker: shipper"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif move == "node":
            node = self.choose.choice(self.nodes)
            node.kill()
            node.start()
        else:
            self.results.kill()
            time.sleep(self.choose.random() * 0.5)  # how long it is away
            if move == "empty":
                self.results.forget()
            self.results.start()

    @contextmanager
    def full_disk(self, journal: Path) -> Iterator[None]:
        """No process of the nodes can make a file longer than the shortest of the journal's is now."""
        shortest = min(path.stat().st_size for path in Journal.files(journal))
        before = {}
        for pid in [pid for node in self.nodes for pid in node.processes()]:
            with suppress(ProcessLookupError):
                before[pid] = resource.prlimit(pid, resource.RLIMIT_FSIZE, (shortest, resource.RLIM_INFINITY))
        self.moves.append("disk")
        try:
            yield
        finally:
            for pid, limits in before.items():
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def run(folder: Path, tasks: int, moves: list[str], seed: int) -> int:
    """How many tasks have ended, once everything about them has been looked at."""
    print(f"seed {seed}, {tasks} tasks")
    config = {
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        "mpworker_max_deaths": 0,
        "broker_transport_options": {"visibility_timeout": AGAIN},
    }
    journal = folder / "journal"
    with Server() as results, Server() as broker:
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results.results, "MPWORKER_JOURNAL": str(journal)}
        nodes = [Node(folder / name, "-c", "2", config=config, env=env) for name in ("one", "two")]
        with client_of(broker, task_ignore_result=True) as client, nodes[0], nodes[1]:
            chaos = Chaos(results, nodes, seed)
            chaos.choose.shuffle(moves)
            ids = {}
            store = ResultStore(journal)
            for turn, move in enumerate(moves):
                for number in range(turn * tasks // len(moves), (turn + 1) * tasks // len(moves)):
                    ids[client.send_task("shop.tasks.nap", args=(0.002, f"task {number}")).id] = f"task {number}"
                time.sleep(chaos.choose.random() * 0.3)  # when, not whether: the moment is to be any
                chaos.attack(move)
            ended = 60.0 + tasks / 20

            def at_rest() -> bool:
                left = broker.client().llen("celery") + broker.client().hlen("unacked")
                return not left and store.get_statistics()["completed"] == store.get_statistics()["total_tasks"]

            eventually(at_rest, ended, f"all ends, {chaos.moves}")
            completed = {record.task_id for record in store.query(status="SUCCESS")}
            lost = ids.keys() - completed
            if lost:  # by the broker's transport, which takes a message from its list a moment before it notes that
                logs = "".join(node.log() for node in nodes)
                assert not [task_id for task_id in lost if f"[{task_id}] received" in logs]
                assert len(lost) <= moves.count("node"), (
                    f"{len(lost)} messages were lost by {moves.count('node')} kills"
                )
                print(f"{len(lost)} messages were lost on their way to a node that was killed")
                ids = {task_id: text for task_id, text in ids.items() if task_id in completed}
            client_of_results = results.client()
            keys = [f"celery-task-meta-{task_id}" for task_id in ids]
            eventually(lambda: all(client_of_results.mget(keys)), 60.0, "all is in Redis")
            for task_id, text in zip(ids, client_of_results.mget(keys), strict=True):
                meta = json.loads(text)
                assert (meta["status"], meta["result"]) == ("SUCCESS", ids[task_id])
            for record in store.query(status="SUCCESS"):
                assert record.result == ids[record.task_id]
            counts = store.get_statistics()
            assert (counts["total_tasks"], counts["failed"], counts["torn_lines"]) == (len(ids), 0, 0)
            with chaos.full_disk(journal):
                late = [client.send_task("shop.tasks.give_back", args=(f"late {n}",)).id for n in range(20)]
                keys = [f"celery-task-meta-{task_id}" for task_id in late]
                eventually(lambda: all(client_of_results.mget(keys)), 60.0, "what ends now is in Redis")
            found = [json.loads(text) for text in client_of_results.mget(keys)]
            assert [meta["result"] for meta in found] == [f"late {n}" for n in range(20)]
            assert any("goes to Redis only" in node.log() for node in nodes)
            return len(ids)


def test_a_short_storm_loses_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, 300, ["worker"] * 4 + ["redis", "redis", "empty", "shipper"], SEED) == 300


@pytest.mark.long
def test_a_long_storm_loses_nothing(tmp_path: Path) -> None:
    ended = run(
        tmp_path, 20_000, ["worker"] * 60 + ["shipper"] * 10 + ["node"] * 6 + ["redis"] * 5 + ["empty"] * 5, SEED
    )
    assert 20_000 - 6 <= ended <= 20_000
