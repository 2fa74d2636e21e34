"""What a worker can and prefork cannot, on a real node: coroutines, progress, slots, the log of a task."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import suppress

import pytest
from celery.exceptions import TimeLimitExceeded
from integration.node import PATIENCE, eventually, running

from mpworker.results.journal import Journal
from mpworker.results.reader import read_entries


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    config = {"imports": ["shop.beyond"], "mpworker_task_log": 2}
    with running(tmp_path_factory.mktemp("shop"), "-c", "1", "-E", config=config) as (server, node, client):
        yield server, node, client


def send(shop, name, *args, **options):
    return shop[2].send_task(name if "." in name else f"shop.beyond.{name}", args=args, **options)


def result_of(shop, name, *args, **options):
    return send(shop, name, *args, **options).get(timeout=PATIENCE)


def test_the_result_of_a_coroutine_is_the_tasks(shop):
    assert result_of(shop, "add_later", 2, 3) == 5


def test_one_worker_has_one_loop(shop):
    assert result_of(shop, "where") == result_of(shop, "where")


def test_an_exception_comes_with_its_traceback_and_its_errback(shop):
    _, node, client = shop
    errback = client.signature("shop.tasks.quiet", args=("errback",), immutable=True)
    result = send(shop, "fail_later", "no tea", link_error=errback)
    with pytest.raises(LookupError, match="no tea"):
        result.get(timeout=PATIENCE)
    assert "raise LookupError(text)" in result.traceback
    node.notes.wait("quiet", name="errback")


def test_retries(shop):
    result = send(shop, "flaky_later", 2)
    assert result.get(timeout=PATIENCE) == [result.id, 2]
    assert result_of(shop, "auto_later", 2) == 2
    with pytest.raises(OSError, match="again"):
        result_of(shop, "auto_later", 9)


def test_tasks_await_each_other_as_functions(shop):
    assert result_of(shop, "depth", 3) == 3
    with pytest.raises(RuntimeError, match=r"await shop\.beyond\.add_later"):
        result_of(shop, "applies")
    assert result_of(shop, "add_later", 1, 1) == 2


def test_a_soft_limit_is_caught_where_the_coroutine_waits(shop):
    assert result_of(shop, "careful_later", soft_time_limit=0.3) == "cleaned up"


def test_a_hard_limit(shop):
    with pytest.raises(TimeLimitExceeded):
        result_of(shop, "careful_later", time_limit=0.3)


def test_callbacks_and_chains(shop):
    _, node, client = shop
    add = client.signature("shop.beyond.add_later")
    linked = client.signature("shop.tasks.quiet", args=("linked",), immutable=True)
    chain = add.clone(args=(1, 2)) | add.clone(args=(10,)).set(link=linked)
    assert chain.delay().get(timeout=PATIENCE) == 13
    node.notes.wait("quiet", name="linked")


def test_models_of_pydantic(shop):
    assert result_of(shop, "double_order", {"item": "tea", "count": 2}) == {"item": "tea", "count": 4}


def test_a_result_that_nobody_wants(shop, tmp_path):
    send(shop, "quiet_later", str(tmp_path / "ran"))
    eventually((tmp_path / "ran").exists)


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def events(shop):
    """All events of tasks, as they come."""
    client, seen, ready, over = shop[2], [], threading.Event(), threading.Event()

    def capture():
        with client.connection_for_read() as connection:
            receiver = client.events.Receiver(connection, handlers={"*": seen.append})
            with receiver.consumer_context(wakeup=False) as (line, *_):
                while not over.is_set():
                    with suppress(TimeoutError):
                        line.drain_events(timeout=0.2)
                    ready.set()  # only when it reads for the first time does it subscribe

    thread = threading.Thread(target=capture)
    thread.start()
    assert ready.wait(PATIENCE)
    yield seen
    over.set()
    thread.join(PATIENCE)


def of(events, result):
    return [event for event in list(events) if event.get("uuid") == result.id]


def release(shop, gate):
    (shop[1].folder / gate).touch()


@pytest.mark.parametrize("name", ["tells", "tells_later"])
def test_progress_is_a_state_and_an_event(shop, events, name):
    _, node, _ = shop
    result = send(shop, name, name)
    last = {"done": 10_000, "total": 10_000, "message": "part 10000"}
    eventually(lambda: result.info == last, what="the last word, though it came at once after others")
    assert result.state == "PROGRESS"
    release(shop, name)
    assert result.get(timeout=PATIENCE) == "done"
    eventually(lambda: of(events, result)[-1]["type"] == "task-succeeded")
    told = [event for event in of(events, result) if event["type"] == "task-progress"]
    assert 2 <= len(told) <= 5
    assert (told[-1]["done"], told[-1]["total"], told[-1]["message"]) == (10_000, 10_000, "the end")
    types = [event["type"] for event in of(events, result)]
    assert types[:2] == ["task-received", "task-started"]
    assert types[2:] == ["task-progress"] * len(told) + ["task-succeeded"]
    written = "".join(path.read_text() for path in node.journal.glob("*.jsonl"))
    assert [line["status"] for line in map(json.loads, written.splitlines()) if line["task_id"] == result.id] == [
        "SUCCESS"
    ]


def test_a_task_without_a_result_stores_no_progress(shop, events):
    server, _, _ = shop
    result = send(shop, "tells_only", "only")
    eventually(lambda: [event for event in of(events, result) if event.get("message") == "part 10000"])
    release(shop, "only")
    eventually(lambda: of(events, result)[-1]["type"] == "task-succeeded")
    assert not server.client().exists(f"celery-task-meta-{result.id}")


def test_progress_never_comes_after_the_end_of_its_run(shop):
    server, _, _ = shop
    with server.client().pubsub() as listener:
        listener.psubscribe("celery-task-meta-*")
        results = [send(shop, "tells_to_the_end") for _ in range(20)]
        assert {result.get(timeout=PATIENCE) for result in results} == {"done"}
        send(shop, "add_later", 1, 1).get(timeout=PATIENCE)  # behind whatever might still have come
        said = {result.id: [] for result in results}
        while message := listener.get_message(timeout=0.2):
            if message["type"] == "pmessage":
                meta = json.loads(message["data"])
                said.get(meta["task_id"], []).append(meta["status"])
    assert any("PROGRESS" in states for states in said.values())
    for states in said.values():
        assert states[-1] == "SUCCESS"
        assert [state for state in states if state != "PROGRESS"] == ["RETRY", "SUCCESS"]
        assert states.count("PROGRESS") <= 2


# -- the log -----------------------------------------------------------------------------------------------------------


def record_of(node, result, status=None):
    def newest():
        found = [record for record in records(node) if record.task_id == result.id]
        return [record for record in found if record.status == (status or result.state)]

    return eventually(newest)[-1]


def records(node):
    return [entry.record for entry in read_entries(Journal.files(node.journal))]


def log_of(node, result, status=None):
    return record_of(node, result, status).log


def check_said(log, what):
    lines = log.splitlines()
    assert lines[:3] == [f"printed {what}", f"written {what}", f"lines {what}"]
    assert lines[3].endswith(f"WARNING/shop.beyond] logged {what}")
    assert lines[4].endswith(f"DEBUG/quiet] quietly {what}")
    assert lines[5].endswith("ERROR/quiet] caught")
    assert lines[6] == "Traceback (most recent call last):"
    assert lines[-1] == f"KeyError: '{what}'"


@pytest.mark.parametrize("end", ["", "fail", "leave", "exit", "kill", "limit", "revoke", "orphan"])
def test_what_a_task_said_is_in_its_record_however_it_ended(shop, end):
    _, node, client = shop
    what = f"é{end}"
    limit = {"time_limit": 0.5} if end == "limit" else {}
    result = send(shop, "says", what, "sleep" if end in ("limit", "revoke", "orphan") else end, **limit)
    if end in ("revoke", "orphan"):
        node.notes.wait("says", name=what)
    if end == "revoke":
        client.control.revoke(result.id, terminate=True)
    if end == "orphan":
        os.kill(node.pids("mpworker: dispatcher")[0], signal.SIGKILL)
    eventually(lambda: result.state in ("SUCCESS", "FAILURE", "REVOKED"))
    check_said(log_of(node, result), what)
    assert result.state == {"": "SUCCESS", "revoke": "REVOKED"}.get(end, "FAILURE")
    silent = send(shop, "add_later", 1, 1)
    silent.get(timeout=PATIENCE)
    assert log_of(node, silent) is None


def test_each_run_has_its_own(shop):
    _, node, _ = shop
    result = send(shop, "says", "twice", "retry")
    assert result.get(timeout=PATIENCE) == "said"
    check_said(log_of(node, result, "RETRY"), "twice")
    check_said(log_of(node, result, "SUCCESS"), "twice")


def test_only_the_last_of_it_is_kept(shop):
    _, node, _ = shop
    result = send(shop, "says_much", "é" * 50, 1000)
    result.get(timeout=PATIENCE)
    log = log_of(node, result)
    assert 2000 < len(log.encode()) <= 2048
    assert log.endswith("".join(f"{n} {'é' * 50}\n" for n in range(985, 1000)))


# -- processes of a task -----------------------------------------------------------------------------------------------


def test_a_task_may_use_processes(shop):
    assert result_of(shop, "uses_processes") == [7, [1, 2], 8, "done\n"]


def test_all_of_them_die_with_the_task(shop):
    _, node, _ = shop
    result_of(shop, "add_later", 1, 1)
    before = len(node.processes())
    for limit in (2.5, 8.0, 20.0):  # a machine may be too busy for all of them to start
        with pytest.raises(TimeLimitExceeded):
            result_of(shop, "family", f"within {limit:g} s", time_limit=limit)
        members = node.notes.read("member", name=f"within {limit:g} s")
        if len(members) == 4:
            break
    assert {member["of"] for member in members} == {"process", "pool", "inner", "shell"}
    result_of(shop, "add_later", 1, 1)  # the next worker is there
    eventually(lambda: len(node.processes()) == before, what="none left, neither theirs nor those of their pools")
    pids = {member["pid"] for member in members} | {member.get("shell") for member in members}
    assert not pids & node.processes().keys()


# -- slots -------------------------------------------------------------------------------------------------------------


def test_each_slot_has_its_variables_before_the_application_is_imported_also_when_the_pool_grows(tmp_path):
    env = {"SHOP_DEVICE": "gpu{slot}", "SHOP_PORT": "80{slot:02d}"}
    config = {"imports": ["shop.beyond"], "mpworker_worker_env": env, "worker_prefetch_multiplier": 1}
    config |= {"worker_redirect_stdouts": False, "mpworker_task_log": 1}
    with running(tmp_path, "--autoscale=2,1", config=config) as (_, node, client):
        results = [client.send_task("shop.beyond.device", (f"gate-{n}",)) for n in range(2)]
        for n in range(2):
            node.notes.wait("device", name=f"gate-{n}")
        for n in range(2):
            (node.folder / f"gate-{n}").touch()
        found = sorted(result.get(timeout=PATIENCE) for result in results)
        assert found == [[slot, f"gpu{slot}", f"gpu{slot}", f"800{slot}"] for slot in range(2)]
        assert "start method forkserver: with mpworker_worker_env" in node.log()
        os.kill(node.pids("mpworker: dispatcher")[0], signal.SIGKILL)
        slot, *again = client.send_task("shop.beyond.device", ("gate-0",)).get(timeout=PATIENCE)
        assert again == [f"gpu{slot}", f"gpu{slot}", f"800{slot}"]
        said = client.send_task("shop.beyond.says", ("this",))
        assert said.get(timeout=PATIENCE) == "said"
        check_said(log_of(node, said), "this")
        assert "\nprinted this\n" in node.log()
        raw = client.send_task("shop.beyond.says_much", ("", 1))
        raw.get(timeout=PATIENCE)
        assert log_of(node, raw).endswith("bytes \ufffd\n0 \n")
