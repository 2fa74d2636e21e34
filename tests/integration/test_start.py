"""How the workers of a node start: which way ``auto`` takes, why, and what they then know."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import celery
import pytest
from integration.node import PATIENCE, Node, Server, ask, client_of, eventually

APP = """
import os, threading
from celery import Celery, signals

app = Celery("mint", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
app.conf.mpworker_start_method = os.environ.get("METHOD", "auto")

import mpworker
mpworker.install(app)

state = {"pid": os.getpid()}

@signals.worker_init.connect
def opened(**kwargs):
    state["model"] = "loaded before the fork"
    state["pool"] = app.pool  # of connections, which must not be shared

@app.on_after_fork.connect
def forked(**kwargs):
    state["forked"] = state.get("forked", 0) + 1

@app.task
def know():
    return {"model": state.get("model"), "forked": state.get("forked"), "pool": state.get("pool") is app.pool,
            "loaded_here": state["pid"] == os.getpid()}
"""
WAIT = "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
#: Started by the main process only: prefork's children would not have it.
THREAD = f"\n@signals.worker_init.connect\ndef watch(**kwargs):\n    {WAIT}"
#: Started by whoever imports the application.
IMPORTED_THREAD = "\n" + WAIT


@pytest.fixture
def mint(tmp_path: Path) -> Iterator[Callable[..., tuple[Node, Any]]]:
    """Starts a node of that application, with more code and variables."""
    with ExitStack() as stack:

        def start(code: str = "", *args: str, **env: str) -> tuple[Node, Any]:
            (tmp_path / "mint.py").write_text(APP + code)
            server = stack.enter_context(Server())
            env = {"BROKER": server.broker, "RESULTS": server.results, **env}
            client = stack.enter_context(client_of(server))
            node = stack.enter_context(Node(tmp_path / "node", "-c", "2", *args, app="mint", cwd=tmp_path, env=env))
            return node, client

        yield start


def said(node: Node) -> list[str]:
    """What the log tells of the way."""
    return [line.partition("start method ")[2] for line in node.log().splitlines() if "start method " in line]


def know(client: Any) -> dict[str, Any]:
    found: dict[str, Any] = client.send_task("mint.know").get(timeout=PATIENCE)
    return found


def test_a_main_process_with_one_thread_is_forked_as_prefork_does(mint: Callable[..., tuple[Node, Any]]) -> None:
    node, client = mint()
    found = know(client)
    assert said(node) == ["fork: the main process has loaded the application, and has one thread"]
    # What worker_init has opened is there; connections, and what the user says of them, are the worker's own.
    assert found == {"model": "loaded before the fork", "forked": 1, "pool": False, "loaded_here": False}
    (worker, *_) = node.pids("mpworker: worker")
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: len(set(node.pids("mpworker: worker")) - {worker}) == 2, what="a replacement")
    assert know(client) == found


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="a setting of Celery 5.7")
def test_celerys_own_setting_counts(mint: Callable[..., tuple[Node, Any]]) -> None:
    node, client = mint("\napp.conf.worker_pool_start_method = 'spawn'\n")
    assert know(client) == {"model": None, "forked": None, "pool": False, "loaded_here": True}
    assert said(node) == ["spawn: worker_pool_start_method says so"]
    assert not node.pids("mpworker: template")


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="an option of Celery 5.7")
def test_as_many_processes_as_the_control_group_allows(mint: Callable[..., tuple[Node, Any]]) -> None:
    """Celery itself asks for that quota with its own pool only: here there is one of one and a half CPUs."""
    quota = "\nfrom celery.utils import sysinfo\n"
    quota += "sysinfo.cgroup_cpu_quota, sysinfo.available_cpu_count = lambda: 1.5, lambda: 8\n"
    node, client = mint(quota, "-c", "auto")
    assert ask(client, node, "stats")["pool"]["max-concurrency"] == 2
    assert "resolved to 2 (pool=mpworker, cgroup cpu quota=1.50, available cpus=8)" in node.log()
    assert "only sizes the prefork pool" not in node.log()


def test_a_lost_template_is_replaced_by_one_that_loads_the_application(
    mint: Callable[..., tuple[Node, Any]],
) -> None:
    node, client = mint("", "--max-tasks-per-child", "1")
    know(client)
    template = node.the_one("mpworker: template")
    os.kill(template, signal.SIGKILL)
    assert [know(client)["model"] for _ in range(6)][-1] is None
    assert node.log().count("what worker_init had opened there, cannot be had again") == 1
    assert node.the_one("mpworker: template")


def test_a_lost_dispatcher_is_replaced_by_one_that_forks_nothing_of_ours(
    mint: Callable[..., tuple[Node, Any]],
) -> None:
    node, client = mint()
    know(client)
    (dispatcher,) = node.pids("mpworker: dispatcher")
    os.kill(dispatcher, signal.SIGKILL)
    eventually(lambda: know(client)["model"] is None, what="workers of a template")
    assert node.log().count("what worker_init has opened is not in the new workers") == 1
    assert ask(client, node, "stats")["pool"]["start-method"] == "auto"


def test_the_bundled_server_is_in_nobodys_way(tmp_path: Path) -> None:
    node = Node(tmp_path / "node", "-c", "1", app="mpworker", cwd=tmp_path)
    with node:
        assert said(node) == ["fork: the main process has loaded the application, and has one thread"]


def test_beside_a_thread_the_application_is_loaded_by_a_template(mint: Callable[..., tuple[Node, Any]]) -> None:
    node, client = mint(THREAD)
    found = know(client)
    (way,) = said(node)
    assert way.startswith("auto: the application is loaded once more, in a template; the main process has 2 threads")
    assert (found["model"], found["loaded_here"]) == (None, False)
    assert node.the_one("mpworker: template")


def test_an_application_that_starts_threads_is_loaded_by_each_worker(mint: Callable[..., tuple[Node, Any]]) -> None:
    node, client = mint(IMPORTED_THREAD)
    found = know(client)
    first, second = said(node)
    assert first.startswith("auto: ")
    assert second.startswith("spawn: with the application loaded, the template has 2 threads")
    assert found["loaded_here"] is True
    assert node.pids("mpworker: template") == []


def test_an_open_gpu_is_left_to_processes_of_its_own(mint: Callable[..., tuple[Node, Any]], tmp_path: Path) -> None:
    """CUDA refuses to work in a fork of the process that has initialised it."""
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "sitecustomize.py").write_text(
        f"from mpworker.pool import linux\nlinux._GPU_DEVICES = ({str(tmp_path / 'nvidia')!r},)\n"
    )
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    home = str(Path(__file__).parents[2])
    code = f"\ncuda = open({str(tmp_path / 'nvidiactl')!r})\n"
    node, client = mint(code, PYTHONPATH=os.pathsep.join([paths, home]))
    found = know(client)
    first, second = said(node)
    assert f"has opened {tmp_path / 'nvidiactl'}" in first
    assert second.startswith("spawn: ")
    assert found["loaded_here"] is True


def test_a_way_that_is_asked_for_is_taken(mint: Callable[..., tuple[Node, Any]]) -> None:
    node, client = mint(THREAD, METHOD="fork")
    assert know(client)["model"] == "loaded before the fork"
    assert said(node) == []


@pytest.mark.parametrize("code", ["", THREAD], ids=["fork", "template"])
def test_a_signal_to_all_processes_at_once_ends_the_node_in_peace(
    code: str, mint: Callable[..., tuple[Node, Any]]
) -> None:
    """As systemd sends it to the whole control group."""
    node, client = mint(code)
    know(client)
    for pid in node.processes():
        os.kill(pid, signal.SIGTERM)
    assert node.wait() == 0
    node.await_gone(2.0)
    log = node.log()
    assert log.count("Warm shutdown") == 1
    assert "Traceback" not in log
    assert "died" not in log


def test_workers_that_cannot_start_end_the_node(mint: Callable[..., tuple[Node, Any]], tmp_path: Path) -> None:
    """It has said "ready" by then, because its workers start while it connects."""
    code = "\n@signals.worker_process_init.connect\ndef fail(**kwargs):\n    os._exit(3)\n"
    (tmp_path / "mint.py").write_text(APP + code)
    with Server() as server:
        env = {"BROKER": server.broker, "RESULTS": server.results}
        node = Node(tmp_path / "node", "-c", "2", app="mint", cwd=tmp_path, env=env)
        try:
            node.launch()
            assert node.wait() == 70
            assert "the workers cannot start" in node.log()
            assert "Traceback" not in node.log()
            node.await_gone(2.0)
        finally:
            node.kill()
