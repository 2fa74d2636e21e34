"""A broker without an event loop (the filesystem transport): a supervisor thread does what the loop does elsewhere."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import threading

import pytest
from celery import Celery
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from celery.worker import state as worker_state
from integration.node import PATIENCE, Node, eventually

from mpworker.celery.pool import EX_BROKEN, TaskPool
from mpworker.pool import fleet, handle


class Files:
    """Folders as a broker, and a client of it."""

    def __init__(self, folder):
        for name in ("queue", "control", "results", "written", "returned"):
            (folder / name).mkdir(parents=True)
        self.queue, self._written, self._returned = folder / "queue", folder / "written", folder / "returned"
        self.transport = {
            "data_folder_in": str(self.queue),
            "data_folder_out": str(self._returned),
            "control_folder": str(folder / "control"),
            "polling_interval": 0.05,
        }
        self.results = f"file://{folder / 'results'}"
        self.app = Celery("client", broker="filesystem://", backend=self.results, set_as_current=False)
        # A node that finds a message half written ends (kombu's transport), so whole ones are moved to it.
        self.app.conf.broker_transport_options = {**self.transport, "data_folder_out": str(self._written)}

    def node(self, folder, *args, **config):
        config = {"broker_transport_options": self.transport, **config}
        env = {"SHOP_BROKER": "filesystem://", "SHOP_RESULTS": self.results}
        return Node(folder, "--without-heartbeat", *args, env=env, config=config)

    def send(self, name, *args, **options):
        name = name if "." in name else f"shop.tasks.{name}"
        result = self.app.send_task(name, args=args, **options)
        for message in self._written.iterdir():
            message.rename(self.queue / message.name)
        return result

    def come_back(self):
        """Moves what a node has sent or given back. It may be at it just now; then it has the file locked."""
        for message in self._returned.iterdir():
            with message.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                if file.read(1):
                    message.rename(self.queue / message.name)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    files = Files(tmp_path_factory.mktemp("broker"))
    with files.node(tmp_path_factory.mktemp("node"), "-c", "2") as node:
        yield files, node
    files.app.close()


def test_tasks(shop):
    files, node = shop
    results = [files.send("add", n, n) for n in range(20)]
    assert [result.get(timeout=PATIENCE) for result in results] == [2 * n for n in range(20)]
    # Not asked of the results: in Celery's files the RETRY of one run may overwrite the SUCCESS of the next.
    flaky = files.send("flaky", 2)
    (note,) = eventually(lambda: files.come_back() or node.notes.read("success", id=flaky.id))
    assert note["result"] == 2
    assert files.send("describe").get(timeout=PATIENCE)["pid"] in node.pids("mpworker: worker")
    with pytest.raises(ValueError, match="over files"):
        files.send("fail", "over files").get(timeout=PATIENCE)


def test_a_task_of_later(shop):
    files, _ = shop
    assert files.send("add", 1, 2, countdown=0.3).get(timeout=PATIENCE) == 3


def test_limits(shop):
    files, node = shop
    assert files.send("careful", 60, soft_time_limit=0.4).get(timeout=PATIENCE) == "cleaned up"
    result = files.send("nap", 60, time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=PATIENCE)
    assert len(node.notes.wait("failure", id=result.id)) == 1
    assert files.send("add", 1, 1).get(timeout=PATIENCE) == 2


def test_a_lost_worker(shop):
    files, node = shop
    with pytest.raises(WorkerLostError):
        files.send("die", "kill").get(timeout=PATIENCE)
    assert files.send("add", 1, 1).get(timeout=PATIENCE) == 2
    eventually(lambda: len(node.pids("mpworker: worker")) == 2)


def test_callbacks(shop):
    files, node = shop
    files.send("shop.hooks.hooked", "return", "over files")
    (note,) = node.notes.wait("callback", of="over files")
    assert note["pid"] in node.pids("mpworker: callbacks")
    files.send("shop.hooks.hooked", "kill")
    node.notes.wait("error_callback", type="WorkerLostError")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGQUIT], ids=["warm", "cold"])
def test_shutdown(tmp_path, signum):
    files = Files(tmp_path / "broker")
    with files.node(tmp_path / "node", "-c", "1") as node:
        running = files.send("hold", "gate")
        node.notes.wait("hold", name="gate")
        waiting = [files.send("add", n, n) for n in range(3)]
        node.signal(signum)
        node.await_log("shutdown (MainProcess)")
        if signum == signal.SIGTERM:
            (node.folder / "gate").touch()
            assert node.wait() == 0
            assert running.get(timeout=PATIENCE) == "gate"
        node.wait(15.0)
        node.await_gone(2.0)
    if signum == signal.SIGTERM:
        files.come_back()
        with files.node(tmp_path / "second", "-c", "1"):
            assert [result.get(timeout=PATIENCE) for result in waiting] == [0, 2, 4]
    files.app.close()


def test_a_job_that_is_taken_back_leaves_its_slot():
    app = Celery("slots", broker="memory://", set_as_current=False)
    pool = TaskPool(1, app=app, threads=True, putlocks=True, semaphore=None, initargs=(app, "slots@here"))
    pool.start()
    try:
        os.kill(pool.handle.workers[0]["pid"], signal.SIGKILL)  # until it is replaced nothing can start
        roots = []
        pool.on_apply(math.sqrt, (4,), {}, waitforslot=True, callback=roots.append)
        pool.flush()
        second = threading.Thread(
            target=pool.on_apply,
            args=(math.sqrt, (9,), {}),
            kwargs={"waitforslot": True, "callback": roots.append},
            daemon=True,
        )
        second.start()
        second.join(PATIENCE)
        assert not second.is_alive(), "no slot is free although nothing runs"
        eventually(lambda: 3.0 in roots)
    finally:
        pool.terminate()


def test_a_node_whose_dispatcher_cannot_be_replaced_ends(monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, "no process can be had")

    app = Celery("zombie", broker="memory://", set_as_current=False)
    pool = TaskPool(1, app=app, threads=True, putlocks=True, semaphore=None, initargs=(app, "zombie@here"))
    pool.start()
    try:
        monkeypatch.setattr(worker_state, "should_stop", None)
        monkeypatch.setattr(handle, "_START_PAUSE", 0.01)
        for launch in ("launch", "launch_forked"):  # either, as other tests may have left tasks in this process
            monkeypatch.setattr(fleet, launch, refuse)
        os.kill(pool.handle.pid, signal.SIGKILL)
        eventually(lambda: worker_state.should_stop == EX_BROKEN, what="the node is told to end")
    finally:
        pool.terminate()
