"""The bookkeeping of messages whose connection is lost, without a broker."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery.worker import state as worker_state

from mpworker.celery import unacked as module
from mpworker.celery.unacked import Unacked


class Gone(Exception):
    """The connection is."""


class Refused(Exception):
    """Redis's answer is an error."""


class Message:
    def __init__(self, channel, tag, task_id="", redelivered=False, **headers):
        self.channel, self.delivery_tag = channel, tag
        self.headers = {"id": task_id or tag, "task": "t", **headers}
        self.body, self.properties = b"[]", {"correlation_id": task_id or tag}
        self.delivery_info = {"redelivered": redelivered}

    def ack_log_error(self, *_):
        self.channel.basic_ack(self.delivery_tag)

    def reject_log_error(self, *_, requeue):
        self.channel.basic_reject(self.delivery_tag, requeue=requeue)


class Channel:
    """Of a broker which has heard ``heard``; it is also the QoS of its kind in Redis."""

    visibility_timeout = 3600

    def __init__(self, heard, kind="redis"):
        self.heard, self.error = heard, None
        self._delivered, self._dirty = {}, set()
        self._quick_append, self._quick_ack = self._delivered.__setitem__, self._dirty.add
        if kind == "redis":
            self.qos = self

    def _hear(self, *what):
        if self.error:
            raise self.error
        self.heard.append(what)

    def basic_ack(self, tag, multiple=False):
        self._hear("ack", tag)
        self._dirty.add(tag)

    def basic_reject(self, tag, requeue):
        self._hear("requeue" if requeue else "reject", tag)
        self._dirty.add(tag)

    def append(self, message, tag):
        self._hear("taken", tag)
        self._delivered[tag] = message

    def _flush(self):
        for tag in self._dirty:
            self._delivered.pop(tag, None)
        self._dirty.clear()

    def restore_by_tag(self, tag, leftmost=False):
        self._hear("first" if leftmost else "back", tag)

    def _remove_from_indices(self, tag):
        return SimpleNamespace(execute=lambda: self._hear("end", tag))


class Node:
    """A consumer with this step, and its connections."""

    def __init__(self, kind):
        self.kind, self.heard, self.handled = kind, [], []
        self.hub = SimpleNamespace(on_tick=set(), _pop_ready=list)
        self.consumer = SimpleNamespace(hub=self.hub, connection_errors=(Gone,), max_prefetch_count=0)
        self.consumer.qos = SimpleNamespace(value=0)
        self.step = Unacked(self.consumer)
        self.connect()

    def connect(self):
        self.channel = Channel(self.heard, self.kind)
        self.consumer.connection = SimpleNamespace(
            default_channel=self.channel,
            transport=SimpleNamespace(driver_type=self.kind),
            connection_errors=(Gone,),
            channel_errors=(Refused,),
        )
        self.consumer.task_consumer = SimpleNamespace(on_message=self.handled.append)
        self.step.start(self.consumer)
        self.step.register_with_event_loop(self.consumer, self.hub)

    def lose(self):
        self.consumer.connection.on_lost()

    def tick(self):
        for callback in self.hub.on_tick:
            callback()

    def receive(self, tag, *args, **kwargs):
        message = Message(self.channel, tag, *args, **kwargs)
        if self.kind == "redis":
            self.channel.append(message, tag)
        self.consumer.task_consumer.on_message(message)
        return message


class Request:
    name, acknowledged = "t", False

    def __init__(self, message):
        self.id, self.message = message.headers["id"], message
        worker_state.requests[self.id] = self
        worker_state.active_requests.add(self)


@pytest.fixture
def redis():
    return Node("redis")


@pytest.fixture
def rabbit():
    return Node("amqp")


@pytest.fixture(autouse=True)
def _state():
    yield
    worker_state.requests.clear()
    worker_state.active_requests.clear()


def test_what_has_not_started_is_put_back_the_oldest_first_in_line(redis):
    for tag in "abc":
        redis.receive(tag)
    redis.lose()
    redis.connect()
    assert redis.heard[3:] == [("back", "c"), ("back", "b"), ("back", "a")]
    assert not redis.channel._delivered


def test_what_others_may_have_put_back_is_left_to_them(redis, monkeypatch):
    redis.receive("a")
    redis.lose()
    later = module.time.time() + 3601
    monkeypatch.setattr(module.time, "time", lambda: later)
    redis.connect()
    assert redis.heard == [("taken", "a")]


def test_a_running_task_takes_its_message_along(redis):
    request = Request(redis.receive("a"))
    for _ in range(2):
        redis.lose()
        redis.connect()
    assert redis.channel._delivered == {"a": request.message}
    request.message.ack_log_error()
    assert redis.heard == [("taken", "a"), ("ack", "a")]


