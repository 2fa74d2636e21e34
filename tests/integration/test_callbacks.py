"""``@app.task(callback=f, error_callback=g)``: exactly one of them for each finished task, in a process of its own."""

from __future__ import annotations

import os
import signal

import pytest
from integration.node import PATIENCE, eventually, running

BAD = ("raise", "exit", "sysexit", "hang")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    env = {"MPWORKER_CALLBACK_TIME_LIMIT": "2"}
    with running(tmp_path_factory.mktemp("shop"), "-c", "2", env=env) as (server, node, client):
        yield server, node, client


def send(shop, name, *args, **options):
    return shop[2].send_task(name if "." in name else f"shop.hooks.{name}", args=args, **options)


def called(node):
    return [note for note in node.notes.read() if note["kind"] in ("callback", "error_callback")]


def told(shop):
    """Every callback so far; what is still to come of earlier tasks comes before that of a later one."""
    _, node, client = shop
    fence = f"fence {len(node.notes.read())}"
    client.send_task("shop.hooks.hooked", args=("return", fence))
    node.notes.wait("callback", of=fence)
    return called(node)


def news(notes, before):
    return [note for note in notes[len(before) :] if not str(note.get("of", "")).startswith("fence")]


def only(shop, before):
    """The one callback since ``before``; it ran neither in the main process nor in a worker."""
    _, node, _ = shop
    eventually(lambda: news(called(node), before), what="a callback")  # a client may hear of the result first
    (note,) = news(told(shop), before)
    assert note["pid"] in node.pids("mpworker: callbacks")
    assert note["pid"] != node.pid
    assert note["pid"] not in {note["pid"] for note in node.notes.read("run")}
    # With a log file named by %i each process has its own; the main process has 0.
    assert note["log_file"] not in {"0", *(note["log_file"] for note in node.notes.read("run"))}
    return note


@pytest.mark.parametrize(
    ("value", "type_name"),
    [("text", "str"), ({"a": [1, None, 2.5]}, "dict"), (None, "NoneType"), ("x" * 200_000, "str")],
)
def test_after_a_success_with_the_result(shop, value, type_name):
    before = told(shop)
    assert send(shop, "hooked", "return", value).get(timeout=PATIENCE) == value
    note = only(shop, before)
    assert (note["kind"], note["of"], note["type"]) == ("callback", value, type_name)


def test_with_a_result_that_is_never_stored(shop):
    _, node, _ = shop
    send(shop, "receipt", 4711, ignore_result=True)
    (note,) = node.notes.wait("callback", of=4711)
    assert note["type"] == "Receipt"


def test_after_an_exception_with_the_exception(shop):
    before = told(shop)
    with pytest.raises(ValueError, match="why"):
        send(shop, "hooked", "raise", "why").get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"], note["text"], note["is_exception"]) == (
        "error_callback",
        "ValueError",
        "why",
        True,
    )


def test_after_retries_once(shop):
    before = told(shop)
    assert send(shop, "hooked", "retry", "third time").get(timeout=PATIENCE) == "third time"
    note = only(shop, before)
    assert (note["kind"], note["of"]) == ("callback", "third time")


def test_after_retries_in_vain_once(shop):
    before = told(shop)
    with pytest.raises(OSError, match="for ever"):
        send(shop, "hooked", "exhaust").get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "OSError")


def test_after_a_process_that_stored_its_success_and_was_killed(shop):
    before = told(shop)
    assert send(shop, "last_words", "stored").get(timeout=PATIENCE) == "stored"
    note = only(shop, before)
    assert (note["kind"], note["of"]) == ("callback", "stored")


def test_a_coroutine_function(shop):
    before = told(shop)
    send(shop, "hooked_later", "in the end").get(timeout=PATIENCE)
    assert only(shop, before)["of"] == "in the end"


def test_after_a_hard_limit(shop):
    before = told(shop)
    with pytest.raises(Exception, match=r"0\.5"):
        send(shop, "hooked", "sleep", time_limit=0.5).get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "TimeLimitExceeded")


