"""The bare connection to a result backend's Redis: what it does about errors, lost connections and interruptions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from celery import Celery
from redis import exceptions as redis_errors

from mpworker.celery.backend import ResultBackend
from mpworker.celery.line import Line

_SCRIPT = "return {redis.call('INCR', KEYS[1]), ARGV[1]}"


@pytest.fixture
def server() -> Iterator[support.RedisServer]:
    server = support.RedisServer()
    server.start()
    try:
        yield server
    finally:
        server.end()


def backend_of(port: int, **conf: Any) -> ResultBackend:
    app = Celery("t", backend=f"mpworker.celery.backend:ResultBackend+redis://127.0.0.1:{port}", set_as_current=False)
    app.conf.update(conf)
    backend = app.backend
    assert isinstance(backend, ResultBackend)
    return backend


@pytest.fixture
def backend(server: support.RedisServer) -> ResultBackend:
    return backend_of(server.port)


@pytest.fixture
def line(backend: ResultBackend) -> Iterator[Line]:
    line = Line(backend)
    yield line
    line.close()


def test_commands_and_their_replies_in_order(line: Line) -> None:
    assert line.call("SET", "a", b"\x00\r\n") in (b"OK", "OK", True)
    assert line.call("GET", "a") == b"\x00\r\n"
    found = line.call_all([("INCR", "n"), ("LPOP", "a"), ("INCRBY", "n", 2)])
    assert (found[0], found[2]) == (1, 3)
    assert isinstance(found[1], redis_errors.ResponseError)
    with pytest.raises(redis_errors.ResponseError, match="WRONGTYPE"):
        line.call("LPOP", "a")
    assert line.call("GET", "n") == b"3"


def test_a_script_that_the_server_does_not_know_yet_or_no_more(server: support.RedisServer, line: Line) -> None:
    assert line.run(_SCRIPT, [(["n"], ["x"]), (["n"], [5])]) == [[1, b"x"], [2, b"5"]]
    server.client().script_flush()
    assert line.run(_SCRIPT, [(["n"], ["y"])]) == [[3, b"y"]]


def test_a_connection_that_was_lost_is_made_anew(server: support.RedisServer, line: Line) -> None:
    class Watch:
        made = 0

        def connected(self, _: Any) -> None:
            self.made += 1

    watch = Watch()
    line.on_connect(watch.connected)
    assert line.call("INCR", "n") == 1
    server.client().client_kill_filter(_type="normal", skipme=True)
    assert line.call("INCR", "n") == 2
    assert watch.made == 2


def test_what_interrupts_an_exchange_leaves_no_reply_for_the_next_one(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert line.call("SET", "a", "1")
    read = line._connection.read_response

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(line._connection, "read_response", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(line._connection, "read_response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        line.call("GET", "a")
    assert line.call("INCR", "other") == 1


def test_what_was_prepared_is_the_forks(server: support.RedisServer, backend: ResultBackend) -> None:
    backend.prepare_line()
    (prepared,) = backend._prepared
    pid = os.fork()
    if not pid:
        try:
            line = backend.line(0.25)
            os._exit(7 if line is prepared and line.call("INCR", "n") == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    line = backend.line(0.25)
    assert line is prepared
    assert backend.line(0.25) is not prepared
    assert line.call("INCR", "n") == 2


@pytest.mark.parametrize(("given", "limit"), [(None, 0.25), (120.0, 0.25), (0.1, 0.1)])
def test_patience_is_the_lesser_of_ours_and_the_users(
    server: support.RedisServer, given: float | None, limit: float
) -> None:
    backend = backend_of(server.port, redis_socket_timeout=given)
    backend.prepare_line()
    for _ in range(2):  # the prepared one, and one that is made then
        assert backend.line(0.25)._connection.socket_timeout == limit


def test_a_socket_in_the_file_system_will_do(tmp_path: Path) -> None:
    app = Celery("t", backend=f"mpworker.celery.backend:ResultBackend+socket://{tmp_path}/none", set_as_current=False)
    line = app.backend.line(0.25)
    with pytest.raises(redis_errors.ConnectionError):
        line.call("PING")
