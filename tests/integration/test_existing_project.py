"""An existing Celery project on the pool: with one line in its code, and with none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import support
from celery import chain, chord, group
from celery.exceptions import TimeoutError as ResultTimeout
from integration.node import PATIENCE, ask, eventually, running


@pytest.fixture(scope="module", params=[True, False], ids=["installed", "environment-only"])
def shop(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with running(folder, "-c", "2", install=request.param) as (server, node, client):
        node.installed = request.param
        yield server, node, client


@pytest.fixture
def call(shop):
    _, _, client = shop

    def make(name, *args, **kwargs):
        return client.signature(f"shop.tasks.{name}", args=args, kwargs=kwargs)

    return make


def get(result):
    return result.get(timeout=PATIENCE)


def test_the_pool_is_ours(shop, call):
    _, node, _ = shop
    pids = node.pids("mpworker: worker")
    assert len(pids) == 2
    assert len(node.pids("mpworker: dispatcher")) == 1
    ran = get(call("describe").delay())
    assert ran["pid"] in pids
    assert ran["title"].startswith("mpworker: worker")


def test_return_values(call):
    assert get(call("add", 1, 2).delay()) == 3
    assert get(call("add", [1], ["é\U0001f600"]).delay()) == [1, "é\U0001f600"]


def test_a_big_message_and_a_big_result(call):
    size = 3_000_000
    assert get(call("echo_size", "x" * size).delay()) == size
    assert len(get(call("big", size).delay())) == size


def test_an_exception_arrives_with_its_type_and_traceback(call):
    result = call("fail", "no such thing").delay()
    with pytest.raises(ValueError, match="no such thing"):
        get(result)
    assert result.state == "FAILURE"
    assert "in fail\n    raise ValueError(text)" in result.traceback


def test_an_exception_that_does_not_unpickle_fails_only_its_task(call):
    result = call("out_of_stock").delay()
    with pytest.raises(Exception, match="3 of tea") as caught:
        get(result)
    assert "OutOfStock" in repr(caught.value)
    assert get(call("add", 1, 1).delay()) == 2


def test_a_result_that_cannot_be_stored_fails_the_task(call):
    result = call("unprintable").delay()
    with pytest.raises(Exception, match="not JSON serializable"):
        get(result)


def test_retries(shop, call):
    _, node, _ = shop
    result = call("flaky", 3).delay()
    assert get(result) == 3
    assert len(node.notes.wait("retry", 3, id=result.id)) == 3
    assert len(node.notes.wait("success", id=result.id)) == 1
    assert node.notes.read("failure", id=result.id) == []
    assert get(call("auto").delay()) == 2


def test_retries_that_run_out(shop, call):
    _, node, _ = shop
    result = call("hopeless").delay()
    with pytest.raises(LookupError, match="never"):
        get(result)
    assert len(node.notes.wait("failure", id=result.id)) == 1


def test_chain(call):
    result = chain(call("add", 1, 1), call("add", 2), call("add", 4)).delay()
    assert get(result) == 8
    assert result.parent.get(timeout=PATIENCE) == 4


def test_group(call):
    assert get(group(call("add", n, n) for n in range(20)).delay()) == [2 * n for n in range(20)]


def test_chord(call):
    assert get(chord([call("add", n, 1) for n in range(10)])(call("total"))) == 55


def test_a_chord_with_a_failing_part_fails(call):
    result = chord([call("add", 1, 1), call("fail", "one part")])(call("total"))
    with pytest.raises(Exception, match="one part"):
        get(result)


def test_nested_canvas(call):
    inner = group(chain(call("add", n, 1), call("add", 1)) for n in range(3))
    assert get(chord(inner)(call("total"))) == 9
    assert get(chain(group(call("add", 1, n) for n in range(3)), call("total"), call("add", 100)).delay()) == 106


def test_replace_with_a_chord(call):
    assert get(call("spread", [1, 2, 3]).delay()) == 9


def test_a_task_started_by_a_task(shop, call):
    _, _, client = shop
    child = get(call("parent", 21).delay())
    assert client.AsyncResult(child).get(timeout=PATIENCE) == 42


def test_link_and_link_error(shop, call):
    _, node, _ = shop
    call("add", 1, 1).apply_async(
        link=call("quiet", "linked").set(immutable=True), link_error=call("quiet", "not me").set(immutable=True)
    )
    node.notes.wait("quiet", name="linked")
    call("fail", "x").apply_async(link_error=call("quiet", "error linked").set(immutable=True))
    node.notes.wait("quiet", name="error linked")
    assert node.notes.read("quiet", name="not me") == []


def test_countdown_and_eta(call):
    begun = datetime.now(UTC)
    soon = call("add", 1, 2).apply_async(countdown=0.5)
    later = call("add", 3, 4).apply_async(eta=begun + timedelta(seconds=0.7))
    assert get(later) == 7
    assert get(soon) == 3
    assert datetime.now(UTC) - begun >= timedelta(seconds=0.7)


def test_an_expired_task_does_not_run(shop, call):
    _, node, _ = shop
    result = call("quiet", "too late").apply_async(expires=datetime.now(UTC) - timedelta(seconds=5))
    node.notes.wait("revoked", id=result.id, expired=True)
    assert node.notes.read("quiet", name="too late") == []


def test_an_ignored_result_is_not_stored(shop, call):
    server, node, _ = shop
    result = call("quiet", "silent").apply_async(ignore_result=True)
    node.notes.wait("postrun", id=result.id)
    eventually(lambda: f"{result.id}] succeeded" in node.log())
    assert server.client().get(f"celery-task-meta-{result.id}") is None


def test_ignore_and_reject(shop, call):
    server, node, client = shop
    ignored, rejected = call("ignored").delay(), call("rejected").delay()
    node.notes.wait("postrun", id=ignored.id)
    node.notes.wait("postrun", id=rejected.id)
    eventually(lambda: server.client().hlen("unacked") == 0, what="both are settled")
    assert client.AsyncResult(ignored.id).state == "PENDING"
    node.await_log(f"{rejected.id}] reject requeue=False")


def test_the_request_is_complete(shop, call):
    _, node, _ = shop
    options = {"headers": {"x_color": "red"}, "soft_time_limit": 30, "time_limit": 40}
    result = call("describe", 1, two=2).apply_async(**options)
    seen = get(result)
    assert (seen["id"], seen["task"], seen["hostname"]) == (result.id, "shop.tasks.describe", node.name)
    assert (seen["args"], seen["kwargs"], seen["retries"]) == ([1], {"two": 2}, 0)
    assert seen["delivery_info"]["routing_key"] == "celery"
    assert seen["delivery_info"]["redelivered"] in (False, None)
    assert (seen["timelimit"], seen["root_id"], seen["header"]) == ([40, 30], result.id, "red")
    assert (seen["is_eager"], seen["called_directly"]) == (False, False)


def test_hooks_of_a_task_class(shop, call):
    _, node, _ = shop
    good, bad, again = (call("counted", action).delay() for action in ("ok", "fail", "retry"))
    assert get(good) == "ok"
    with pytest.raises(KeyError):
        get(bad)
    assert get(again) == "retry"
    for result, kinds in (
        (good, ["before_start", "on_success", "after_return"]),
        (bad, ["before_start", "on_failure", "after_return"]),
        (again, ["before_start", "before_start", "on_retry", "on_success", "after_return"]),
    ):
        for kind in kinds:
            node.notes.wait(kind, kinds.count(kind), id=result.id)
        own = {"before_start", "on_success", "on_failure", "on_retry", "after_return"}
        # Sorted: the second run may begin in the other process before the first has called its hook.
        assert sorted(note["kind"] for note in node.notes.read(id=result.id) if note["kind"] in own) == sorted(kinds)


def test_signals_are_sent_in_the_process_of_the_task(shop, call):
    _, node, _ = shop
    result = call("add", 40, 2).delay()
    get(result)
    node.notes.wait("postrun", id=result.id)
    seen = [note for note in node.notes.read(id=result.id) if note["kind"] in ("prerun", "success", "postrun")]
    assert [note["kind"] for note in seen] == ["prerun", "success", "postrun"]
    assert seen[1]["result"] == 42
    assert seen[2]["state"] == "SUCCESS"
    assert len({note["pid"] for note in seen}) == 1
    assert seen[0]["pid"] in node.pids("mpworker: worker")
    failed = call("fail", "seen").delay()
    with pytest.raises(ValueError, match="seen"):
        get(failed)
    node.notes.wait("postrun", id=failed.id, state="FAILURE")
    (failure,) = node.notes.read("failure", id=failed.id)
    assert (failure["exc"], failure["einfo"]) == ("ValueError", "ExceptionInfo")
    assert failure["pid"] in node.pids("mpworker: worker")


def test_each_process_announces_itself(shop):
    _, node, _ = shop
    announced = node.notes.read("process_init")
    assert {note["pid"] for note in announced} >= set(node.pids("mpworker: worker"))
    assert {note["sender"] for note in announced} == {node.name}
    assert node.pid not in {note["pid"] for note in announced}


def test_a_task_that_nobody_registered_is_dropped_with_a_line(shop, call):
    _, node, client = shop
    client.send_task("shop.tasks.unknown")
    node.await_log("Received unregistered task of type 'shop.tasks.unknown'")
    assert get(call("add", 2, 2).delay()) == 4


def test_waiting_in_vain_ends(shop, call):
    _, node, _ = shop
    result = call("hold", "gate-in-vain").delay()
    with pytest.raises(ResultTimeout):
        result.get(timeout=0.1)
    (node.folder / "gate-in-vain").touch()
    assert get(result) == "gate-in-vain"


def test_inspect_sees_what_runs_and_what_waits(tmp_path):
    with running(tmp_path, "-c", "1", config={"worker_prefetch_multiplier": 4}) as (_, node, client):
        running_one, waiting = (client.send_task("shop.tasks.hold", args=(name,)) for name in ("gate-a", "gate-b"))
        node.notes.wait("hold", name="gate-a")
        stats = ask(client, node, "stats")
        assert stats["pool"]["max-concurrency"] == 1
        assert stats["pool"]["processes"] == node.pids("mpworker: worker")
        assert stats["pool"]["implementation"] == "mpworker.celery.pool:TaskPool"
        assert stats["pool"]["max-tasks-per-child"] == "N/A"
        (active,) = eventually(lambda: ask_for(client, node, "active"))
        assert (active["id"], active["worker_pid"]) == (running_one.id, node.pids("mpworker: worker")[0])
        assert active["time_start"] is not None
        (reserved,) = eventually(lambda: [t for t in ask_for(client, node, "reserved") if t["id"] != running_one.id])
        assert reserved["id"] == waiting.id
        for name in ("gate-a", "gate-b"):
            (node.folder / name).touch()
        assert [get(running_one), get(waiting)] == ["gate-a", "gate-b"]
        eventually(lambda: not ask_for(client, node, "active"))
        assert ask(client, node, "ping") == {"ok": "pong"}
        eventually(lambda: ask(client, node, "stats")["total"].get("shop.tasks.hold") == 2)


def ask_for(client, node, what):
    inspect = client.control.inspect(destination=[node.name], timeout=PATIENCE, limit=1)
    return getattr(inspect, what)()[node.name]


SCRIPT = """
import os, threading
from pathlib import Path
import mpworker, support
from celery import Celery, shared_task, signals

app = mpworker.install(Celery("own", broker="memory://", broker_transport_options={"polling_interval": 0.01}))
done = support.Signpost(Path("done").absolute())

@shared_task
def work():
    done.set(work.name)

@signals.worker_ready.connect
def use(**_):
    work.delay()  # finds the app that is current in the main process
    threading.Thread(target=leave, daemon=True).start()

def leave():
    try:
        done.wait(10.0)
    finally:
        os._exit(0)  # a warm shutdown takes seconds with this broker

if __name__ == "__main__":
    app.worker_main(["worker", "-c", "1", "--without-mingle", "--without-gossip", "--without-heartbeat"])
"""


def test_a_script_that_is_its_own_application(tmp_path):
    """Worker processes import it by another name; its tasks keep theirs."""
    ended = support.run_script(SCRIPT, tmp_path)
    assert (ended.code, support.lines(tmp_path / "done")) == (0, ["own.work"]), ended.err
