"""What is brought to a real Redis late: what it may replace there, how long it lives, who hears of it."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis
from celery import Celery, signals
from integration.node import PROJECTS, Server, eventually

from mpworker.celery import shipping
from mpworker.celery.backend import ResultBackend
from mpworker.celery.delivery import Delivery, deliver_all
from mpworker.celery.shipping import Shipping
from mpworker.errors import ConfigurationError, StoreError
from mpworker.results import shipper as shippers
from mpworker.results.bell import Bell
from mpworker.results.journal import Journal
from mpworker.results.record import SHIPPED, SUPERSEDED, Record
from mpworker.results.shipper import Pass, Shipper, Witness
from mpworker.settings import Settings

CLASS = "mpworker.celery.backend:ResultBackend"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def app_of(server: Server) -> Celery:
    app = Celery("t", broker=server.broker, backend=f"mpworker+{server.results}", set_as_current=False)
    app.loader.override_backends = {"mpworker": CLASS}
    return app


def close(app: Celery) -> None:
    app.backend.result_consumer.cancel_for = lambda task_id: None
    app.close()


@pytest.fixture
def app(server: Server) -> Iterator[Celery]:
    server.client().flushdb()
    app = app_of(server)
    yield app
    close(app)


@pytest.fixture(params=[True, False], ids=["script", "no script"])
def deliver(app: Celery, request: pytest.FixtureRequest) -> Delivery:
    assert isinstance(app.backend, ResultBackend)
    app.backend.scripted = request.param
    return Delivery(app.backend)


@contextmanager
def fresh() -> Iterator[tuple[Server, Celery]]:
    """A server of its own, which may be killed and loses nothing by that, and an app that keeps its results there."""
    with Server(appendfsync="always") as server:
        app = app_of(server)
        try:
            yield server, app
        finally:
            close(app)


@contextmanager
def shipping_in(app: Celery, folder: Path) -> Iterator[None]:
    """A node's shipper runs, as far as Celery's signals tell it."""
    shipping.start_with(app, Settings(journal=folder), "n")
    signals.worker_ready.send(sender=Sender(app))
    try:
        yield
    finally:
        signals.worker_shutdown.send(sender=Sender(app))


def limited(server: Server, app: Celery, *rules: str) -> Delivery:
    """As a user of Redis who may not do everything."""
    client = server.client()
    client.acl_setuser(
        "few", enabled=True, reset=True, passwords=["+x"], keys=["*"], channels=["*"], categories=["+@all"]
    )
    client.execute_command("ACL", "SETUSER", "few", *rules)
    app.backend.connparams.update(username="few", password="x")
    return Delivery(app.backend)


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


def record(status: str, when: float = 0.0, text: str = "", **fields: Any) -> Record:
    done = at(when) if status in ("SUCCESS", "FAILURE", "REVOKED") else None
    meta = {"status": status, "result": text, "date_done": done, "task_id": "t"}
    payload = json.dumps(meta | ({"told": time.time() + when} if status == "PROGRESS" else {}))
    name = fields.setdefault("task_id", "t")
    values = {"timestamp": at(when), "key": f"celery-task-meta-{name}", "payload": payload, "expires": 60, **fields}
    return Record(status=status, **values)


def held(server: Server, name: str = "t") -> str | None:
    found = server.client().get(f"celery-task-meta-{name}")
    return None if found is None else json.loads(found)["status"]


@pytest.mark.parametrize(
    ("there", "late", "then", "digit"),
    [
        (None, ("STARTED", 0), "STARTED", SHIPPED),
        (None, ("SUCCESS", -30), "SUCCESS", SHIPPED),
        (("STARTED", 0), ("SUCCESS", -5), "SUCCESS", SHIPPED),
        (("STARTED", 0), ("RETRY", -5), "RETRY", SHIPPED),
        (("RETRY", 0), ("STARTED", -5), "RETRY", SHIPPED),
        (("RETRY", -1), ("STARTED", 0), "STARTED", SHIPPED),
        (("PROGRESS", 0), ("STARTED", -1), "PROGRESS", SHIPPED),
        (("PROGRESS", 0), ("RETRY", -1), "PROGRESS", SHIPPED),
        (("PROGRESS", -1), ("STARTED", 0), "STARTED", SHIPPED),
        (("PROGRESS", 0), ("SUCCESS", -1), "SUCCESS", SHIPPED),
        (("SUCCESS", -9), ("FAILURE", 0), "SUCCESS", SUPERSEDED),
        (("SUCCESS", -9), ("STARTED", 0), "SUCCESS", SUPERSEDED),
        (("FAILURE", 0), ("STARTED", -5), "FAILURE", SHIPPED),
        (("FAILURE", 0), ("RETRY", -5), "FAILURE", SHIPPED),
        (("FAILURE", 0), ("REVOKED", -5), "FAILURE", SHIPPED),
        (("FAILURE", -9), ("REVOKED", 0), "REVOKED", SHIPPED),
        (("FAILURE", -9), ("RETRY", 0), "RETRY", SHIPPED),
        (("FAILURE", -0.5), ("RETRY", 0), "FAILURE", SHIPPED),
        (("FAILURE", 0), ("SUCCESS", -9), "SUCCESS", SHIPPED),
    ],
)
def test_what_is_late_replaces_only_what_is_older(
    server: Server, deliver: Delivery, there: Any, late: Any, then: str, digit: bytes
) -> None:
    if there is not None:
        server.client().set("celery-task-meta-t", record(*there).payload)
    assert deliver([record(*late)]) == [digit]
    assert held(server) == then


def test_it_lives_for_what_is_left_of_its_time(server: Server, deliver: Delivery) -> None:
    deliver([record("SUCCESS", -40.0)])
    assert 10_000 < server.client().pttl("celery-task-meta-t") <= 20_000
    deliver([record("SUCCESS", text="for ever", expires=None, key="other")])
    assert server.client().ttl("other") == -1


def test_who_waits_hears_of_it(app: Celery, deliver: Delivery) -> None:
    result = app.AsyncResult("t")
    app.backend.add_pending_result(result)
    deliver([record("SUCCESS", text="at last")])
    assert result.get(timeout=30) == "at last"


def test_delivered_twice_is_delivered_once(server: Server, deliver: Delivery) -> None:
    same = record("FAILURE", -1.0)
    assert deliver([same]) == deliver([same]) == [SHIPPED]
    assert held(server) == "FAILURE"


def test_a_key_of_another_kind_is_in_nobodys_way(server: Server, deliver: Delivery) -> None:
    server.client().rpush("celery-task-meta-t", "a list")
    assert deliver([record("SUCCESS"), record("SUCCESS", key="other")]) == [SUPERSEDED, SHIPPED]
    assert server.client().exists("other")


def test_a_history_that_is_none_is_in_nobodys_way(
    server: Server, app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    server.client().set(app.backend.history_key, "somebody else's")
    deliver = Delivery(app.backend)
    assert deliver([record("SUCCESS"), record("SUCCESS", key="other")]) == [SHIPPED, SHIPPED]
    assert held(server) == "SUCCESS"
    assert "keeps no history" in caplog.text


def test_descriptors_may_have_high_numbers(server: Server, app: Celery, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 1100), before[1]))
    plain = Bell()
    bell = Bell(*(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1030) for fd in plain.fds))
    until, end = os.pipe()
    thread = threading.Thread(target=Shipping(app, Settings(journal=tmp_path), "n").follow, args=(bell, until))
    thread.start()
    try:
        eventually(lambda: server.client().keys("*mpworker-journal-*"), what="the first look")
        Journal(tmp_path, "n").append(record("SUCCESS"))
        bell.ring()
        eventually(lambda: held(server) == "SUCCESS")
    finally:
        os.close(end)
        thread.join()
        os.close(until)
        bell.close()
        plain.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("garbage", ["\x80pickled", "[1]", "null"])
def test_what_nobody_can_read_is_replaced(server: Server, deliver: Delivery, garbage: str) -> None:
    server.client().set("celery-task-meta-t", garbage)
    assert deliver([record("SUCCESS")]) == [SHIPPED]
    assert held(server) == "SUCCESS"


def test_a_server_that_refuses_scripts(server: Server, app: Celery) -> None:
    deliver = limited(server, app, "-eval", "-evalsha", "-script")
    assert deliver([record("SUCCESS")]) == [SHIPPED]
    assert held(server) == "SUCCESS"
    assert not app.backend.scripted


def test_a_user_who_may_use_the_keys_of_results_only(server: Server, app: Celery) -> None:
    deliver = limited(server, app, "resetkeys", "~celery-*")
    assert deliver.ask_token("f") == ""
    assert deliver.give_token("f").token == deliver.ask_token("f") != ""
    server.client().config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.ResponseError, match="maxmemory"):  # it may well take it later
            deliver.give_token("f")
    finally:
        server.client().config_set("maxmemory", 0)
    deliver = limited(server, app, "resetkeys", "~other-*", "-info")
    assert deliver.give_token("f") == Witness("", "")
    assert deliver.ask_token("f") is None
    assert deliver.ask_server() == ""


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/St_Johns"])
def test_times_of_any_zone_are_compared(server: Server, deliver: Delivery, zone: str) -> None:
    for minutes, then in ((-5, "REVOKED"), (5, "FAILURE")):
        done = (datetime.now(ZoneInfo(zone)) + timedelta(minutes=minutes)).isoformat()
        there = {"status": "FAILURE", "result": None, "date_done": done, "task_id": "t"}
        server.client().set("celery-task-meta-t", json.dumps(there))
        assert deliver([record("REVOKED")]) == [SHIPPED]
        assert held(server) == then


# -- a node's shipper --------------------------------------------------------------------------------------------------


class Sender:
    def __init__(self, app: Celery) -> None:
        self.app = app


@pytest.fixture
def folder(app: Celery, tmp_path: Path) -> Iterator[Path]:
    """The journal of a node whose shipper runs, as far as Celery's signals tell it."""
    folder = tmp_path / "journal"
    folder.mkdir(mode=0o700)
    with shipping_in(app, folder):
        yield folder


