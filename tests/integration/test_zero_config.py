"""``celery -A mpworker worker`` with nothing configured, with a broker configured, and in an existing project."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpworker import embedded

TASKS = """
from mpworker import app

@app.task
def add(x, y):
    return x + y
"""

CALL = """
from mpworker import app
print(app.send_task("example.add", (2, 3)).get(timeout=20))
"""

PROJECT = """
import os
from celery import Celery
import mpworker

app = mpworker.install(Celery("proj", broker=os.environ["URL"], backend=os.environ["URL"].replace("redis+", "")))
app.conf.result_backend = os.environ["URL"]

@app.task
def add(x, y):
    return x + y
"""


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def environment(folder, **changes):
    """That of a user who has configured nothing, with a home of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPWORKER_", "CELERY_", "XDG_"))}
    return {**kept, "HOME": str(folder / "home"), **changes}


class Node:
    """A worker in a folder; its output goes to a file."""

    def __init__(self, folder, *options, app="mpworker", **changes):
        self.log = folder / f"worker-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-l", "INFO", "-c", "1", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, env=environment(folder, **changes), start_new_session=True
            )

    def text(self):
        return self.log.read_text(errors="replace")

    def await_text(self, text, seconds=60.0):
        assert until(lambda: text in self.text() or self.process.poll() is not None, seconds), self.text()
        assert text in self.text(), self.text()

    def stop(self):
        self.process.terminate()
        return self.process.wait(30)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "example.py").write_text(TASKS)
    return tmp_path


@pytest.fixture
def start(folder):
    nodes = []

    def start(*options, **changes):
        nodes.append(Node(folder, *options, **changes))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            os.killpg(node.process.pid, signal.SIGKILL)
            node.process.wait()


def data_of(folder):
    return folder / "home" / ".local" / "state" / "mpworker"


def server_is_gone(folder):
    return not (data_of(folder) / "users.lock").exists() and not (data_of(folder) / "valkey.sock").exists()


def guard_of(folder):
    """The parent of the server that listens in this folder."""
    mark = f"valkey-server {embedded.socket_path(data_of(folder))}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "cmdline").read_bytes():
                return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    raise AssertionError("no server")


def call(folder, **changes):
    return subprocess.run(
        [sys.executable, "-c", CALL], cwd=folder, env=environment(folder, **changes), capture_output=True, text=True
    )


def test_a_worker_in_an_empty_folder_and_a_client_elsewhere(folder, start, tmp_path):
    node = start(MPWORKER_INCLUDE="example")
    node.await_text(" ready.")
    url = embedded.broker_url(data_of(folder))  # in a folder of its own where this one's path is too long
    assert Path(url.partition("://")[2]).is_socket()
    (folder / "elsewhere").mkdir()
    called = subprocess.run(
        [sys.executable, "-c", CALL], cwd=folder / "elsewhere", env=environment(folder), capture_output=True, text=True
    )
    assert called.stdout == "5\n", called.stderr
    assert [path.suffix for path in (data_of(folder) / "journal").glob("[!.]*")] == [".jsonl"]
    assert node.stop() == 0, node.text()
    assert until(lambda: server_is_gone(folder), 2.0)
    assert "Traceback" not in node.text()


def test_a_killed_worker_leaves_no_server(folder, start):
    node = start()
    node.await_text(" ready.")
    node.process.kill()
    node.process.wait()
    assert until(lambda: server_is_gone(folder), 2.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_node_brings_its_killed_server_back(folder, start):
    node = start(MPWORKER_INCLUDE="example")
    node.await_text(" ready.")
    os.kill(guard_of(folder), signal.SIGKILL)
    node.await_text("the bundled server has ended; starting it again")
    assert call(folder).stdout == "5\n"
    assert node.stop() == 0, node.text()
    assert until(lambda: server_is_gone(folder), 2.0)


def test_two_workers_in_one_folder_share_the_server(folder, start):
    first = start("-n", "one@%h", MPWORKER_INCLUDE="example")
    second = start("-n", "two@%h", MPWORKER_INCLUDE="example")
    first.await_text(" ready.")
    second.await_text(" ready.")
    assert first.stop() == 0
    assert call(folder).stdout == "5\n"
    assert second.stop() == 0
    assert until(lambda: server_is_gone(folder), 2.0)


def test_with_a_broker_configured_it_starts_no_server(folder, start, tmp_path):
    with embedded.acquire(tmp_path / "other") as other:
        url = other.broker_url
        node = start(MPWORKER_INCLUDE="example", MPWORKER_BROKER_URL=url)
        node.await_text(" ready.")
        called = call(folder, MPWORKER_BROKER_URL=url, MPWORKER_RESULT_BACKEND=url)
        assert called.stdout == "5\n", called.stderr
        assert not (data_of(folder) / "valkey").exists()
        assert node.stop() == 0, node.text()
    assert other.ended(3.0)


def test_an_existing_project_with_install(folder, start, tmp_path):
    (folder / "proj.py").write_text(PROJECT)
    with embedded.acquire(tmp_path / "other") as other:
        node = start(app="proj", URL=other.broker_url)
        node.await_text(" ready.")
        code = "import proj; print(proj.add.delay(2, 3).get(timeout=20), proj.app.conf.worker_pool)"
        called = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=environment(folder, URL=other.broker_url),
            capture_output=True,
            text=True,
        )
        assert called.stdout == "5 mpworker.celery.pool:TaskPool\n", called.stderr
        assert any((data_of(folder) / "journal").iterdir())
        assert node.stop() == 0, node.text()
    assert other.ended(3.0)


def test_a_variable_that_nothing_reads_is_one_warning(folder, start):
    node = start(MPWORKER_INCLUED="example")
    node.await_text("did you mean MPWORKER_INCLUDE?")
    node.await_text(" ready.")
    assert node.text().count("MPWORKER_INCLUED") == 1
    assert node.stop() == 0
    assert until(lambda: server_is_gone(folder), 2.0)
