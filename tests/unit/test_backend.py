"""The result backend over fakeredis: order, marks, fields, and what happens when either side fails.

fakeredis has no scripts here, so these tests also walk the way for servers that refuse them;
``tests/integration/test_backend_server.py`` walks the other one.
"""

from __future__ import annotations

import json
import logging
import pickle
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
from celery import VERSION, Celery
from celery.app.task import Context
from celery.exceptions import ImproperlyConfigured

from mpworker.celery import backend as module
from mpworker.celery.backend import ResultBackend, disable_journal, enable_journal, journal_for
from mpworker.errors import ConfigurationError
from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.reader import read_entries
from mpworker.results.record import Record, task_begins, task_ends
from mpworker.settings import Settings

NODE = "celery@here"
BEFORE_5_7 = VERSION[:2] < (5, 7)


class FakeBackend(ResultBackend):
    """Talks to a server in memory; ``down`` makes every command fail with that error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.server = fakeredis.FakeServer()
        self.down: Exception | None = None
        super().__init__(*args, **kwargs)

    def _create_client(self, **params: Any) -> Any:
        backend = self

        class Client(fakeredis.FakeStrictRedis):
            def execute_command(self, *args: Any, **options: Any) -> Any:
                if backend.down is not None:
                    raise backend.down
                return super().execute_command(*args, **options)

        return Client(server=self.server)


@pytest.fixture(autouse=True)
def _no_journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MPWORKER_JOURNAL", raising=False)
    yield
    disable_journal()
    task_ends()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def journal(folder: Path) -> Journal:
    return enable_journal(Settings(journal=folder), NODE)


def backend_of(**conf: Any) -> FakeBackend:
    app = Celery("t", set_as_current=False)
    app.conf.update(conf)
    return FakeBackend(app=app, url="redis://ignored/0")


def request(**more: Any) -> Context:
    return Context({"id": "a", "task": "proj.add", "retries": 2, "hostname": "celery@other", **more})


def lines(folder: Path) -> list[Record]:
    return [entry.record for entry in read_entries(Journal.files(folder))]


def test_a_success_is_in_both_places_and_marked(folder: Path, journal: Journal) -> None:
    backend = backend_of(result_expires=60)
    task_begins("a", at=module.time.monotonic() - 5)
    backend.mark_as_done("a", {"x": [1, 2]}, request=request())
    (record,) = lines(folder)
    assert record.shipped
    assert not record.superseded
    assert (record.task_id, record.name, record.status, record.retries) == ("a", "proj.add", "SUCCESS", 2)
    assert (record.result, record.message, record.hostname) == ({"x": [1, 2]}, "", "celery@other")
    assert record.runtime is not None
    assert 5 <= record.runtime < 60
    assert (record.key, record.expires) == ("celery-task-meta-a", 60)
    stored = backend.client.get("celery-task-meta-a")
    assert isinstance(record.payload, str)
    assert stored.decode() == record.payload
    assert 0 < backend.client.ttl("celery-task-meta-a") <= 60
    assert backend.get_task_meta("a")["result"] == {"x": [1, 2]}


@pytest.mark.skipif(BEFORE_5_7, reason="result_failure_expires is new in Celery 5.7")
def test_a_failure_tells_its_message_and_has_its_own_expiry(folder: Path, journal: Journal) -> None:
    backend = backend_of(result_expires=60, result_failure_expires=600)
    backend.mark_as_failure("a", ValueError("no good"), traceback="Traceback ...", request=request())
    (record,) = lines(folder)
    assert (record.status, record.message, record.traceback) == ("FAILURE", "ValueError: no good", "Traceback ...")
    assert record.result["exc_type"] == "ValueError"
    assert record.expires == 600
    assert 60 < backend.client.ttl("celery-task-meta-a") <= 600
    assert isinstance(backend.get_result("a"), ValueError)


@pytest.mark.parametrize("expires", [None, 0])
def test_results_that_never_expire(folder: Path, journal: Journal, expires: int | None) -> None:
    backend = backend_of(result_expires=expires)
    backend.store_result("a", 1, "SUCCESS")
    assert lines(folder)[0].expires is None
    assert backend.client.ttl("celery-task-meta-a") == -1


def test_one_line_per_state_change_and_only_ends_have_a_runtime(folder: Path, journal: Journal) -> None:
    backend = backend_of()
    task_begins("a")
    backend.mark_as_started("a", pid=1, hostname="h")
    backend.store_result("a", {"n": 1}, "PROGRESS", request=request())
    backend.mark_as_retry("a", KeyError("x"), request=request())
    backend.mark_as_done("a", 3, request=request())
    backend.mark_as_done("b", 3, request=request(id="b", ignore_result=True))
    found = lines(folder)
    assert [r.status for r in found] == ["STARTED", "PROGRESS", "RETRY", "SUCCESS"]
    assert [r.runtime is not None for r in found] == [False, False, True, True]
    assert found[0].hostname == NODE
    assert ResultStore(folder).get_statistics()["completed"] == 1


class Ringing:
    """A bell with somebody who listens, or nobody, or somebody who has just died."""

    def __init__(self, listens: bool = True, rings: bool = True) -> None:
        self.listens, self.rings, self.rung = listens, rings, 0

    def has_listener(self) -> bool:
        return self.listens

    def ring(self) -> bool:
        self.rung += self.rings
        return self.rings


def marks(folder: Path) -> list[int]:
    return [json.loads(line)["shipped"] for path in Journal.files(folder) for line in path.read_bytes().splitlines()]


def test_redis_is_left_to_a_shipper_that_listens(folder: Path) -> None:
    bell: Any = Ringing()
    enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    assert backend.store_result("a", 7, "SUCCESS", request=request()) == 7
    assert (bell.rung, marks(folder)) == (1, [0])
    assert backend.client.get("celery-task-meta-a") is None
    assert backend.get_task_meta("a")["result"] == 7  # from the journal
    backend.store_result("b", 7, "STARTED", request=request(id="b"))
    assert backend.get_state("b") == "STARTED"


@pytest.mark.parametrize("listens", [False, True])
def test_without_one_each_process_writes_to_redis_itself(folder: Path, listens: bool) -> None:
    bell: Any = Ringing(listens, rings=False)
    enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    backend.store_result("a", 7, "SUCCESS", request=request())
    assert (bell.rung, marks(folder)) == (0, [1])
    assert backend.client.get("celery-task-meta-a") is not None


def test_what_was_written_to_a_file_that_is_gone_is_no_shippers(folder: Path) -> None:
    bell: Any = Ringing()
    journal = enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    backend.store_result("a", 7, "SUCCESS", request=request())
    journal.path().unlink()
    backend.store_result("b", 7, "SUCCESS", request=request(id="b"))
    assert bell.rung == 1
    assert backend.client.get("celery-task-meta-b") is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, "something") for name in ("group", "chord", "chain", "callbacks", "errbacks")), ("chain", [])],
)
def test_what_somebody_goes_on_with_is_written_at_once(folder: Path, name: str, value: object) -> None:
    bell: Any = Ringing()
    enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    backend.store_result("a", 7, "SUCCESS", request=request(**{name: value}))
    assert (bell.rung, marks(folder)) == (0, [1])
    assert backend.client.get("celery-task-meta-a") is not None


def test_a_line_says_that_its_writer_is_at_it(folder: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of()
    seen: list[int] = []
    monkeypatch.setattr(backend, "_put", lambda record: seen.extend(marks(folder)) or b"1")
    backend.store_result("a", 1, "SUCCESS")
    assert (seen, marks(folder)) == ([3], [1])
    backend.down = OSError("away")
    monkeypatch.undo()
    backend.store_result("b", 1, "SUCCESS")
    assert marks(folder) == [1, 0]  # from now on the shipper's


def test_of_what_is_on_its_way_the_node_reads_what_redis_would_hold(folder: Path) -> None:
    bell: Any = Ringing()
    journal = enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    backend.store_result("a", 1, "SUCCESS", request=request())
    backend.store_result("a", ValueError("late"), "FAILURE", request=request())
    assert backend.get_task_meta("a", cache=False)["status"] == "SUCCESS"
    backend.client.set("celery-task-meta-b", backend.encode({"status": "SUCCESS", "result": 2, "task_id": "b"}))
    backend.store_result("b", 1, "STARTED", request=request(id="b"))
    assert backend.get_task_meta("b")["result"] == 2  # another node was quicker
    for fields in ({"store": "another"}, {"payload": None}, {"chord": True, "store": backend.store_name}):
        journal.append(Record(**{"task_id": "c", "status": "SUCCESS", "payload": "{}", **fields}))
    assert backend.get_state("c") == "PENDING"
    backend.down = backend_down = redis.ConnectionError("away")
    assert backend.get_task_meta("a", cache=False)["result"] == 1
    with pytest.raises(type(backend_down)):
        backend.get_task_meta("c", cache=False)


def test_what_is_forgotten_is_not_shipped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bell: Any = Ringing()
    enable_journal(Settings(journal=folder), NODE, bell)
    backend = backend_of()
    for name in "aba":
        backend.store_result(name, 1, "SUCCESS", request=request(id=name))
    backend.forget("a")
    assert marks(folder) == [1, 0, 1]
    assert backend.get_state("a") == "PENDING"
    backend.forget("nobody")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Zurich"])
@pytest.mark.parametrize("extended", [False, True])
def test_redis_holds_what_celery_would_have_stored(
    folder: Path, journal: Journal, zone: str, extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of(timezone=zone, result_extended=extended)
    asked = request(group="g", parent_id="p", children=[backend.app.AsyncResult("kid")])
    for state in ("SUCCESS", "FAILURE", "STARTED", "RETRY"):
        for given in (asked, None):
            ours = backend._meta({"x": 1}, state, "text", given, datetime.now(UTC))
            theirs = backend._get_result_meta({"x": 1}, state, "text", given)
            both = [meta.pop("date_done") for meta in (ours, theirs)]
            assert ours == theirs
            assert [date and date[-6:] for date in both] in ([None, None], [both[0] and both[0][-6:]] * 2)


def test_the_line_is_written_before_redis_is_asked(
    folder: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_of()
    seen: list[list[bool]] = []
    real = backend._put
    monkeypatch.setattr(backend, "_put", lambda record: seen.append([r.shipped for r in lines(folder)]) or real(record))
    backend.store_result("a", 1, "SUCCESS")
    assert seen == [[False]]
    assert lines(folder)[0].shipped


OUTAGES = [
    redis.ConnectionError("refused"),
    redis.TimeoutError("slow"),
    redis.AuthenticationError("WRONGPASS"),
    redis.ReadOnlyError("You can't write against a read only replica."),
    redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"),
    redis.BusyLoadingError("Redis is loading the dataset in memory"),
    OSError("network is unreachable"),
]


@pytest.mark.parametrize("error", OUTAGES, ids=lambda e: f"{type(e).__name__}-{str(e)[:7]}")
def test_an_outage_raises_nothing_and_leaves_the_line_unshipped(
    folder: Path, journal: Journal, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    backend = backend_of(result_backend_always_retry=True)
    backend.down = error
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for n in range(3):
            assert backend.store_result(f"t{n}", n, "SUCCESS", request=request()) == n
        backend.down = None
        backend.store_result("t3", 3, "SUCCESS")
    assert [r.shipped for r in lines(folder)] == [False, False, False, True]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "refuses" not in r.msg]
    assert len(warned) == 1
    assert "t0" in warned[0]
    assert str(error) in warned[0]
    assert any("3 of this process were left" in r.getMessage() for r in caplog.records)
    assert backend.get_state("t3") == "SUCCESS"


def test_a_slow_outage_is_not_waited_for_again_and_again(
    folder: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, now, asked = backend_of(), [1000.0], []

    def hangs(record: Record) -> bytes:
        asked.append(record.task_id)
        now[0] += 3.0
        raise redis.TimeoutError("Timeout reading from socket")

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(backend, "_put", hangs)
        for n in range(10):
            backend.store_result(f"t{n}", n, "SUCCESS")
        assert asked == ["t0"]
        now[0] += 16.0
        backend.store_result("t10", 1, "SUCCESS")
        assert asked == ["t0", "t10"]
    now[0] += 16.0
    backend.store_result("t11", 1, "SUCCESS")
    assert [r.task_id for r in lines(folder) if r.shipped] == ["t11"]


def test_warnings_are_few_and_count_what_they_left_out(
    journal: Journal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    backend = backend_of()
    backend.down = redis.ConnectionError("refused")
    for n in range(21):
        backend.store_result(f"t{n}", n, "SUCCESS")
        now[0] += 1.0
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 3
    assert "9 more since the last such line" in warned[1]


def test_success_is_never_overwritten(folder: Path, journal: Journal) -> None:
    backend = backend_of()
    backend.store_result("a", 1, "SUCCESS")
    backend.store_result("a", ValueError("lost"), "FAILURE")
    backend.store_result("b", ValueError("lost"), "FAILURE")
    backend.store_result("b", 2, "SUCCESS")
    assert backend.get_task_meta("a", cache=False)["result"] == 1
    assert backend.get_task_meta("b", cache=False)["result"] == 2
    assert [(r.shipped, r.superseded) for r in lines(folder)] == [
        (True, False),
        (True, True),
        (True, False),
        (True, False),
    ]
    assert [r.status for r in ResultStore(folder).query()] == ["SUCCESS", "SUCCESS"]


def progress(backend: FakeBackend, done: int, at: float | None = None) -> None:
    backend.store_progress("a", {"done": done, "total": 9, "message": ""}, request(), at)


def test_progress_is_a_state_in_redis_alone(folder: Path, journal: Journal) -> None:
    backend = backend_of(result_expires=60)
    progress(backend, 1)
    meta = backend.get_task_meta("a", cache=False)
    assert (meta["status"], meta["result"]) == ("PROGRESS", {"done": 1, "total": 9, "message": ""})
    assert 0 < backend.client.ttl("celery-task-meta-a") <= 60
    assert lines(folder) == []
    backend.down = redis.ConnectionError("gone")
    progress(backend, 2)  # nobody is disturbed


def test_progress_never_replaces_an_end_nor_a_newer_word(folder: Path, journal: Journal) -> None:
    backend = backend_of()
    backend.store_result("a", None, "RETRY", request=request())
    progress(backend, 2, 1000.0)
    progress(backend, 1, 999.5)
    assert backend.get_task_meta("a", cache=False)["result"]["done"] == 2
    progress(backend, 3, 500.0)  # by a clock that is wrong, or has been
    assert backend.get_task_meta("a", cache=False)["result"]["done"] == 3
    for state in ("FAILURE", "REVOKED", "SUCCESS"):
        backend.store_result("a", KeyError("x") if state != "SUCCESS" else 1, state, request=request())
        progress(backend, 4)
        assert backend.get_state("a") == state
        assert backend.get_task_meta("a", cache=False)["status"] == state


COMPRESSED = pytest.param(
    {"result_compression": "gzip"},
    marks=pytest.mark.skipif(BEFORE_5_7, reason="result_compression is new in Celery 5.7"),
)


@pytest.mark.parametrize("conf", [{"result_serializer": "pickle"}, COMPRESSED], ids=str)
def test_other_serializers_and_compression_keep_their_rules(
    folder: Path, journal: Journal, conf: dict[str, Any]
) -> None:
    backend = backend_of(accept_content=["json", "pickle"], **conf)
    assert not backend.scripted
    backend.store_result("a", {"n": 1}, "SUCCESS")
    backend.store_result("a", None, "STARTED")
    backend.store_result("b", ValueError("x"), "FAILURE")
    assert backend.get_task_meta("a")["result"] == {"n": 1}
    assert isinstance(backend.get_result("b"), ValueError)
    first, second, third = lines(folder)
    assert first.payload == backend.client.get("celery-task-meta-a")
    assert (first.shipped, second.superseded, third.message) == (True, True, "ValueError: x")
    if "result_serializer" in conf:
        assert isinstance(first.payload, bytes)
        assert pickle.loads(first.payload)["result"] == {"n": 1}


def test_an_unreadable_value_in_redis_is_replaced(journal: Journal) -> None:
    backend = backend_of()
    backend.client.set("celery-task-meta-a", pickle.dumps({"status": "SUCCESS"}))
    backend.store_result("a", 1, "SUCCESS")
    assert backend.get_result("a") == 1


def test_a_result_that_cannot_be_encoded_raises_as_in_celery_and_leaves_no_line(folder: Path, journal: Journal) -> None:
    with pytest.raises(Exception, match="not JSON serializable"):
        backend_of().store_result("a", object(), "SUCCESS")
    assert lines(folder) == []


def test_a_journal_that_cannot_be_written_lets_results_go_to_redis(
    folder: Path, journal: Journal, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mpworker.results.journal.os.write", full)
    backend = backend_of()
    for name in ("a", "b"):
        backend.store_result(name, 1, "SUCCESS", request=request())
        assert backend.get_result(name) == 1
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "task a goes to Redis only: mpworker_journal: cannot append" in warning
    assert "No space left" in warning


def test_without_a_journal_everything_is_celerys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of()
    assert journal_for(backend.app) is None
    monkeypatch.setattr(backend, "_ship", None)
    backend.store_result("a", 1, "SUCCESS")
    assert backend.get_result("a") == 1
    backend.down = redis.ConnectionError("refused")
    with pytest.raises(redis.ConnectionError):
        backend.store_result("b", 1, "SUCCESS")


@pytest.mark.parametrize("way", ["conf", "environment"])
def test_outside_a_node_a_journal_must_be_named(folder: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "environment":
        monkeypatch.setenv("MPWORKER_JOURNAL", str(folder))
    backend = backend_of(**({"mpworker_journal": str(folder)} if way == "conf" else {}))
    assert not folder.exists()  # a process that only reads results leaves no trace
    backend.store_result("a", 1, "SUCCESS")
    (record,) = lines(folder)
    assert record.hostname == f"client@{socket.gethostname()}"


def test_configuration_errors_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"^mpworker_journal: cannot write to"):
        enable_journal(Settings(journal=tmp_path / "file"), NODE)
    assert module._node_journal is None
    with pytest.raises(ConfigurationError, match="mpworker_journal_fsync must be one of"):
        backend_of(mpworker_journal=str(tmp_path), mpworker_journal_fsync="maybe")
    for url, reason in (
        ("cluster://h/0", "not known here; use mpworker"),
        ("sentinel://:secret@h/0;sentinel://g/0", "result_backend_transport_options"),
        ("redis://:secret@h/x", "invalid literal"),
        ("redis://:secret@h:port/0", "[Pp]ort"),
    ):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            ResultBackend(app=Celery("t", set_as_current=False), url=url)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h:7000/3", {"host": "h", "port": 7000, "db": 3}),
        ("valkey://h/1", {"host": "h", "db": 1}),
        ("rediss://h/1?ssl_cert_reqs=required", {"connection_class": redis.SSLConnection, "db": 1}),
        ("socket:///run/v.sock", {"path": "/run/v.sock", "db": 0}),
        ("redis+socket:///run/v.sock?virtual_host=2", {"path": "/run/v.sock", "db": 2}),
        ("unix:///run/v.sock?db=2", {"path": "/run/v.sock", "db": 2}),
    ],
)
def test_urls_as_celery_finds_them(url: str, expected: dict[str, Any]) -> None:
    # The same that the entry point gives once the package is installed.
    app = Celery("t", backend=f"mpworker+{url}", set_as_current=False)
    app.loader.override_backends = {"mpworker": "mpworker.celery.backend:ResultBackend"}
    backend = app.backend
    assert type(backend) is ResultBackend
    assert {name: backend.connparams[name] for name in expected} == expected
    assert backend.as_uri().startswith("mpworker+")
    again = Celery("t", backend=backend.as_uri(include_password=True), set_as_current=False)
    again.loader.override_backends = app.loader.override_backends
    assert again.backend.connparams.get("db") == backend.connparams["db"]
    assert backend.quick_client.connection_pool.connection_kwargs["socket_timeout"] == module.REDIS_TIMEOUT


def test_the_printed_url_hides_the_password() -> None:
    app = Celery("t", set_as_current=False)
    backend = ResultBackend(app=app, url="redis://:secret@h:6379/0")
    assert backend.as_uri() == "mpworker+redis://:**@h:6379/0"
    assert backend.as_uri(include_password=True) == "mpworker+redis://:secret@h:6379/0"


def test_behind_sentinel(journal: Journal) -> None:
    url = "sentinel://:secret@h:26379/1;sentinel://g:26379/1"
    app = Celery("t", backend=f"mpworker+{url}", set_as_current=False)
    app.loader.override_backends = {"mpworker": "mpworker.celery.backend:ResultBackend"}
    app.conf.result_backend_transport_options = {"master_name": "m"}
    backend = app.backend
    assert isinstance(backend, ResultBackend)
    assert [(host["host"], host["port"]) for host in backend.connparams["hosts"]] == [("h", 26379), ("g", 26379)]
    assert backend.as_uri() == "mpworker+sentinel://:**@h:26379/1;sentinel://g:26379/1"
    assert backend.as_uri(include_password=True) == f"mpworker+{url}"
    assert backend.quick_client.connection_pool.connection_kwargs["socket_timeout"] == module.REDIS_TIMEOUT
    assert backend.quick_client.connection_pool.service_name == "m"
    other = Celery("t", backend=f"mpworker+{url}", set_as_current=False)
    other.loader.override_backends = app.loader.override_backends
    other.conf.result_backend_transport_options = {"master_name": "n"}
    assert other.backend.store_name != backend.store_name


def test_a_backend_survives_pickling(journal: Journal) -> None:
    app = Celery("t", set_as_current=False)
    backend = ResultBackend(app=app, url="socket:///run/v.sock")
    again = pickle.loads(pickle.dumps(backend))
    assert type(again) is ResultBackend
    assert again.connparams["path"] == "/run/v.sock"


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises((ConfigurationError, ImproperlyConfigured), match=r"mpworker\+redis://"):
        ResultBackend(app=Celery("t", set_as_current=False), url="mpworker://h/0")


def test_extended_fields_and_groups_are_part_of_the_payload(folder: Path, journal: Journal) -> None:
    backend = backend_of(result_extended=True)
    backend.store_result("a", 1, "SUCCESS", request=request(group="g", args=[1], kwargs={}, parent_id="p"))
    (record,) = lines(folder)
    assert isinstance(record.payload, str)
    meta = json.loads(record.payload)
    assert (meta["name"], meta["group_id"], meta["parent_id"], meta["task_id"]) == ("proj.add", "g", "p", "a")
