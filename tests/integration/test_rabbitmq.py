"""RabbitMQ as the broker: the other asynchronous transport, with real acknowledgements and heartbeats."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path

import amqp
import pytest
from celery import Celery, chord
from celery.exceptions import TaskRevokedError, TimeLimitExceeded, WorkerLostError
from integration.node import PATIENCE, Node, Server, ask, eventually

from mpworker.celery import requeue
from mpworker.celery.deadletters import DeadLetter

PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's; the one on PATH changes the user


def missing():
    return not PROGRAM.exists() or shutil.which("epmd") is None


pytestmark = pytest.mark.skipif(missing() and os.environ.get("CI") != "true", reason="rabbitmq-server is not installed")


class RabbitMQ:
    """A broker with ports, data and a port mapper of its own, so that it meets no other."""

    def __init__(self):
        assert not missing(), f"{PROGRAM} and epmd are needed"
        self.folder = Path(tempfile.mkdtemp(prefix="mpw-rabbit-"))
        self.port, self.distribution, self.mapper_port = _free_ports(3)
        self.broker = f"amqp://guest:guest@127.0.0.1:{self.port}//"
        self.processes = []

    def start(self):
        (self.folder / "rabbit.conf").write_text(f"listeners.tcp.local = 127.0.0.1:{self.port}\n")
        (self.folder / "plugins").write_text("[].\n")
        env = {
            **os.environ,
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self.mapper_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"mpw{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.distribution),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbit.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
        }
        # A mapper of our own, in the foreground: the one that Erlang would start stays for ever.
        mapper = [] if self.processes else [["epmd", "-port", str(self.mapper_port)]]
        with open(self.folder / "output", "ab") as output:
            for command in (*mapper, [str(PROGRAM)]):
                self.processes.append(
                    subprocess.Popen(
                        command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                    )
                )
        eventually(self._answers, 90.0, f"RabbitMQ answers; see {self.folder}/output")

    def _answers(self):
        assert self.processes[-1].poll() is None, (self.folder / "output").read_text(errors="replace")[-2000:]
        with contextlib.suppress(OSError, amqp.exceptions.AMQPError):
            with amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=2):
                return True
        return False

    def kill(self, signum=signal.SIGKILL):
        """As a crash would; :meth:`start` brings it back with what it has on disk: all, after SIGTERM."""
        server = self.processes.pop()
        os.killpg(server.pid, signum)
        server.wait(PATIENCE)

    def stop(self):
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its data is not needed again
            process.wait(PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="module")
def broker():
    with Server() as results:
        rabbit = RabbitMQ()
        try:
            rabbit.start()
            yield rabbit, results
        finally:
            rabbit.stop()


@pytest.fixture(scope="module")
def client(broker):
    rabbit, results = broker
    app = Celery("client", broker=rabbit.broker, backend=results.results, set_as_current=False)
    yield app
    app.backend.result_consumer.cancel_for = lambda task_id: None
    app.close()


def node_on(broker, folder, *args, **config):
    rabbit, results = broker
    return Node(folder, *args, env={"SHOP_BROKER": rabbit.broker, "SHOP_RESULTS": results.results}, config=config)


@pytest.fixture(scope="module")
def shop(broker, client, tmp_path_factory):
    config = {"task_acks_late": True, "worker_prefetch_multiplier": 1, "broker_heartbeat": 4}
    with node_on(broker, tmp_path_factory.mktemp("node"), "-c", "2", **config) as node:
        yield node, client


def send(client, name, *args, **options):
    return client.send_task(f"shop.tasks.{name}", args=args, **options)


def messages(broker, queue="celery"):
    """How many wait in the queue."""
    rabbit, _ = broker
    with amqp.Connection(f"127.0.0.1:{rabbit.port}") as connection:
        return connection.channel().queue_declare(queue, passive=True).message_count


def test_tasks(shop):
    _, client = shop
    results = [send(client, "add", n, n) for n in range(50)]
    assert [result.get(timeout=PATIENCE) for result in results] == [2 * n for n in range(50)]
    assert send(client, "flaky", 2).get(timeout=PATIENCE) == 2
    with pytest.raises(ValueError, match="over amqp"):
        send(client, "fail", "over amqp").get(timeout=PATIENCE)
    parts = [client.signature("shop.tasks.add", args=(n, 1)) for n in range(5)]
    assert chord(parts, app=client)(client.signature("shop.tasks.total")).get(timeout=PATIENCE) == 15


def test_limits(shop):
    node, client = shop
    assert send(client, "careful", 60, soft_time_limit=0.4).get(timeout=PATIENCE) == "cleaned up"
    result = send(client, "nap", 60, time_limit=0.5)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=PATIENCE)
    assert len(node.notes.wait("failure", id=result.id)) == 1


def test_a_lost_worker_and_its_redelivery(shop):
    node, client = shop
    with pytest.raises(WorkerLostError):
        send(client, "die", "kill").get(timeout=PATIENCE)
    assert send(client, "once_more", "amqp").get(timeout=PATIENCE) == "second"
    assert len(node.notes.read("once_more", name="amqp")) == 2


def test_a_dead_message_counts_as_sent_once_the_broker_has_it(shop):
    _, client = shop
    task_id = uuid.uuid4().hex
    letter = DeadLetter(
        id=task_id,
        name="shop.tasks.add",
        timestamp=0.0,
        deaths=3,
        reason="",
        node="",
        exchange="",
        routing_key="celery",
        priority=None,
        content_type="application/json",
        content_encoding="utf-8",
        headers={"lang": "py", "task": "shop.tasks.add", "id": task_id, "root_id": task_id},
        properties={"correlation_id": task_id},
        body=b'[[1, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]',
    )
    requeue.send(client, letter, PATIENCE)
    assert client.AsyncResult(task_id).get(timeout=PATIENCE) == 3
    with pytest.raises(amqp.exceptions.NotFound, match="nowhere"):  # said only to those who wait for it
        requeue.send(client, letter._replace(exchange="nowhere"), PATIENCE)


def test_revoke(shop):
    node, client = shop
    doomed = send(client, "nap", 60, "doomed")
    node.notes.wait("nap", name="doomed")
    client.control.revoke(doomed.id, terminate=True, destination=[node.name], reply=True, timeout=PATIENCE, limit=1)
    with pytest.raises(TaskRevokedError):
        doomed.get(timeout=PATIENCE)
    assert send(client, "add", 2, 2).get(timeout=PATIENCE) == 4
    assert doomed.state == "REVOKED"


def test_a_task_longer_than_the_heartbeats(shop):
    node, client = shop
    long = [send(client, "late_nap", 6, f"long {n}") for n in range(2)]
    assert [result.get(timeout=PATIENCE) for result in long] == ["long 0", "long 1"]
    assert len(node.notes.read("awake", name="long 0")) == 1
    assert "Connection to broker lost" not in node.log()


def test_warm_shutdown_beats_on_and_acknowledges(broker, client, tmp_path):
    config = {
        "task_acks_late": True,
        "worker_prefetch_multiplier": 2,
        "broker_heartbeat": 2,
        "task_default_queue": "second",
    }
    with node_on(broker, tmp_path, "-c", "1", **config) as node:
        running = send(client, "nap", 5, "last", queue="second")
        waiting = [send(client, "add", n, n, queue="second") for n in range(3)]
        node.notes.wait("nap", name="last")
        node.signal(signal.SIGTERM)
        assert node.wait() == 0
        node.await_gone(2.0)
        assert running.get(timeout=PATIENCE) == "last"
        assert messages(broker, "second") == 3
        assert len(node.notes.read("awake", name="last")) == 1
    with node_on(broker, tmp_path / "next", "-c", "1", **config) as node:
        assert [result.get(timeout=PATIENCE) for result in waiting] == [0, 2, 4]
        assert node.notes.read("nap") == []


def test_inspect(shop):
    node, client = shop
    assert ask(client, node, "stats")["pool"]["processes"] == node.pids("mpworker: worker")


@pytest.fixture
def alone(tmp_path):
    """A broker that may be killed, with a node."""
    rabbit = RabbitMQ()
    try:
        rabbit.start()
        with Server() as results:
            config = {"broker_connection_max_retries": None, "broker_connection_retry_on_startup": True}
            config |= {"task_acks_late": True, "worker_prefetch_multiplier": 1}
            app = Celery("client", broker=rabbit.broker, backend=results.results, set_as_current=False)
            with node_on((rabbit, results), tmp_path, "-c", "2", **config) as node:
                yield rabbit, results, node, app
            app.backend.result_consumer.cancel_for = lambda task_id: None
            app.close()
    finally:
        rabbit.stop()


@pytest.mark.parametrize("ends", ["before", "after"])
def test_what_rabbitmq_delivers_again_is_not_run_twice(alone, tmp_path, ends):
    """Its task ends before the broker is back, or runs until it has come again."""
    rabbit, results, node, app = alone
    running = send(app, "hold", "gate")
    node.notes.wait("hold")
    rabbit.kill(signal.SIGTERM)
    node.await_log("Connection to broker lost")
    if ends == "before":
        (tmp_path / "gate").touch()
        assert running.get(timeout=PATIENCE) == "gate"
    rabbit.start()
    if ends == "after":
        node.await_log("was delivered again to the node that has it")
        (tmp_path / "gate").touch()
        assert running.get(timeout=PATIENCE) == "gate"
    app._after_fork()  # forgets its connections
    assert [send(app, "add", n, n).get(timeout=PATIENCE) for n in range(4)] == [0, 2, 4, 6]
    assert len(node.notes.read("hold")) == 1
    assert node.stop() == 0
    assert messages((rabbit, results)) == 0


@pytest.mark.long
def test_twenty_restarts_under_load(alone):
    """``pytest -n 0 -m long tests/integration/test_rabbitmq.py``: some five minutes."""
    rabbit, _, node, app = alone
    for turn in range(20):
        for _ in range(10):
            send(app, "nap", 0.05, f"turn {turn}")
        node.notes.wait("awake", 3, name=f"turn {turn}")
        rabbit.kill()
        rabbit.start()
        app._after_fork()  # forgets its connections
        late = [send(app, "add", turn, n) for n in range(10)]
        eventually(lambda late=late: all(result.ready() for result in late), PATIENCE, f"turn {turn}")
        assert [result.result for result in late] == [turn + n for n in range(10)]
    assert len(node.pids("mpworker: worker")) == 2
