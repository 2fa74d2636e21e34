"""The poison cap: who counts, when a message is dead, where it is kept, and how it leaves again."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakeredis
import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery
from celery.backends.redis import RedisBackend
from celery.worker import state as worker_state
from redis.exceptions import ConnectionError as RedisDown
from rich.console import Console
from support import give

from mpworker.celery import deadletters, poison
from mpworker.celery.deadletters import DeadLetter, FileLetters, Letters, RedisLetters
from mpworker.celery.poison import Deaths
from mpworker.celery.queueing import SENT
from mpworker.celery.requeue import DeadLetters, app_of
from mpworker.cli import main
from mpworker.errors import ConfigurationError, PoisonMessage, RequeueError
from mpworker.monitor.views import print_rows

LOST = WorkerLostError("killed by SIGKILL")


class Backend(RedisBackend):  # type: ignore[misc]
    """Celery's, on a server in memory that may be ``down``; each app in a test has the same."""

    server: fakeredis.FakeServer
    down = False
    patience = 0.0

    def _create_client(self, **params: Any) -> Any:
        kind = type(self)
        kind.patience = params["socket_timeout"]

        class Client(fakeredis.FakeStrictRedis):
            def execute_command(self, *args: Any, **options: Any) -> Any:
                if kind.down:
                    raise RedisDown("down")
                return super().execute_command(*args, **options)

            def pipeline(self, *args: Any, **options: Any) -> Any:
                if kind.down:
                    raise RedisDown("down")
                return super().pipeline(*args, **options)

        return Client(server=kind.server)


@pytest.fixture
def backend() -> type[Backend]:
    return type("FreshBackend", (Backend,), {"server": fakeredis.FakeServer(), "down": False})