@pytest.mark.parametrize(("end", "heard"), [("ack", "end"), ("reject", "end"), ("requeue", "first")])
def test_an_end_that_comes_too_late_for_its_connection_is_told_over_the_next(redis, end, heard):
    message = redis.receive("a")
    redis.lose()
    message.ack_log_error() if end == "ack" else message.reject_log_error(requeue=end == "requeue")
    redis.connect()
    assert redis.heard[1:] == [(heard, "a")]


@pytest.mark.parametrize("error", [Gone, Refused])
def test_an_acknowledgement_that_is_not_taken_is_told_again_later(redis, monkeypatch, error):
    message = redis.receive("a")
    redis.channel.error = error("not now")
    message.ack_log_error()
    assert "a" in redis.channel._dirty  # makes room for the next
    redis.tick()
    now = module.time.monotonic() + 6.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    redis.tick()
    redis.channel.error = None
    redis.tick()
    assert redis.heard == [("taken", "a")]  # not at each turn
    now += 6.0
    redis.tick()
    redis.tick()
    assert redis.heard == [("taken", "a"), ("end", "a")]


def test_a_new_connection_that_is_gone_at_once_loses_nothing(redis):
    request, ended = Request(redis.receive("a")), redis.receive("b")
    redis.receive("c")
    redis.lose()
    ended.ack_log_error()
    start = redis.step.start

    def start_badly(c):
        redis.channel.error = Gone("again")
        start(c)

    redis.step.start = start_badly
    redis.connect()
    redis.step.start = start
    redis.lose()
    redis.connect()
    assert redis.heard[3:] == [("end", "b"), ("back", "c")]
    assert redis.channel._delivered == {"a": request.message}


def test_a_message_that_was_taken_but_not_noted_is_put_back(redis):
    redis.channel.error = Gone("in between")
    with pytest.raises(Gone):
        redis.receive("a")
    redis.lose()
    redis.connect()
    assert redis.heard == [("taken", "a"), ("back", "a")]
    assert redis.handled == []


def test_a_refusal_to_note_who_has_taken_a_message_is_no_reason_to_drop_it(redis):
    redis.channel.error = Refused("OOM")
    redis.receive("a")
    assert [message.delivery_tag for message in redis.handled] == ["a"]
    redis.channel.error = None
    redis.lose()
    redis.connect()
    assert redis.heard == [("taken", "a"), ("back", "a")]


def test_what_rabbitmq_delivers_again_belongs_to_the_running_task(rabbit):
    request = Request(rabbit.receive(1, "x"))
    rabbit.lose()
    rabbit.connect()
    rabbit.receive(7, "x", redelivered=True, **{"x-delivery-count": 1})
    assert len(rabbit.handled) == 1
    request.message.ack_log_error()
    assert rabbit.heard == [("ack", 7)]


def test_an_early_acknowledgement_that_rabbitmq_did_not_hear_is_told_again(rabbit):
    request = Request(rabbit.receive(1, "x"))
    rabbit.channel.error = Gone("now")
    request.message.ack_log_error()
    request.acknowledged = True
    rabbit.lose()
    rabbit.connect()
    rabbit.receive(1, "x", redelivered=True)
    assert len(rabbit.handled) == 1
    assert rabbit.heard == [("ack", 1)]


@pytest.mark.parametrize(
    ("end", "heard", "handled"), [("ack", [("ack", 3)], 1), ("reject", [("reject", 3)], 1), ("requeue", [], 2)]
)
def test_what_had_ended_before_rabbitmq_delivered_it_again(rabbit, end, heard, handled):
    request = Request(rabbit.receive(1, "x"))
    rabbit.lose()
    message = request.message
    message.ack_log_error() if end == "ack" else message.reject_log_error(requeue=end == "requeue")
    worker_state.active_requests.discard(request)
    rabbit.connect()
    rabbit.receive(3, "x", redelivered=True)
    assert (rabbit.heard, len(rabbit.handled)) == (heard, handled)
    rabbit.receive(4, "x", redelivered=True)  # somebody else's
    assert len(rabbit.handled) == handled + 1


@pytest.mark.parametrize("again", [{"redelivered": False}, {"redelivered": True, "retries": 1}])
def test_the_next_try_of_a_task_is_another_message(rabbit, again):
    Request(rabbit.receive(1, "x"))
    rabbit.receive(2, "x", **again)
    assert len(rabbit.handled) == 2


@pytest.mark.parametrize("kind", ["memory", "SQS"])
def test_other_transports_are_left_alone(kind):
    node = Node(kind)
    message = node.receive("a", redelivered=True)
    assert node.handled == [message]
    assert not hasattr(node.consumer.connection, "on_lost")
