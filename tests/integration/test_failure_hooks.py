"""When a task's process is gone: signal, errback, event, ``on_failure``, ``error_callback``, each of them once."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import threading
from importlib.metadata import version

import pytest
from integration.node import PATIENCE, eventually, running

from mpworker import ResultStore

SAYS = {"limit": "TimeLimitExceeded", "exit": "WorkerLostError", "sysexit": "WorkerLostError"}
HOOKS = ("on_failure", "after_return", "on_retry", "error_callback")


class Events:
    """What the node publishes about its tasks."""

    def __init__(self, client):
        self.seen = []
        self._connection = client.connection_for_read()
        self._receiver = client.events.Receiver(self._connection, handlers={"*": self.seen.append})
        self._thread = threading.Thread(target=self._receiver.capture)

    def __enter__(self):
        self._thread.start()
        eventually(lambda: self.seen, what="the node's answer to the receiver")
        return self

    def __exit__(self, *_):
        self._receiver.should_stop = True
        self._thread.join(PATIENCE)
        self._connection.release()

    def of(self, task_id):
        return [event["type"] for event in list(self.seen) if event.get("uuid") == task_id]


@contextlib.contextmanager
def published(server):
    """Names of the events that somebody publishes meanwhile, as they come over the wire."""
    with server.client() as client, client.pubsub() as pubsub:
        pubsub.psubscribe("/*celeryev*")
        assert pubsub.get_message(timeout=PATIENCE)["type"] == "psubscribe"
        seen = []

        def look():
            message = pubsub.get_message(timeout=0.05)
            if message is not None:
                body = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
                seen.extend(body if isinstance(body, list) else [body])
            return seen

        yield look


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with running(tmp_path_factory.mktemp("shop"), "-c", "2", "-E") as (server, node, client):
        with Events(client) as events:
            yield server, node, client, events


def send(shop, name, *args, **options):
    _, _, client, _ = shop
    errback = client.signature("shop.tasks.quiet", args=(f"errback of {name}{args}",), immutable=True)
    return client.send_task(f"shop.tasks.{name}", args=args, link_error=errback, **options), f"errback of {name}{args}"


def fence(shop):
    """Everything that was asked of the callback process before has happened when this returns."""
    _, node, client, _ = shop
    name = f"fence {len(node.notes.read())}"
    client.send_task("shop.hooks.hooked", args=("return", name))
    node.notes.wait("callback", of=name)


@pytest.mark.parametrize("name", ["doomed", "late_doomed"])
@pytest.mark.parametrize("how", SAYS)
def test_everybody_hears_of_the_end_once(shop, name, how):
    server, node, _, events = shop
    result, errback = send(shop, name, how, **({"time_limit": 0.4} if how == "limit" else {}))
    with pytest.raises(Exception, match=r"0\.4" if how == "limit" else "exited prematurely"):
        result.get(timeout=PATIENCE)
    node.notes.wait("after_return", id=result.id)
    node.notes.wait("quiet", name=errback)
    fence(shop)
    seen = node.notes.read(id=result.id)
    (hook,) = [note for note in seen if note["kind"] == "on_failure"]
    assert (hook["exc"], hook["args"], hook["request"]) == (SAYS[how], [how], result.id)
    assert SAYS[how] in hook["text"] or "exited prematurely" in hook["text"]
    assert [note["status"] for note in seen if note["kind"] == "after_return"] == ["FAILURE"]
    assert [note["exc"] for note in seen if note["kind"] == "failure"] == [SAYS[how]]
    told = [note for note in node.notes.read("error_callback") if note["pid"] == hook["pid"]]
    assert told[-1]["exc"] == SAYS[how]
    assert hook["pid"] in node.pids("mpworker: callbacks")
    assert len(node.notes.read("quiet", name=errback)) == 1
    assert len(node.notes.read("doomed", id=result.id)) == 1
    eventually(lambda: "task-failed" in events.of(result.id), what="the event")
    assert events.of(result.id).count("task-failed") == 1
    eventually(lambda: server.client().hlen("unacked") == 0)


def test_nobody_hears_of_a_loss_whose_message_comes_again(shop):
    _, node, _, events = shop
    result, errback = send(shop, "requeued", "exit")
    assert result.get(timeout=PATIENCE) == "second"
    node.notes.wait("after_return", id=result.id)
    fence(shop)
    kinds = [note["kind"] for note in node.notes.read(id=result.id) if note["kind"] in (*HOOKS, "failure")]
    assert kinds == ["after_return"]  # of the second time
    assert node.notes.read("quiet", name=errback) == []
    assert "task-failed" not in events.of(result.id)


@pytest.mark.skipif(version("celery") < "5.7", reason="task_retry_on_worker_lost is new in Celery 5.7")
def test_a_loss_that_is_retried_is_a_retry(shop):
    _, node, _, _ = shop
    result, errback = send(shop, "retried", "exit")
    assert result.get(timeout=PATIENCE) == "second"
    node.notes.wait("after_return", id=result.id)
    fence(shop)
    seen = [note for note in node.notes.read(id=result.id) if note["kind"] in (*HOOKS, "failure", "retry")]
    assert sorted(note["kind"] for note in seen) == ["after_return", "on_retry", "retry"]
    (hook,) = [note for note in seen if note["kind"] == "on_retry"]
    assert hook["pid"] in node.pids("mpworker: callbacks")
    assert node.notes.read("quiet", name=errback) == []


def test_hooks_that_raise_harm_nothing(shop):
    _, node, _, _ = shop
    result, errback = send(shop, "late_doomed", "hooks raise")
    with pytest.raises(Exception, match="exited prematurely"):
        result.get(timeout=PATIENCE)
    node.notes.wait("after_return", id=result.id)
    node.notes.wait("quiet", name=errback)
    node.await_log("from on_failure")
    assert f"a callback of shop.tasks.late_doomed[{result.id}] failed: RuntimeError: from on_failure" in node.log()


def test_while_the_broker_is_away(tmp_path):
    """The main process is blocked in its attempts to connect, and everybody hears of the end all the same."""
    config = {"broker_connection_retry_on_startup": True, "broker_connection_max_retries": None}
    with running(tmp_path, "-c", "1", "-E", config=config) as (server, node, client):
        errback = client.signature("shop.tasks.quiet", args=("errback of an outage",), immutable=True)
        result = client.send_task("shop.tasks.doomed", args=("limit",), time_limit=2.0, link_error=errback)
        node.notes.wait("doomed", id=result.id)
        server.kill()
        node.await_log("Connection to broker lost")
        for kind in ("failure", "on_failure", "after_return", "error_callback"):
            node.notes.wait(kind, timeout=15.0)
        node.await_log("Cannot connect to")
        node.signal(signal.SIGSTOP)  # so that it is not back before somebody listens
        server.start()
        with published(server) as look:
            node.signal(signal.SIGCONT)
            eventually(lambda: [e for e in look() if (e.get("uuid"), e["type"]) == (result.id, "task-failed")])
            node.notes.wait("quiet", name="errback of an outage")
            add = client.send_task("shop.tasks.add", args=(1, 2))
            assert add.get(timeout=PATIENCE) == 3
            eventually(lambda: [event for event in look() if event.get("uuid") == add.id])
            types = [event["type"] for event in look() if event.get("uuid") == result.id]
            assert types.count("task-failed") == 1
        seen = [note["kind"] for note in node.notes.read(id=result.id)]
        for kind in ("failure", "on_failure", "after_return"):
            assert seen.count(kind) == 1
        assert len(node.notes.read("error_callback")) == 1
        assert len(node.notes.read("quiet", name="errback of an outage")) == 1
        assert ResultStore(node.journal).get_statistics()["failed"] == 1