def leave(folder: Path, **fields: Any) -> None:
    journal = Journal(folder, "n")
    journal.append(record("SUCCESS", -10.0, **fields))
    journal.close()


def shipped(folder: Path) -> list[int]:
    return [json.loads(line)["shipped"] for file in Journal.files(folder) for line in file.read_bytes().splitlines()]


def test_a_running_node_brings_what_was_left(server: Server, folder: Path) -> None:
    leave(folder)
    eventually(lambda: held(server) == "SUCCESS" and shipped(folder) == [1])


def test_looking_costs_no_new_connections(server: Server, folder: Path) -> None:
    def looks() -> int:
        return int(server.client().info("commandstats").get("cmdstat_get", {}).get("calls", 0))

    eventually(lambda: looks() > 0)
    before, connections = looks(), server.client().info("stats")["total_connections_received"]
    client = server.client()
    eventually(lambda: int(client.info("commandstats")["cmdstat_get"]["calls"]) >= before + 2)
    assert client.info("stats")["total_connections_received"] - connections <= 2  # ours: of looks() and of this


@contextmanager
def refusing(server: Server, how: str) -> Iterator[None]:
    """It takes nothing inside."""
    client = server.client()
    if how == "full":
        client.config_set("maxmemory", 1)
    elif how == "a replica":
        client.replicaof("127.0.0.1", 1)
    else:
        client.config_set("requirepass", "x")
        for other in client.client_list():
            if other["id"] != str(client.client_id()):
                client.client_kill_filter(_id=other["id"])
    try:
        yield
    finally:
        client = server.client(password="x") if how == "closed" else client
        client.config_set("maxmemory", 0)
        client.config_set("requirepass", "")
        client.replicaof("NO", "ONE")