def test_after_a_soft_limit(shop):
    before = told(shop)
    with pytest.raises(Exception, match=r"0\.3"):
        send(shop, "hooked", "sleep", soft_time_limit=0.3).get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "SoftTimeLimitExceeded")


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_after_the_workers_death(shop, how):
    before = told(shop)
    with pytest.raises(Exception, match="Worker exited prematurely"):
        send(shop, "hooked", how).get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "WorkerLostError")


def asleep(shop):
    """A task that runs, and does not end by itself."""
    _, node, _ = shop
    runs = len(node.notes.read("run", action="sleep"))
    result = send(shop, "hooked", "sleep")
    node.notes.wait("run", runs + 1, action="sleep")
    return result


def test_after_the_dispatchers_death(shop):
    _, node, _ = shop
    before, result = told(shop), asleep(shop)
    os.kill(node.pids("mpworker: dispatcher")[0], signal.SIGKILL)
    with pytest.raises(Exception, match="Worker exited prematurely"):
        result.get(timeout=PATIENCE)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "WorkerLostError")


def test_after_revoke_terminate(shop):
    _, _, client = shop
    before, result = told(shop), asleep(shop)
    client.control.revoke(result.id, terminate=True, reply=True, timeout=PATIENCE, limit=1)
    note = only(shop, before)
    assert (note["kind"], note["type"]) == ("error_callback", "TaskRevokedError")


def test_after_sys_exit(shop):
    before = told(shop)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - whichever class Celery makes of it
        send(shop, "hooked", "sysexit").get(timeout=PATIENCE)
    assert only(shop, before)["kind"] == "error_callback"


def test_an_error_callback_alone(shop):
    _, _node, _ = shop
    before = told(shop)
    assert send(shop, "shop.only_errors", False).get(timeout=PATIENCE) is None
    assert news(told(shop), before) == []
    before = told(shop)
    with pytest.raises(ValueError, match="only this one"):
        send(shop, "shop.only_errors", True).get(timeout=PATIENCE)
    assert only(shop, before)["text"] == "only this one"


@pytest.mark.parametrize("how", BAD)
def test_a_bad_callback_harms_nothing_and_is_logged(shop, how):
    _, node, _ = shop
    bad = send(shop, "badly_hooked", how)
    assert bad.get(timeout=PATIENCE) == how
    other = send(shop, "hooked", "return", f"after a callback that did {how}")
    assert other.get(timeout=PATIENCE) == f"after a callback that did {how}"
    node.notes.wait("callback", of=f"after a callback that did {how}")
    assert len(node.notes.read("bad", how=how)) == 1
    line = next(
        line
        for line in eventually(
            lambda: [line for line in node.log().splitlines() if "a callback of" in line and bad.id in line]
        )
    )
    assert f"shop.hooks.badly_hooked[{bad.id}]" in line
    assert {"raise": "the callback's own error", "hang": "2 s", "exit": "code 3", "sysexit": "3"}[how] in line


def test_as_many_callbacks_as_tasks_and_in_order(shop):
    _, node, _ = shop
    results = [send(shop, "hooked", "return", f"many {n}") for n in range(60)]
    assert [result.get(timeout=PATIENCE) for result in results] == [f"many {n}" for n in range(60)]
    eventually(lambda: len([n for n in node.notes.read("callback") if str(n["of"]).startswith("many ")]) >= 60)
    seen = [note for note in node.notes.read("callback") if str(note["of"]).startswith("many ")]
    assert sorted(note["of"] for note in seen) == sorted(f"many {n}" for n in range(60))
    assert len({note["pid"] for note in seen}) == 1


def test_shutdown_waits_for_callbacks(tmp_path):
    with running(tmp_path, "-c", "1") as shop:
        _, node, _ = shop
        results = [send(shop, "hooked", "return", f"last {n}") for n in range(10)]
        for result in results:
            result.get(timeout=PATIENCE)
        assert node.stop() == 0
        assert {note["of"] for note in node.notes.read("callback")} == {f"last {n}" for n in range(10)}
        node.await_gone()
        begun, gone = ([note["role"] for note in node.notes.read(f"process_{what}")] for what in ("init", "shutdown"))
        assert sorted(begun) == sorted(gone) == ["callbacks", "worker-0"]
