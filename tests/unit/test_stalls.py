"""The stall detector's judgement: what is a stall, what only looks like one, and who is told."""

from __future__ import annotations

import socket
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from amqp.exceptions import NotFound
from celery import bootsteps
from celery.worker import state as worker_state
from kombu import Queue
from kombu.common import QoS
from kombu.utils.limits import TokenBucket

from mpworker.celery import stalls
from mpworker.celery.stalls import StallError, Verdict, Watch, may_take, raise_in_loop

FINE, RESTART, GIVE_UP = Verdict.FINE, Verdict.RESTART, Verdict.GIVE_UP


class Station:
    """A watch with a timeout of 4 s, and one look per second."""

    def __init__(self) -> None:
        self.watch, self.now, self.delivered, self.asked = Watch(4.0), 100.0, 0, 0

    def look(self, *, ready: bool = True, waits: bool = True, delivered: int = 0, after: float = 1.0) -> Verdict:
        def ask() -> bool:
            self.asked += 1
            return waits

        self.now += after
        self.delivered += delivered
        return self.watch.look(self.now, ready=ready, delivered=self.delivered, waits=ask)


def test_a_stall_is_noticed_after_the_timeout_and_given_up_after_another() -> None:
    station = Station()
    found = [station.look() for _ in range(12)]
    # The first look only learns how much has been delivered, the second is the first of a stall.
    assert found == [FINE] * 5 + [RESTART] + [FINE] * 4 + [GIVE_UP] + [FINE]


@pytest.mark.parametrize("event", [{"ready": False}, {"waits": False}, {"delivered": 1}])
def test_any_sign_of_life_begins_the_timeout_anew(event: dict[str, Any]) -> None:
    station = Station()
    for _ in range(10):
        assert {station.look(), station.look(), station.look(), station.look(**event)} == {FINE}


def test_only_a_delivery_forgives_the_first_strike() -> None:
    station = Station()
    assert [station.look() for _ in range(6)][-1] is RESTART
    assert station.look(ready=False) is FINE  # it reconnects
    assert station.look(waits=False) is FINE  # somebody else takes the message
    assert [station.look() for _ in range(5)][-1] is GIVE_UP
    station = Station()
    assert [station.look() for _ in range(6)][-1] is RESTART
    assert station.look(delivered=1) is FINE
    assert [station.look() for _ in range(5)][-1] is RESTART


def test_what_a_lost_connection_takes_back_is_no_delivery() -> None:
    station = Station()
    station.delivered = 50
    assert [station.look() for _ in range(6)][-1] is RESTART
    assert station.look(delivered=-3) is FINE
    assert [station.look() for _ in range(5)] == [FINE] * 4 + [GIVE_UP]


def test_the_broker_is_asked_only_where_its_answer_matters() -> None:
    station = Station()
    for _ in range(5):
        station.look(ready=False)
        station.look(delivered=1)
    assert station.asked == 0


def test_a_process_that_was_stopped_begins_anew() -> None:
    station = Station()
    for _ in range(4):
        station.look()
    assert station.look(after=1000.0) is FINE
    assert [station.look() for _ in range(4)] == [FINE] * 3 + [RESTART]


# -- may it take a message? ------------------------------------------------------------------------------------------


class Request:
    def __init__(self, acks_late: bool = False, acknowledged: bool = False) -> None:
        self.task, self.acknowledged = SimpleNamespace(acks_late=acks_late), acknowledged


