"""Chains, groups, chords and what is made of them come to their ends while the Redis of the results comes and goes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from integration.node import PATIENCE, Node, Server, client_of, eventually

from mpworker import ResultStore

#: How often Redis is killed while they run.
_OUTAGES = 4


def canvases(client: Any) -> dict[str, tuple[Any, Any]]:
    """Each with its value. All begin with a task that waits, so that nothing has ended before Redis goes."""

    def sig(name: str, *args: Any, **options: Any) -> Any:
        return client.signature(f"shop.tasks.{name}", args=args, **options)

    hold = sig("hold", "gate", immutable=True)
    adds = [hold | sig("add", n, n, immutable=True) for n in range(4)]
    total = sig("total")
    return {
        "chain": (chain(hold, sig("add", 1, 2, immutable=True), sig("add", 3), sig("add", 4)), 10),
        "group": (group(adds, app=client), [0, 2, 4, 6]),
        "chord": (chord(adds, total, app=client), 12),
        "chord and on": (chain(chord(adds, total, app=client), sig("add", 1)), 13),
        "chord of chords": (chord([chord(adds, total, app=client), *adds], total, app=client), 24),
    }


def ended(store: ResultStore) -> int:
    return int(store.get_statistics()["completed"])


def test_they_end_as_they_would(tmp_path: Path) -> None:
    # The sizes of chords are written there by the client alone: they must not be in the part that a crash may cost.
    with Server() as broker, Server(appendfsync="always") as results:
        results_url = results.results
        env = {"SHOP_BROKER": broker.broker, "SHOP_RESULTS": results_url}
        with Node(tmp_path / "node", "-c", "3", env=env) as node:
            with client_of(broker) as client:
                client.conf.result_backend = results_url
                sent = {name: (canvas.apply_async(), value) for name, (canvas, value) in canvases(client).items()}
                node.notes.wait("hold", count=3)
            (node.folder / "gate").touch()
            store = ResultStore(node.journal)
            for _ in range(_OUTAGES):
                results.kill()
                before = ended(store)
                with contextlib.suppress(pytest.fail.Exception):  # everything may wait for Redis, or have ended
                    eventually(lambda before=before: ended(store) > before, timeout=1.0)
                results.start()
            with client_of(broker) as client:
                client.conf.result_backend = results_url
                for name, (result, value) in sent.items():
                    ids = [child.id for child in result.results] if name == "group" else [result.id]
                    found = [client.AsyncResult(task_id).get(timeout=PATIENCE) for task_id in ids]
                    assert found == (value if name == "group" else [value]), name
            assert store.get_statistics()["failed"] == 0