@pytest.mark.parametrize("how", ["full", "a replica", "closed"])
def test_a_redis_that_refuses_for_a_while(
    server: Server, folder: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with refusing(server, how):
        leave(folder)
        eventually(lambda: "results wait in the journal" in caplog.text)
        assert shipped(folder) == [0]
    eventually(lambda: held(server) == "SUCCESS" and shipped(folder) == [1])


def test_a_redis_that_comes_back_empty_is_brought_everything_again(tmp_path: Path) -> None:
    with fresh() as (server, app), shipping_in(app, tmp_path):
        leave(tmp_path)
        eventually(lambda: held(server) == "SUCCESS" and server.client().keys("*mpworker-journal-*"))
        server.kill()
        server.forget()
        server.start()
        eventually(lambda: held(server) == "SUCCESS")


class Past:
    """A moment of a server, to which it can be taken back, as by its last snapshot or by a replica that lagged."""

    def __init__(self, server: Server) -> None:
        self._server, self._data = server, server.folder / "appendonlydir"
        self._kept = server.folder / "then"
        shutil.copytree(self._data, self._kept)

    def __call__(self) -> None:
        self._server.kill()
        self._server.forget()
        shutil.copytree(self._kept, self._data)
        self._server.start()


def checkpoint(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob(".shipped*.json"))


@pytest.mark.parametrize("more", [0, 1])
def test_a_redis_that_goes_back_in_time_is_brought_what_it_lost(tmp_path: Path, more: int) -> None:
    """Also what it was brought a moment ago, so that nobody has noted that it is there."""
    with fresh() as (server, app), shipping_in(app, tmp_path):
        for name in "abcd"[: 3 + more]:
            if name == "b":
                back_to_then = Past(server)
            before = checkpoint(tmp_path)
            leave(tmp_path, task_id=name)
            eventually(lambda name=name: held(server, name) == "SUCCESS")
            if name != "d":
                eventually(lambda before=before: checkpoint(tmp_path) != before, what="it is noted")
        back_to_then()
        assert held(server, "b") is None
        eventually(lambda: {held(server, name) for name in "abcd"[: 3 + more]} == {"SUCCESS"})


def test_a_loss_that_nobody_saw_is_noticed_later(tmp_path: Path) -> None:
    with fresh() as (server, app):
        leave(tmp_path, task_id="a")
        assert shipping.ship(app, tmp_path) == Pass(1)
        back_to_then = Past(server)
        leave(tmp_path, task_id="b")
        assert shipping.ship(app, tmp_path) == Pass(1)
        assert shipping.ship(app, tmp_path) == Pass(0)
        back_to_then()
        assert shipping.ship(app, tmp_path) == Pass(2)
        assert held(server, "b") == "SUCCESS"
        server.kill()
        server.start()
        assert shipping.ship(app, tmp_path) == Pass(0)


def test_without_a_checkpoint_nothing_is_taken_for_granted(tmp_path: Path) -> None:
    with fresh() as (server, app):
        leave(tmp_path, task_id="a")
        assert shipping.ship(app, tmp_path) == Pass(1)
        for path in tmp_path.glob(".shipped*"):
            path.unlink()
        server.client().flushall()
        assert shipping.ship(app, tmp_path) == Pass(1)
        assert held(server, "a") == "SUCCESS"


def test_what_somebody_brought_to_the_server_of_before_is_brought_to_this_one(tmp_path: Path) -> None:
    with fresh() as (server, app):
        delivery = Delivery(app.backend)
        shipper = Shipper(tmp_path, delivery, store=app.backend.store_name)

        def look() -> Pass:
            try:
                return deliver_all(shipper, delivery, 60.0)
            except redis.ConnectionError:  # of the server that was killed: older clients do not try again
                return deliver_all(shipper, delivery, 60.0)

        leave(tmp_path, task_id="a")
        assert look() == Pass(1)
        server.kill()
        server.start()
        before = checkpoint(tmp_path)
        assert look() == Pass(0)
        leave(tmp_path, task_id="b", shipped=True)  # there, by one who had not noticed
        assert look() == Pass(0)
        assert checkpoint(tmp_path) == before
        delivery.recheck_at = time.monotonic()
        assert look() == Pass(1)
        assert held(server, "b") == "SUCCESS"
        assert checkpoint(tmp_path) != before


def test_a_long_recovery_is_not_cut_short_by_the_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shippers, "_MOST", 1)
    with fresh() as (server, app):
        delivery = Delivery(app.backend)
        shipper = Shipper(tmp_path, delivery, store=app.backend.store_name)
        for name in "abc":
            leave(tmp_path, task_id=name)
        assert deliver_all(shipper, delivery) == Pass(3)
        server.client().flushall()
        shipper.doubt(everything=True)
        for name in "abc":
            delivery.recheck_at = time.monotonic()
            assert deliver_all(shipper, delivery, 60.0, -1.0).delivered == 1
            assert held(server, name) == "SUCCESS"


