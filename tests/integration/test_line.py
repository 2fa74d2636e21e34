"""The bare connection to a result backend's Redis: what it does about errors, lost connections and interruptions."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from celery import Celery
from redis import exceptions as redis_errors

from mpworker.celery import line as module
from mpworker.celery.backend import ResultBackend
from mpworker.celery.line import QUICK, Express, Line

_SCRIPT = "return {redis.call('INCR', KEYS[1]), ARGV[1]}"


def backend_of(port: int, **conf: Any) -> ResultBackend:
    app = Celery("t", backend=f"mpworker.celery.backend:ResultBackend+redis://127.0.0.1:{port}", set_as_current=False)
    app.conf.update(conf)
    backend = app.backend
    assert isinstance(backend, ResultBackend)
    return backend


@pytest.fixture
def backend(redis_server: support.RedisServer) -> ResultBackend:
    return backend_of(redis_server.port)


@pytest.fixture
def line(backend: ResultBackend) -> Iterator[Line]:
    line = Line(backend)
    yield line
    line.close()


def connections(redis_server: support.RedisServer) -> int:
    return int(redis_server.client().info("stats")["total_connections_received"])


def test_commands_and_their_replies_in_order(line: Line) -> None:
    assert line.call("SET", "a", b"\x00\r\n") in (b"OK", "OK", True)
    assert line.call("GET", "a") == b"\x00\r\n"
    found = line.call_all([("INCR", "n"), ("LPOP", "a"), ("INCRBY", "n", 2)])
    assert (found[0], found[2]) == (1, 3)
    assert isinstance(found[1], redis_errors.ResponseError)
    with pytest.raises(redis_errors.ResponseError, match="WRONGTYPE"):
        line.call("LPOP", "a")
    assert line.call("GET", "n") == b"3"


def test_a_script_that_the_server_does_not_know_yet_or_no_more(redis_server: support.RedisServer, line: Line) -> None:
    assert line.run(_SCRIPT, [(["n"], ["x"]), (["n"], [5])]) == [[1, b"x"], [2, b"5"]]
    redis_server.client().script_flush()
    assert line.run(_SCRIPT, [(["n"], ["y"])]) == [[3, b"y"]]


def test_a_connection_that_was_lost_is_made_anew(redis_server: support.RedisServer, line: Line) -> None:
    class Watch:
        made = 0

        def connected(self, _: Any) -> None:
            self.made += 1

    watch = Watch()
    line.on_connect(watch.connected)
    assert line.call("INCR", "n") == 1
    redis_server.client().client_kill_filter(_type="normal", skipme=True)
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


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is closed for a while stays closed for as long as a test takes."""
    monkeypatch.setattr(module, "_PAUSE", 600.0)


def express_of(backend: ResultBackend) -> Express:
    """One that is connected."""
    express = Express(backend, _SCRIPT)
    support.wait_until(express.is_open)
    return express


def test_the_quick_way_is_open_once_it_is_connected(redis_server: support.RedisServer, backend: ResultBackend) -> None:
    express, before = express_of(backend), connections(redis_server)
    for turn in range(5):
        assert express.run(["n"], ["x"]) == [turn + 1, b"x"]
        assert express.is_open()
    assert connections(redis_server) - before == 1  # that of connections()


