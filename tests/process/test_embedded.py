"""The bundled server's life: shared, ended with its last user however that one dies, and always able to start again."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpworker import ProcessPool, embedded
from mpworker.errors import ConfigurationError, WorkerLost
from mpworker.pool import linux

USER = """
import sys
from pathlib import Path
from mpworker.embedded import acquire
with acquire(Path(sys.argv[1])):
    print("up", flush=True)
    sys.stdin.readline()
"""


def until(condition, seconds=10.0):
    """Waits for a condition that no descriptor announces; tells whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def table():
    """pid -> (parent, command line) of every process of this machine that is no zombie."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                args = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = (int(parent), args.strip())
    return found or table_of_ps()


def table_of_ps():
    """The same where there is no /proc."""
    listing = subprocess.run(
        ["ps", "-axww", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    return {int(row[0]): (int(row[1]), row[3]) for row in rows if len(row) == 4 and not row[2].startswith("Z")}


def servers(data_dir):
    """(pid, guard's pid) of each server of this folder."""
    mark = f"valkey-server {embedded.socket_path(data_dir)}"
    return [(pid, parent) for pid, (parent, args) in table().items() if mark in args]


def ask(data_dir, *words):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(embedded.socket_path(data_dir)))
        connection.sendall((" ".join(words) + "\r\n").encode())
        return connection.recv(4096).decode()


def nothing_left(data_dir, pids):
    files = ("users.lock", "valkey.sock")
    return not any((data_dir / name).exists() for name in files) and not set(pids) & set(table())