def test_all_by_hand_is_all_although_the_server_was_restarted(tmp_path: Path) -> None:
    with fresh() as (server, app):
        leave(tmp_path, task_id="a")
        assert shipping.ship(app, tmp_path) == Pass(1)
        server.kill()
        server.start()
        assert shipping.ship(app, tmp_path, again=True) == Pass(1)


def test_an_id_that_no_server_takes_is_in_nobodys_way(server: Server, deliver: Delivery) -> None:
    records = [record("SUCCESS", task_id=name) for name in ("bad\udce9", "good")]
    assert deliver(records) == [SHIPPED, SHIPPED]
    assert held(server, "good") == "SUCCESS"


def test_a_redis_that_somebody_has_flushed_stays_flushed(server: Server, folder: Path) -> None:
    leave(folder)
    eventually(lambda: held(server) == "SUCCESS" and server.client().keys("*mpworker-journal-*"))
    server.client().flushdb()
    eventually(lambda: server.client().keys("*mpworker-journal-*"), what="the next look")
    assert held(server) is None


def test_old_files_go_once_all_of_them_is_in_redis(server: Server, folder: Path) -> None:
    old = Journal(folder, "n", clock=lambda: time.time() - 40 * 86400)
    old.append(record("SUCCESS", -10.0))
    old.close()
    eventually(lambda: held(server) == "SUCCESS" and Journal.files(folder) == [])