def closed(express: Express, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for a while; then it is connected anew, and in order."""
    assert not express.is_open()
    assert express._connecting is not None
    assert not express._connecting.is_alive()
    monkeypatch.setattr(express, "_opens_at", 0.0)
    support.wait_until(express.is_open)
    assert express.run(["after"], ["y"]) == [1, b"y"]


def test_after_a_refusal_it_is_closed_for_a_while(
    redis_server: support.RedisServer, backend: ResultBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    express = express_of(backend)
    redis_server.client().lpush("n", "no number")
    with pytest.raises(redis_errors.ResponseError, match="WRONGTYPE"):
        express.run(["n"], ["x"])
    closed(express, monkeypatch)


@pytest.mark.parametrize("how", ["kill", "flush"])
def test_what_a_server_has_forgotten_is_left_to_others(
    redis_server: support.RedisServer, backend: ResultBackend, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    express, client = express_of(backend), redis_server.client()
    if how == "kill":
        client.client_kill_filter(_type="normal", skipme=True)
    else:
        client.script_flush()
    with pytest.raises(redis_errors.RedisError):
        express.run(["n"], ["x"])
    assert not client.exists("n")
    closed(express, monkeypatch)


def test_a_server_that_stops_is_given_up(
    redis_server: support.RedisServer, backend: ResultBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    express = express_of(backend)
    os.kill(redis_server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(redis_errors.TimeoutError):
            express.run(["n"], ["x"])
    finally:
        os.kill(redis_server.pid, signal.SIGCONT)
    closed(express, monkeypatch)


def test_a_server_that_is_slow_is_asked_less_often(backend: ResultBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    express = express_of(backend)
    monkeypatch.setattr(module, "_SLOW", 0.0)
    monkeypatch.setattr(module, "_FACTOR", 1e6)
    assert express.run(["n"], ["x"]) == [1, b"x"]
    closed(express, monkeypatch)


def test_nobody_waits_for_a_connection_that_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUICK", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        express = Express(backend_of(deaf.getsockname()[1]), _SCRIPT)
        assert not express.is_open()
        assert express._connecting is not None
        express._connecting.join(support.PATIENCE)
        assert not express.is_open()
        assert not express._connecting.is_alive()  # it is not tried once more, for a while


def test_whatever_is_wrong_with_a_connection_is_in_nobodys_way(backend: ResultBackend) -> None:
    def refuse(patience: float) -> Line:
        raise UnicodeError("a provider of credentials has a fault")

    backend.line = refuse  # type: ignore[method-assign]
    express = Express(backend, _SCRIPT)
    assert not express.is_open()
    assert express._connecting is not None
    express._connecting.join(support.PATIENCE)
    assert not express.is_open()


def test_who_may_run_no_scripts_keeps_no_connection_for_them(
    redis_server: support.RedisServer, backend: ResultBackend
) -> None:
    client = redis_server.client()
    client.acl_setuser("default", enabled=True, categories=["-@scripting"])
    made: list[Line] = []
    line = backend.line
    backend.line = lambda patience: made.append(line(patience)) or made[-1]  # type: ignore
    express = Express(backend, _SCRIPT)
    assert not express.is_open()
    assert express._connecting is not None
    express._connecting.join(support.PATIENCE)
    assert not express.is_open()
    assert [each.is_made() for each in made] == [False]
    support.wait_until(lambda: len(client.client_list()) == 1)


@pytest.mark.parametrize("other", ["nothing", "a file", "another server"])
def test_a_descriptor_that_user_code_has_closed_is_not_ours_any_more(
    backend: ResultBackend, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    express = express_of(backend)
    (line,) = express._idle
    fd = line._connection._sock.fileno()
    with contextlib.ExitStack() as stack:
        if other == "another server":
            theirs = stack.enter_context(support.RedisServer())
            number = socket.create_connection(("127.0.0.1", theirs.port)).detach()
        else:
            number = os.open(os.devnull, os.O_RDONLY)
        stack.callback(os.close, number)
        if other == "nothing":
            os.close(fd)
        else:
            os.dup2(number, fd)
        with pytest.raises(redis_errors.ConnectionError):
            express.run(["n"], ["x"])
        if other != "nothing":
            assert os.path.sameopenfile(fd, number)  # it is still open
            os.close(fd)
        if other == "another server":
            assert not theirs.client().exists("n")
    closed(express, monkeypatch)


def test_what_was_prepared_is_the_forks(redis_server: support.RedisServer, backend: ResultBackend) -> None:
    backend.prepare_line()
    (prepared,) = backend._prepared
    pid = os.fork()
    if not pid:
        try:
            line = backend.line(QUICK)
            os._exit(7 if line is prepared and line.call("INCR", "n") == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    line = backend.line(QUICK)
    assert line is prepared
    assert backend.line(QUICK) is not prepared
    assert line.call("INCR", "n") == 2


@pytest.mark.parametrize(("given", "limit"), [(None, QUICK), (120.0, QUICK), (0.1, 0.1)])
def test_patience_is_the_lesser_of_ours_and_the_users(
    redis_server: support.RedisServer, given: float | None, limit: float
) -> None:
    backend = backend_of(redis_server.port, redis_socket_timeout=given)
    backend.prepare_line()
    for _ in range(2):  # the prepared one, and one that is made then
        assert backend.line(QUICK)._connection.socket_timeout == limit


def test_a_socket_in_the_file_system_will_do(tmp_path: Path) -> None:
    app = Celery("t", backend=f"mpworker.celery.backend:ResultBackend+socket://{tmp_path}/none", set_as_current=False)
    line = app.backend.line(QUICK)
    with pytest.raises(redis_errors.ConnectionError):
        line.call("PING")
