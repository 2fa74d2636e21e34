"""``Model`` subclasses on a node: pushed by dotted name, run by any node that includes their module, by no other."""

from __future__ import annotations

import gc

import pytest
from integration.node import PATIENCE, Node, Server, client_of

from mpworker import InfoTask, MultiProcess


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with Server() as server:
        env = {
            "MPWORKER_BROKER_URL": server.broker,
            "MPWORKER_RESULT_BACKEND": server.results,
            "MPWORKER_INCLUDE": "stock",
        }
        with Node(tmp_path_factory.mktemp("node"), "-c", "2", app="mpworker", env=env) as node:
            yield server, node


@pytest.fixture
def mp(nodes):
    server, _ = nodes
    mp = MultiProcess(broker=server.broker)
    mp.start()
    app = mp._app
    yield mp
    mp.stop()
    app.backend.result_consumer.cancel_for = lambda task_id: None
    gc.collect()


def test_a_result_and_its_callback(nodes, mp):
    _, node = nodes
    result = mp.push(InfoTask("stock.Count", 30, "a", "b", "c"))
    assert result.get(timeout=PATIENCE) == {"counted": 3}
    (called,) = node.notes.wait("callback")
    assert called["result"] == {"counted": 3}
    (ran,) = node.notes.read("runnable")
    assert called["pid"] in node.pids("mpworker: callbacks")
    assert ran["pid"] in node.pids("mpworker: worker")
    assert node.notes.read("error_callback") == []


def test_an_error_and_its_callback(nodes, mp):
    _, node = nodes
    with pytest.raises(ValueError, match="no good"):
        mp.push(InfoTask("stock.Broken", None, "no good")).get(timeout=PATIENCE)
    (called,) = node.notes.wait("error_callback", text="no good")
    assert called["type"] == "ValueError"


def test_the_timeout_of_a_push_kills_the_task(nodes, mp):
    _, node = nodes
    with pytest.raises(Exception, match=r"0\.5"):
        mp.push(InfoTask("stock.Slow", 0.5, 60)).get(timeout=PATIENCE)
    node.notes.wait("error_callback", type="TimeLimitExceeded")


def test_a_model_without_callbacks(mp):
    assert mp.push(InfoTask("stock.OnlyRunnable", None, 21)).get(timeout=PATIENCE) == 42


def test_a_module_that_is_not_included_is_refused_and_never_imported(nodes, mp):
    _, node = nodes
    mp.push(InfoTask("hidden.Secret", None))
    node.await_log("Received unregistered task of type 'hidden.Secret'")
    assert mp.push(InfoTask("stock.OnlyRunnable", None, 1)).get(timeout=PATIENCE) == 2
    assert node.notes.read("hidden imported") == []
    assert node.notes.read("hidden ran") == []


@pytest.mark.parametrize("name", ["stock.write", "os.system", "stock.Model", "mpworker.model.ModelCall"])
def test_what_is_no_model_of_an_included_module_is_no_task(nodes, mp, name, tmp_path):
    _, node = nodes
    mp.push(InfoTask(name, None, f"touch {tmp_path}/should-not-be"))
    node.await_log(f"Received unregistered task of type '{name}'")
    assert mp.push(InfoTask("stock.OnlyRunnable", None, 1)).get(timeout=PATIENCE) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_pickled_message_is_refused(nodes):
    server, node = nodes
    with client_of(server, task_serializer="pickle", accept_content=["pickle", "json"]) as client:
        client.send_task("stock.Count", args=("pickled",))
        node.await_log("Refusing to deserialize")
    assert not node.notes.read("runnable", items=["pickled"])