@pytest.fixture
def app(backend: type[Backend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Celery:
    monkeypatch.setenv("MPWORKER_JOURNAL", str(tmp_path / "journal"))
    return app_with(backend)


def app_with(backend: type[Backend] | None) -> Celery:
    app = Celery("t", broker="memory://", set_as_current=False)
    if backend is not None:
        app.backend_cls = backend
    app.task(name="t.x", shared=False)(give)
    return app


class Request:
    """As much of Celery's as matters."""

    def __init__(self, app: Celery, task_id: str = "a", body: Any = b"[[], {}, {}]", **headers: Any) -> None:
        self.id, self.name, self.task, self.ignore_result = task_id, "t.x", app.tasks["t.x"], True
        self.delivery_info = {"exchange": "", "routing_key": "celery", "priority": 6}
        properties = {"correlation_id": task_id, "delivery_tag": "1", "priority": 6}
        headers = {"id": task_id, "task": "t.x", "redelivered": True, **headers}
        self.message = SimpleNamespace(
            body=body, headers=headers, properties=properties, content_type="json", content_encoding="utf-8"
        )

    def on_failure(self) -> None: ...


def letter(task_id: str = "a", timestamp: float = 5e9, **more: Any) -> DeadLetter:
    made = DeadLetter.of(Request(app_with(None), task_id, **more), deaths=3, reason="why", node="n")
    return made._replace(timestamp=timestamp)


# -- the count -------------------------------------------------------------------------------------------------------


def test_the_cap_holds_over_all_nodes(app: Celery, backend: type[Backend]) -> None:
    one, two = Deaths(app, 3, "one"), Deaths(app_with(backend), 3, "two")
    listener = Request(app).on_failure
    assert one.judge(listener, LOST) is LOST
    assert two.judge(listener, LOST) is LOST
    dead = two.judge(listener, LOST)
    assert isinstance(dead, PoisonMessage)
    assert str(dead).startswith("killed 3 workers; not run again; send it again with: mpworker requeue a (the last: ")
    assert "SIGKILL" in str(dead)
    (row,) = [kept.summary() for kept in DeadLetters(app).all()]
    assert (row["id"], row["deaths"], row["node"]) == ("a", 3, "two")
    assert (one.given_up, two.given_up) == (0, 1)
    assert 0 < app.backend.client.ttl("mpworker-deaths-a") <= 86400


def test_another_message_has_lives_of_its_own(app: Celery) -> None:
    deaths = Deaths(app, 2, "n")
    assert deaths.judge(Request(app, "a").on_failure, LOST) is LOST
    assert deaths.judge(Request(app, "b").on_failure, LOST) is LOST
    assert isinstance(deaths.judge(Request(app, "a").on_failure, LOST), PoisonMessage)


def test_a_cap_of_one_and_none(app: Celery) -> None:
    error = Deaths(app, 1, "n").judge(Request(app).on_failure, LOST)
    assert str(error).startswith("killed 1 worker; ")
    unlimited = Deaths(app, 0, "n")
    assert all(unlimited.judge(Request(app, "b").on_failure, LOST) is LOST for _ in range(20))
    assert not app.backend.client.exists("mpworker-deaths-b")


@pytest.mark.parametrize("listener", [None, print, Backend.as_uri])
def test_whoever_is_no_request_is_not_counted(app: Celery, listener: Callable[..., Any] | None) -> None:
    assert Deaths(app, 1, "n").judge(listener, LOST) is LOST


def test_deaths_in_a_cold_shutdown_are_our_own_doing(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, "should_terminate", 0)
    Deaths(app, 1, "n").judge(Request(app).on_failure, LOST)
    monkeypatch.setattr(worker_state, "should_terminate", 1)
    assert Deaths(app, 1, "n").judge(Request(app, "b").on_failure, LOST) is LOST


def test_what_redis_does_not_hear_counts_here_and_is_added_later(
    app: Celery, backend: type[Backend], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SimpleNamespace(monotonic=lambda: now)
    now = 1000.0
    monkeypatch.setattr(poison, "time", clock)
    node, other = Deaths(app, 4, "n"), Deaths(app_with(backend), 4, "other")
    listener = Request(app).on_failure
    assert node.judge(listener, LOST) is LOST
    backend.down = True
    assert node.judge(listener, LOST) is LOST
    assert node.judge(listener, LOST) is LOST
    assert len([record for record in caplog.records if "alone for a while" in record.message]) == 1
    backend.down = False
    assert node.judge(listener, LOST) is LOST, "Redis is left alone for a moment after a failure"
    now += 16
    assert isinstance(node.judge(listener, LOST), PoisonMessage), "1 + 3 owed + 1"
    assert isinstance(other.judge(listener, LOST), PoisonMessage)
    assert backend.patience == 1.0, "seconds that the main process may wait"


def test_without_redis_the_node_counts_and_keeps_by_itself(app: Celery, tmp_path: Path) -> None:
    lonely = app_with(None)
    deaths = Deaths(lonely, 2, "n")
    listener = Request(lonely).on_failure
    for _ in range(2):  # after the cap it begins anew: it was sent again
        assert deaths.judge(listener, LOST) is LOST
        assert isinstance(deaths.judge(listener, LOST), PoisonMessage)
    assert [kept.id for kept in DeadLetters(lonely).all()] == ["a"]
    assert len(list((tmp_path / "journal" / "dead").iterdir())) == 1


def test_memory_for_deaths_is_bounded(monkeypatch: pytest.MonkeyPatch, app: Celery) -> None:
    monkeypatch.setattr(poison, "_MAX_OWED", 10)
    lonely = app_with(None)
    deaths = Deaths(lonely, 2, "n")
    for n in range(50):
        deaths.judge(Request(lonely, str(n)).on_failure, LOST)
    assert len(deaths._owed) == 10


def test_a_message_that_cannot_be_kept_is_failed_all_the_same(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    request = Request(app, odd=object())
    assert isinstance(Deaths(app, 1, "n").judge(request.on_failure, LOST), PoisonMessage)
    assert "cannot be kept" in caplog.text


def test_a_task_that_had_succeeded_is_left_to_celery(app: Celery) -> None:
    request = Request(app)
    request.ignore_result, request._success_was_stored = False, dict  # type: ignore[attr-defined]
    app.backend.mark_as_done("a", 42)
    assert Deaths(app, 1, "n").judge(request.on_failure, LOST) is LOST
    app.backend.mark_as_failure("b", ValueError())
    other = Request(app, "b")
    other.ignore_result, other._success_was_stored = False, dict  # type: ignore[attr-defined]
    assert isinstance(Deaths(app, 1, "n").judge(other.on_failure, LOST), PoisonMessage)


# -- letters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["redis", "files"])
def place(request: pytest.FixtureRequest, app: Celery, tmp_path: Path) -> Letters:
    app.conf.result_expires = 100
    if request.param == "redis":
        return RedisLetters(app.backend, 1.0)
    return FileLetters(tmp_path / "dead", 100)


@pytest.mark.parametrize("body", [b"\x00\xff", "text \u00e4", memoryview(b"view"), bytearray(b"x"), b""])
def test_a_letter_is_the_message_as_it_was(place: Letters, body: Any) -> None:
    kept = letter(body=body, expires="2099-01-01T00:00:00+00:00", nested={"a": [1, None]}, raw=b"\x00\xff")
    place.add(kept)
    (found,) = place.all()
    assert found == kept
    assert found.body == (body.encode() if isinstance(body, str) else bytes(body))
    assert (found.routing_key, found.priority) == ("celery", 6)
    assert "redelivered" not in found.headers
    assert found.properties == {"correlation_id": "a"}


@pytest.mark.parametrize("task_id", ["../../etc/passwd", "x" * 5000, "\u00e4/\x00", "a b"])
def test_any_id_will_do(place: Letters, task_id: str) -> None:
    place.add(letter(task_id))
    found = place.claim(task_id)
    assert found is not None
    assert found.id == task_id
    place.sent(found)
    assert not list(place.all())


def test_one_claims_a_letter(place: Letters) -> None:
    assert place.claim("a") is None
    place.add(letter())
    mine = place.claim("a")
    assert mine is not None
    with pytest.raises(RequeueError, match="a is being sent by somebody else"):
        place.claim("a")
    place.release(mine)
    assert place.claim("a") == mine
    place.sent(mine)
    assert place.claim("a") is None


def test_a_claim_ends_by_itself(place: Letters, app: Celery, tmp_path: Path) -> None:
    place.add(letter())
    assert place.claim("a") is not None
    if isinstance(place, RedisLetters):
        assert 0 < app.backend.client.ttl("mpworker-claim-a") <= deadletters.CLAIM_SECONDS
        app.backend.client.delete("mpworker-claim-a")
    else:
        (claim,) = (tmp_path / "dead").glob("*.claim")
        os.utime(claim, (1, 1))
    assert place.claim("a") is not None
    with pytest.raises(RequeueError):
        place.claim("a")


def test_a_message_that_died_again_meanwhile_stays_dead(place: Letters) -> None:
    place.add(letter(timestamp=5e9))
    mine = place.claim("a")
    assert mine is not None
    place.add(letter(timestamp=5e9 + 1))
    place.sent(mine)
    assert [kept.timestamp for kept in place.all()] == [5e9 + 1]
    assert place.claim("a") is not None


def test_letters_are_bounded_in_number(place: Letters, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deadletters, "MAX_LETTERS", 3)
    for n in range(6):
        place.add(letter(str(n), timestamp=5e9 + n))
        for path in (tmp_path / "dead").glob("*.json"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    assert {kept.id for kept in place.all()} == {"3", "4", "5"}


def test_letters_expire_as_results_do(place: Letters, app: Celery) -> None:
    place.add(letter("old", timestamp=1.0))
    assert not list(place.all())
    place.add(letter("new"))
    assert [kept.id for kept in place.all()] == ["new"]
    if isinstance(place, RedisLetters):
        client = app.backend.client
        assert 0 < client.ttl("mpworker-dead") <= 100
        assert client.hkeys("mpworker-dead") == [b"new"]


def test_letters_of_files_are_private(app: Celery, tmp_path: Path) -> None:
    FileLetters(tmp_path / "dead", 0).add(letter())
    (path,) = (tmp_path / "dead").iterdir()
    assert (tmp_path / "dead").stat().st_mode & 0o077 == 0
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_no_letter_is_passed_over(place: Letters, app: Celery, tmp_path: Path) -> None:
    place.add(letter())
    if isinstance(place, RedisLetters):
        app.backend.client.hset("mpworker-dead", "b", "{}")
    else:
        for n, text in enumerate(["", "[]", '{"v": 1}']):
            (tmp_path / "dead" / f"{n}.json").write_text(text)
    assert [kept.id for kept in place.all()] == ["a"]
    assert place.claim("b") is None


def test_keys_have_the_prefix_of_results(backend: type[Backend], app: Celery) -> None:
    app.conf.result_backend_transport_options = {"global_keyprefix": "shop"}
    RedisLetters(app.backend, 1.0).add(letter())
    assert set(app.backend.client.keys()) == {b"shop_mpworker-dead", b"shop_mpworker-dead-index"}


# -- sent again ------------------------------------------------------------------------------------------------------


def received(app: Celery, queue: str = "celery") -> Any:
    with app.connection_for_read() as connection:
        return connection.default_channel.basic_get(queue, no_ack=True)


def test_requeue_sends_the_message_as_it_was(app: Celery) -> None:
    deaths = Deaths(app, 1, "n")
    with app.connection_for_write() as connection:
        app.amqp.queues["celery"](connection.default_channel).declare()
        app.send_task("t.x", (1, "\u00e4"), task_id="a", priority=3, compression="gzip", expires=1000, shadow="s")
        message = received(app)
        headers = {key: value for key, value in message.headers.items() if key != SENT}  # when it was sent first
        first = json.loads(message.body), headers, message.properties["correlation_id"]
        request = Request(app)
        request.message, request.delivery_info = message, {**message.delivery_info, "priority": 3}
        deaths.judge(request.on_failure, LOST)
        assert DeadLetters(app).requeue("a") == "t.x[a] was sent again to celery"
        again = received(app)
    assert (json.loads(again.body), again.headers, again.properties["correlation_id"]) == first
    assert (again.properties["priority"], again.content_type) == (3, "application/json")
    assert not list(DeadLetters(app).all())
    assert not app.backend.client.exists("mpworker-deaths-a")


def test_an_expiry_that_has_passed_is_not_sent_again(app: Celery) -> None:
    RedisLetters(app.backend, 1.0).add(letter(expires="2001-01-01T00:00:00+00:00"))
    with app.connection_for_write() as connection:
        app.amqp.queues["celery"](connection.default_channel).declare()
        assert DeadLetters(app).requeue("a").endswith("to celery, without its expiry, which has passed")
        assert received(app).headers["expires"] is None


def test_a_letter_stays_when_the_broker_is_away(app: Celery) -> None:
    RedisLetters(app.backend, 1.0).add(letter())
    app.conf.broker_url = "redis+socket:///nobody/here"
    for _ in range(2):
        with pytest.raises(RequeueError, match="a could not be sent, and stays dead: "):
            DeadLetters(app).requeue("a")
    assert [kept.id for kept in DeadLetters(app).all()] == ["a"]


def test_an_unknown_id_and_a_redis_that_is_away(app: Celery, backend: type[Backend]) -> None:
    with pytest.raises(RequeueError, match="no dead message has the id a"):
        DeadLetters(app).requeue("a")
    FileLetters(Path(os.environ["MPWORKER_JOURNAL"]) / "dead", 0).add(letter())
    backend.down = True
    found = DeadLetters(app).all()
    assert next(found).id == "a"
    with pytest.raises(RequeueError, match="cannot be read: ConnectionError"):
        next(found)
    with pytest.raises(RequeueError, match="stays dead"):  # its deaths could not be forgotten
        DeadLetters(app).requeue("a")


@pytest.mark.parametrize("name", ["no_such_module", "os", "os.path:nothing"])
def test_an_app_that_is_none_is_one_line(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"cannot load the app of -A {name}: "):
        app_of(name)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["mpworker", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_command_lists_a_table_or_lines(
    app: Celery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mpworker.celery.requeue.app_of", lambda name: app)
    assert command(monkeypatch, "results", "--dead") == 0
    assert capsys.readouterr().out == ""
    RedisLetters(app.backend, 1.0).add(letter("[bold]"))
    assert command(monkeypatch, "results", "--dead") == 0
    row = json.loads(capsys.readouterr().out)
    assert row == {**letter("[bold]").summary()}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert command(monkeypatch, "results", "--dead", "--json") == 0
    assert json.loads(capsys.readouterr().out) == row
    console = Console(width=200, file=io.StringIO())
    print_rows([row], "none", console)
    print_rows([], "no dead messages", console)
    head, line, nothing = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert head.split() == ["id", "name", "when", "deaths", "reason", "node", "queue"]
    assert line.split() == ["[bold]", "t.x", "2128-06-11T08:53:20+00:00", "3", "why", "n", "celery"]
    assert nothing == "no dead messages"


def test_the_command_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["requeue"], ["-A", "no_such_app", "requeue", "x"]):
        assert command(monkeypatch, *words) == 2
    assert "Error: cannot load the app of -A no_such_app: " in capsys.readouterr().err
