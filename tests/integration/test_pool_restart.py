"""``pool_restart``: the processes are replaced, and run the code as it is now."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.node import PATIENCE, Node, Server, client_of, control, eventually

APP = """
import os
from celery import Celery

app = Celery("mill", broker=os.environ["BROKER"], backend=os.environ["RESULTS"], include=["wheels"])
app.conf.worker_pool_restarts = True
app.conf.mpworker_start_method = os.environ["METHOD"].replace("template", "auto")
if os.environ["METHOD"] == "template":  # which a thread of the main process makes of auto
    from celery.signals import worker_init
    from threading import Event, Thread
    worker_init.connect(lambda **_: Thread(target=Event().wait, daemon=True).start(), weak=False)

import mpworker
mpworker.install(app)
"""
WHEELS = """
import os, time
from mill import app

@app.task
def turn():
    return {text!r}, os.getpid()

@app.task
def hold(gate):
    open(gate + ".here", "w").close()
    while not os.path.exists(gate):
        time.sleep(0.02)
    return {text!r}, os.getpid()
"""
#: Its name is that of a function in a function, which no import makes again; by the module, it does.
LOCAL = """

def plain(function):
    def call():
        return function()
    return call

@app.task(name="wheels.local")
@plain
def local():
    return 1
"""
MORE = """
from mill import app

@app.task
def polish():
    return "shines"
"""


@pytest.mark.parametrize("method", ["auto", "template", "spawn", "fork"])
def test_new_code_without_a_new_node(method: str, tmp_path: Path) -> None:
    (tmp_path / "mill.py").write_text(APP)
    more = LOCAL if method == "auto" else ""
    (tmp_path / "wheels.py").write_text(WHEELS.format(text="old") + more)
    with Server() as server, client_of(server) as client:
        env = {"BROKER": server.broker, "RESULTS": server.results, "METHOD": method}
        with Node(tmp_path / "node", "-c", "2", app="mill", cwd=tmp_path, env=env) as node:

            def run(name: str) -> object:
                return client.send_task(name).get(timeout=PATIENCE)

            assert run("wheels.turn")[0] == "old"
            before = set(node.pids("mpworker: worker"))
            gate = tmp_path / "gate"
            held = client.send_task("wheels.hold", args=(str(gate),))
            eventually(lambda: Path(f"{gate}.here").exists(), what="it runs")

            (tmp_path / "wheels.py").write_text(WHEELS.format(text="new, and longer") + more)
            (tmp_path / "more.py").write_text(MORE)
            assert "ok" in control(client, node, "pool_restart", modules=["wheels", "more"], reload=True)
            text, pid = eventually(lambda: (answer := run("wheels.turn"))[0] != "old" and answer, what="new code")
            assert text == "new, and longer"
            assert pid not in before
            assert run("more.polish") == "shines"

            gate.touch()
            assert held.get(timeout=PATIENCE)[0] == "old"
            eventually(lambda: not before & set(node.pids("mpworker: worker")), what="everybody has been replaced")
            assert run("wheels.turn")[0] == text
            assert "ERROR" not in node.log()


def test_it_has_to_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "mill.py").write_text(APP.replace("app.conf.worker_pool_restarts = True", ""))
    (tmp_path / "wheels.py").write_text(WHEELS.format(text="old"))
    with Server() as server, client_of(server) as client:
        env = {"BROKER": server.broker, "RESULTS": server.results, "METHOD": "auto"}
        with Node(tmp_path / "node", "-c", "1", app="mill", cwd=tmp_path, env=env) as node:
            assert client.send_task("wheels.turn").get(timeout=PATIENCE)  # from here on it listens to all there is
            assert "not enabled" in str(control(client, node, "pool_restart"))