@pytest.fixture
def c(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A consumer of two processes that may hold eight messages, and has none."""
    running = SimpleNamespace(state=bootsteps.RUN)
    for name in ("reserved_requests", "scheduled_requests"):
        monkeypatch.setattr(worker_state, name, set())
    return SimpleNamespace(
        blueprint=SimpleNamespace(state=bootsteps.RUN),
        controller=SimpleNamespace(blueprint=running),
        connection=object(),
        task_consumer=object(),
        qos=QoS(lambda prefetch_count: None, 8),
        pool=SimpleNamespace(num_processes=2),
        task_buckets=defaultdict(lambda: None),
        connection_errors=(OSError,),
        hub=None,
    )


def test_a_free_consumer_may_take_one(c: Any) -> None:
    assert may_take(c)
    worker_state.reserved_requests.add(Request())
    assert may_take(c)


@pytest.mark.parametrize("name", ["connection", "task_consumer", "qos"])
def test_one_that_is_not_connected_may_not(c: Any, name: str) -> None:
    setattr(c, name, None)
    assert not may_take(c)


@pytest.mark.parametrize("where", ["blueprint", "controller"])
def test_one_that_stops_may_not(c: Any, where: str) -> None:
    blueprint = c.blueprint if where == "blueprint" else c.controller.blueprint
    blueprint.state = bootsteps.CLOSE
    assert not may_take(c)


@pytest.mark.parametrize("flag", ["should_stop", "should_terminate"])
def test_one_that_is_about_to_stop_may_not(c: Any, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_state, flag, 0)
    assert not may_take(c)


def test_one_whose_slots_are_taken_may_not(c: Any) -> None:
    worker_state.reserved_requests.update(Request() for _ in range(2))
    assert not may_take(c)
    c.pool.num_processes = 3
    assert may_take(c)
    worker_state.reserved_requests.clear()
    c.pool.num_processes = 0
    assert not may_take(c)


def test_one_that_holds_as_many_as_it_may_may_not(c: Any) -> None:
    bucket = TokenBucket(1.0)
    c.task_buckets["limited"], c.task_buckets["other"] = bucket, None
    for _ in range(7):
        bucket.add((Request(), 1))
    assert may_take(c)
    worker_state.scheduled_requests.add(Request())
    assert not may_take(c)
    c.qos.increment_eventually()  # as Celery does for each message with an ETA
    assert may_take(c)
    c.qos.value = 0  # as many as it likes
    bucket.contents.extend([(Request(), 1)] * 100)
    assert may_take(c)


# -- how it is told --------------------------------------------------------------------------------------------------


def test_the_loop_raises_what_is_taken_for_a_lost_connection(c: Any) -> None:
    told: list[int] = []
    c.qos = QoS(lambda prefetch_count: told.append(prefetch_count), 8)
    c.qos.update()
    raise_in_loop(c)
    assert c.qos.prev != c.qos.value  # what both loops look at
    with pytest.raises(StallError, match="nothing was delivered"):
        c.qos.update()
    c.qos.update()
    assert told == [8, 8]
    c.connection_errors = (KeyError,)
    raise_in_loop(c)
    with pytest.raises(KeyError, match="nothing was delivered"):
        c.qos.update()


def test_the_loop_raises_nothing_while_the_broker_would_deliver_a_running_task_again(c: Any) -> None:
    told: list[int] = []
    c.qos = QoS(lambda prefetch_count: told.append(prefetch_count), 8)
    worker_state.reserved_requests.add(Request(acks_late=True))
    raise_in_loop(c)
    c.qos.update()
    c.qos.update()
    assert told == [8]
    worker_state.reserved_requests.clear()
    worker_state.reserved_requests.update([Request(), Request(acks_late=True, acknowledged=True)])
    assert not stalls.late_tasks_run()


@pytest.mark.parametrize(
    ("queue", "counts"),
    [
        (Queue("a"), True),
        (Queue("a", queue_arguments={"x-max-priority": 9}), True),
        (Queue("a", queue_arguments={"x-single-active-consumer": True}), False),
        (Queue("a", queue_arguments={"x-queue-type": "stream"}), False),
        (Queue("a", exclusive=True), False),
    ],
)
def test_queues_whose_messages_may_wait_are_not_counted(queue: Queue, counts: bool) -> None:
    assert stalls._serves_everybody(queue) is counts


def test_a_queue_that_is_not_there_holds_nothing() -> None:
    class Channel:
        closed = False

        def queue_declare(self, queue: str, passive: bool) -> Any:
            assert passive
            assert not self.closed
            if queue == "gone":
                self.closed = True  # as RabbitMQ does
                raise NotFound("no queue")
            return SimpleNamespace(message_count=3)

        def __enter__(self) -> Channel:
            return self

        def __exit__(self, *_: object) -> None: ...

    connection = SimpleNamespace(default_channel=Channel(), channel=Channel, channel_errors=(NotFound,))
    assert [stalls._count(connection, name) for name in ("gone", "there", "gone")] == [0, 3, 0]


def test_the_sockets_of_a_connection_are_found_without_opening_any() -> None:
    def holder(name: str) -> Any:
        return SimpleNamespace(connection=SimpleNamespace(_sock=name))

    pool = SimpleNamespace(_in_use_connections=[SimpleNamespace(_sock="pooled"), SimpleNamespace(_sock=None)])
    channels = [SimpleNamespace(client=holder("client"), subclient=holder("sub"), _pool=pool), SimpleNamespace()]
    redis = SimpleNamespace(_transport=SimpleNamespace(channels=channels), _connection=None)
    assert sorted(stalls._sockets(redis)) == ["client", "pooled", "sub"]
    amqp = SimpleNamespace(
        _transport=SimpleNamespace(), _connection=SimpleNamespace(_transport=SimpleNamespace(sock="amqp"))
    )
    assert list(stalls._sockets(amqp)) == ["amqp"]
    assert list(stalls._sockets(None)) == []


def test_a_loop_that_hangs_is_woken_by_its_sockets(c: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(stalls, "_sockets", lambda connection: [ours])
    monkeypatch.setattr(stalls, "_REACTION", 0.01)
    monkeypatch.setattr(stalls, "settings_of", lambda app: SimpleNamespace(stall_timeout=0.01))
    c.app, c.steps = None, []
    detector = stalls.StallDetector(c)
    with ours, theirs:
        detector._break_connection(c, lambda: False)
        assert theirs.recv(1) == b""