def test_the_end_of_a_node_is_a_last_chance(server: Server, app: Celery, tmp_path: Path) -> None:
    shipping.start_with(app, Settings(journal=tmp_path), "n")
    signals.worker_ready.send(sender=Sender(app))
    Journal(tmp_path, "n").append(record("SUCCESS"))  # too new to be looked at
    signals.worker_shutdown.send(sender=Sender(app))
    assert (held(server), shipped(tmp_path)) == ("SUCCESS", [1])


def test_by_hand(server: Server, app: Celery, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with pytest.raises(ConfigurationError, match="there is no journal folder"):
        shipping.ship(app, folder)
    folder.mkdir()
    leave(folder)
    server.client().config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreError, match=r"not all of .* could be delivered"):
            shipping.ship(app, folder)
    finally:
        server.client().config_set("maxmemory", 0)
    assert shipping.ship(app, folder) == Pass(1)
    assert shipping.ship(app, folder) == Pass(0)
    assert held(server) == "SUCCESS"
    server.client().flushdb()
    assert shipping.ship(app, folder, again=True) == Pass(1)
    assert held(server) == "SUCCESS"
    plain = Celery("plain", backend="cache+memory://", set_as_current=False)
    with pytest.raises(ConfigurationError, match="keeps a journal"):
        shipping.ship(plain, folder)
    shutil.rmtree(folder)


def test_as_a_command_of_celerys(server: Server, tmp_path: Path) -> None:
    if not [found for found in entry_points(group="celery.commands") if found.name == "mpworker"]:
        pytest.skip("mpworker is not installed")
    journal = tmp_path / "journal"
    journal.mkdir()
    leave(journal)
    env = {**os.environ, "SHOP_NOTES": str(tmp_path / "notes"), "SHOP_INSTALL": "1"}
    env |= {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results}
    command = [sys.executable, "-m", "celery", "-A", "shop", "mpworker", "results", "ship", "--path", str(journal)]
    done = subprocess.run(command, cwd=PROJECTS, env=env, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"1 record delivered from {journal}\n"), done.stderr
    assert held(server) == "SUCCESS"