class Users:
    """Other processes that use the server."""

    def __init__(self, data_dir):
        self.data_dir, self.processes = data_dir, []

    def add(self, count=1):
        added = [
            subprocess.Popen(
                [sys.executable, "-c", USER, str(self.data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(count)
        ]
        self.processes += added
        for process in added:
            assert process.stdout.readline() == b"up\n"
        return added

    def end(self, process, kill=False):
        if kill:
            process.kill()
        process.communicate()
        self.processes.remove(process)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def users(data_dir):
    users = Users(data_dir)
    yield users
    for process in list(users.processes):
        users.end(process, kill=True)
    assert until(lambda: not servers(data_dir))


def test_it_starts_privately_answers_and_leaves_only_data(data_dir):
    with embedded.acquire(data_dir) as server:
        assert ask(data_dir, "PING") == "+PONG\r\n"
        assert "noeviction" in ask(data_dir, "CONFIG GET maxmemory-policy")
        assert "\r\nyes\r\n" in ask(data_dir, "CONFIG GET appendonly")
        assert ask(data_dir, "CONFIG GET port").endswith("\r\n0\r\n")
        [(pid, guard)] = servers(data_dir)
        private = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in [data_dir, *data_dir.iterdir()]}
        assert all(mode & 0o077 == 0 for mode in private.values()), private
        if sys.platform.startswith("linux"):
            assert table()[guard][1].strip() == "mpworker: valkey guard"
    assert server.ended(2.0)
    assert until(lambda: nothing_left(data_dir, [pid, guard]), 2.0)


def test_what_is_stored_is_there_the_next_time(data_dir):
    for number in range(3):
        with embedded.acquire(data_dir) as server:
            assert ask(data_dir, "RPUSH", "numbers", str(number)) == f":{number + 1}\r\n"
        assert server.ended(2.0)


def test_several_processes_share_one_and_the_last_ends_it(data_dir, users):
    first, second = users.add(2)
    [(pid, guard)] = servers(data_dir)
    users.end(first)
    [third] = users.add()
    users.end(second)
    assert servers(data_dir) == [(pid, guard)]
    users.end(third)
    assert until(lambda: nothing_left(data_dir, [pid, guard]), 2.0)


def test_it_ends_when_all_users_are_killed(data_dir, users):
    both = users.add(2)
    [(pid, guard)] = servers(data_dir)
    for process in both:
        users.end(process, kill=True)
    assert until(lambda: nothing_left(data_dir, [pid, guard]), 2.0)


def test_many_that_start_at_once_get_one_server(data_dir, users):
    users.add(5)
    assert len(servers(data_dir)) == 1


def test_a_start_while_the_last_one_stops(data_dir):
    for _ in range(6):
        embedded.acquire(data_dir).release()
    with embedded.acquire(data_dir) as server:
        assert ask(data_dir, "PING") == "+PONG\r\n"
        assert len(servers(data_dir)) == 1
    assert server.ended(2.0)


def test_in_one_process_the_last_release_counts(data_dir):
    first, second = embedded.acquire(data_dir), embedded.acquire(data_dir)
    first.release()
    first.release()
    assert not second.ended(0.3)
    assert ask(data_dir, "PING") == "+PONG\r\n"
    second.release()
    assert second.ended(2.0)


def test_a_forked_child_does_not_keep_it(data_dir):
    server = embedded.acquire(data_dir)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        server.release()
        assert server.ended(2.0)
    finally:
        os.close(writing)
        os.waitpid(child, 0)
        os.close(reading)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_killed_guard_takes_the_server_along_and_the_next_user_starts_both_anew(data_dir, users):
    users.add()
    [(pid, guard)] = servers(data_dir)
    assert ask(data_dir, "SET", "key", "kept") == "+OK\r\n"
    os.kill(guard, signal.SIGKILL)
    assert until(lambda: not {pid, guard} & set(table()), 2.0)
    users.add()
    assert ask(data_dir, "GET", "key") == "$4\r\nkept\r\n"
    [(new, _)] = servers(data_dir)
    assert new != pid


def hold_until_shared(data_dir):
    embedded.acquire(data_dir)
    until((data_dir / "shared").exists)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_has_started_it_and_dies_leaves_it_to_its_other_users(data_dir, users):
    with ProcessPool(1) as pool:
        future = pool.submit(hold_until_shared, data_dir)
        assert until(lambda: servers(data_dir))
        users.add()
        before = servers(data_dir)
        (data_dir / "shared").touch()
        with pytest.raises(WorkerLost):
            future.result(10)
        assert pool.submit(os.getpid).result(10)
        assert servers(data_dir) == before
        assert [linux.mark_of(pid) for pid in before[0]] == [-1, -1]  # nor is there any need to wait for later looks


def test_a_server_that_crashes_is_started_again(data_dir, users):
    users.add()
    [(pid, guard)] = servers(data_dir)
    assert ask(data_dir, "SET", "key", "kept") == "+OK\r\n"
    os.kill(pid, signal.SIGKILL)
    assert until(lambda: servers(data_dir) and servers(data_dir) != [(pid, guard)])

    def kept():
        with contextlib.suppress(OSError):
            return ask(data_dir, "GET", "key") == "$4\r\nkept\r\n"
        return False

    assert until(kept)


def test_files_of_a_power_loss_do_not_matter(data_dir):
    data_dir.mkdir(0o700)
    (data_dir / "users.lock").write_text("")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(data_dir / "valkey.sock"))
    stale.close()
    with embedded.acquire(data_dir) as server:
        assert ask(data_dir, "PING") == "+PONG\r\n"
    assert server.ended(2.0)


def test_a_long_path(tmp_path):
    data_dir = tmp_path / ("x" * 100)
    with embedded.acquire(data_dir) as server:
        folder = embedded.socket_path(data_dir).parent
        assert folder.parent == Path("/tmp")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert ask(data_dir, "PING") == "+PONG\r\n"
    assert server.ended(2.0)
    assert not folder.exists()


def test_a_broken_pythonpath_does_not_reach_it(data_dir, tmp_path, monkeypatch):
    for name in ("socket.py", "sitecustomize.py", "subprocess.py"):
        (tmp_path / name).write_text("raise RuntimeError('broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with embedded.acquire(data_dir) as server:
        assert ask(data_dir, "PING") == "+PONG\r\n"
    assert server.ended(2.0)


def test_a_server_that_cannot_start_is_one_line_and_leaves_nothing(data_dir):
    (data_dir / "valkey").mkdir(parents=True)
    (data_dir / "valkey" / "appendonlydir").write_text("in the way")
    with pytest.raises(ConfigurationError, match="did not start") as caught:
        embedded.acquire(data_dir, wait=10.0)
    assert len(str(caught.value).splitlines()) == 1
    assert "valkey.log" in str(caught.value)
    assert until(lambda: nothing_left(data_dir, []) and not servers(data_dir), 2.0)


def test_a_binary_that_is_none_is_one_line(data_dir, tmp_path, monkeypatch):
    fake = tmp_path / "valkey-server"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o700)
    monkeypatch.setattr(embedded, "server_binary", lambda: fake)
    with pytest.raises(ConfigurationError, match="ended at once"):
        embedded.acquire(data_dir, wait=10.0)
    assert until(lambda: nothing_left(data_dir, []), 2.0)
