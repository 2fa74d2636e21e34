"""Log lines of all processes of a node: whole, none lost, each with its process and its task."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest
from integration.node import PATIENCE, Node, Server, client_of, eventually

LONG, TASKS, TIMES = 20_000, 12, 12
LINE = re.compile(r"^\[(?P<when>[^\]]*?): (?P<level>\w+)/(?P<process>[\w-]+)\] (?P<message>.*)$")


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture
def client(server):
    with client_of(server) as client:
        yield client


class Pipe:
    """What a service manager does with a worker's stderr: one reader at the end of a pipe."""

    def __init__(self):
        self.reader, self.writer = os.pipe()
        self.data = bytearray()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self):
        while chunk := os.read(self.reader, 1 << 16):
            self.data += chunk

    def close(self):
        os.close(self.writer)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "somebody still holds the pipe"
        os.close(self.reader)


class PipedNode(Node):
    def log(self):
        return self._pipe.data.decode(errors="replace")


def environment(server):
    return {"SHOP_BROKER": server.broker, "SHOP_RESULTS": server.results}


def flood(client, node):
    """Long lines from four workers at once, tracebacks between them."""
    texts = [f"text-{n} " + chr(97 + n) * LONG for n in range(TASKS)]
    results, failures = [], []
    for text in texts:
        results.append(client.send_task("shop.tasks.say", args=(text, TIMES)))
        failures.append(client.send_task("shop.tasks.fail", args=(f"traceback-{len(failures)} " + "z" * 5000,)))
    for result in results:
        result.get(timeout=PATIENCE)
    for failure in failures:
        with pytest.raises(ValueError, match="traceback-"):
            failure.get(timeout=PATIENCE)
    return texts, results, failures


def kill_one_that_logs(client, node):
    """SIGKILL in the middle of a flood of long lines: the others must go on."""
    for turn in range(4):
        victim = client.send_task("shop.tasks.say", args=("v" * LONG, 100_000))
        (note,) = node.notes.wait("prerun", id=victim.id)
        node.await_log(f"{victim.id}]: vvv")
        os.kill(note["pid"], signal.SIGKILL)
        with pytest.raises(Exception, match="Worker exited prematurely"):
            victim.get(timeout=PATIENCE)
        assert client.send_task("shop.tasks.add", args=(turn, 1)).get(timeout=PATIENCE) == turn + 1


def check(log, texts, results, failures):
    lines = log.splitlines()
    for text, result in zip(texts, results, strict=True):
        mine = [
            match
            for line in lines
            if (match := LINE.match(line)) and text.split()[0] + " " in line and ": received" not in line
        ]
        said = [match for match in mine if re.search(r"[a-z] \d+$", match["message"])]
        assert sorted(int(match["message"].rsplit(" ", 1)[1]) for match in said) == list(range(TIMES))
        for match in said:
            assert match["message"].endswith(f"{text} {match['message'].rsplit(' ', 1)[1]}")
            assert f"shop.tasks.say[{result.id}]" in match["message"]
            assert match["process"].startswith("worker-")
        assert len({match["process"] for match in said}) == 1
    for n, failure in enumerate(failures):
        (start,) = [
            i for i, line in enumerate(lines) if f"Task shop.tasks.fail[{failure.id}] raised unexpected" in line
        ]
        assert lines[start + 1] == "Traceback (most recent call last):"
        end = next(i for i in range(start + 1, start + 30) if lines[i].startswith("ValueError: "))
        assert lines[end] == f"ValueError: traceback-{n} " + "z" * 5000
        assert not any(LINE.match(line) for line in lines[start + 1 : end])


def test_through_a_pipe_also_when_a_worker_is_killed_while_it_logs(server, client, tmp_path):
    pipe = Pipe()
    node = PipedNode(tmp_path, "-c", "4", env=environment(server), output=pipe.writer)
    node._pipe = pipe
    try:
        node.start()
        told = flood(client, node)
        eventually(lambda: node.log().count("raised unexpected: ValueError('traceback-") >= TASKS)
        whole = node.log()
        kill_one_that_logs(client, node)
        assert node.stop() == 0
    finally:
        node.kill()
        pipe.close()
    check(whole, *told)


def test_in_a_file(server, client, tmp_path):
    path = tmp_path / "logs" / "node.log"
    path.parent.mkdir(mode=0o700)

    class FiledNode(Node):
        def log(self):
            return path.read_text(errors="replace") if path.exists() else ""

    with FiledNode(tmp_path, "-c", "4", "-f", str(path), env=environment(server)) as node:
        told = flood(client, node)
        printed = client.send_task("shop.tasks.prints", args=("said aloud",))
        printed.get(timeout=PATIENCE)
        assert node.stop() == 0
    (line,) = [line for line in node.log().splitlines() if line.endswith("said aloud")]
    assert "/worker-" in line
    assert f"shop.tasks.prints[{printed.id}]" in line
    check(node.log(), *told)
    assert path.stat().st_mode & 0o077 == 0
