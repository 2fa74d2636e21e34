"""The bookkeeping of messages whose connection is lost, without a broker."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
from celery.worker import state as worker_state
from kombu.transport.redis import QoS

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


class Channel(QoS):
    """Of a broker that has heard ``heard``; it is also the QoS of its kind in Redis."""

    visibility_timeout = 3600
    unacked_key = "unacked"

    def __init__(self, node):
        self.node, self.error = node, None
        self._delivered, self._dirty = {}, set()
        self._quick_append, self._quick_ack = self._delivered.__setitem__, self._dirty.add
        if node.kind == "redis":
            self.qos = self

    def _hear(self, *what):
        if self.error:
            raise self.error
        if self.node.refused == what:
            raise Refused("OOM")
        self.node.heard.append(what)

    def basic_ack(self, tag, multiple=False):
        self._hear("ack", tag)
        self._dirty.add(tag)

    def basic_reject(self, tag, requeue):
        self._hear("requeue" if requeue else "reject", tag)
        self._dirty.add(tag)

    def append(self, message, tag):
        self._hear("taken", tag)
        self.node.noted.add(tag)
        self._delivered[tag] = message

    @contextlib.contextmanager
    def conn_or_acquire(self):
        if self.error:
            raise self.error
        yield SimpleNamespace(hget=lambda _, tag: tag if tag in self.node.noted else None)

    def _flush(self):
        for tag in self._dirty:
            self._delivered.pop(tag, None)
        self._dirty.clear()

    def restore_by_tag(self, tag, leftmost=False):
        self._hear("first" if leftmost else "back", tag)
        assert tag in self.node.noted, "it would vanish"
        self.node.noted.discard(tag)

    def _remove_from_indices(self, tag):
        return SimpleNamespace(execute=lambda: self._hear("end", tag))


class Node:
    """A consumer with this step, and its connections."""

    def __init__(self, kind):
        self.kind, self.heard, self.handled, self.noted, self.refused = kind, [], [], set(), ()
        self.hub = SimpleNamespace(on_tick=set(), _pop_ready=list)
        self.consumer = SimpleNamespace(hub=self.hub, connection_errors=(Gone,), max_prefetch_count=0)
        self.consumer.qos = SimpleNamespace(value=0)
        self.consumer.pool = SimpleNamespace(each_turn=self.hub.on_tick.add)
        self.step = Unacked(self.consumer)
        self.connect()

    def connect(self, error=None):
        self.channel = Channel(self)
        self.channel.error = error
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


def test_what_redis_refuses_holds_up_nothing_else(redis, monkeypatch):
    request, ended, again = (Request(redis.receive(tag)) for tag in "abc")
    redis.receive("d")
    redis.lose()
    for each, requeue in ((ended, None), (again, True)):
        each.message.ack_log_error() if requeue is None else each.message.reject_log_error(requeue=True)
        worker_state.active_requests.discard(each)
    redis.refused = ("first", "c")
    redis.connect()
    assert redis.heard[4:] == [("end", "b"), ("back", "d")]
    assert redis.channel._delivered == {"a": request.message}
    redis.refused = ()
    now = module.time.monotonic() + 6.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    redis.tick()
    assert redis.heard[6:] == [("first", "c")]


def test_a_new_connection_that_is_gone_at_once_loses_nothing(redis):
    request, ended = Request(redis.receive("a")), redis.receive("b")
    redis.receive("c")
    redis.lose()
    ended.ack_log_error()
    redis.connect(Gone("again"))
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


def test_what_redis_has_forgotten_is_put_back_from_memory(redis):
    redis.receive("a")
    redis.lose()
    redis.noted.clear()
    redis.connect()
    assert redis.heard == [("taken", "a")] * 2 + [("back", "a")]


def test_a_message_that_redis_does_not_note_is_handled_and_noted_later(redis, monkeypatch):
    redis.refused = ("taken", "a")
    message = redis.receive("a")
    assert redis.handled == [message]
    redis.refused = ()
    redis.tick()
    assert redis.heard == [("taken", "a")]
    assert redis.channel._delivered == {"a": message}
    message.ack_log_error()
    redis.tick()
    assert redis.heard == [("taken", "a"), ("ack", "a")]


def test_a_message_that_was_not_noted_can_be_given_back(redis):
    redis.refused = ("taken", "a")
    message = redis.receive("a")
    redis.refused = ()
    message.reject_log_error(requeue=True)
    assert redis.heard == [("taken", "a"), ("requeue", "a")]


def test_a_message_that_was_not_noted_outlives_a_loss(redis):
    redis.refused = ("taken", "a")
    redis.receive("a")
    redis.refused = ()
    redis.lose()
    redis.connect()
    assert redis.heard == [("taken", "a"), ("back", "a")]


def test_the_end_of_a_node_tells_what_is_left(redis):
    redis.refused = ("ack", "a")
    redis.receive("a").ack_log_error()
    redis.step.shutdown(redis.consumer)
    assert redis.heard == [("taken", "a"), ("end", "a")]


def test_the_end_of_a_node_without_a_connection(redis, caplog):
    message = redis.receive("a")
    redis.lose()
    message.ack_log_error()
    redis.consumer.app = SimpleNamespace(connection_for_write=lambda **_: 1 / 0)
    redis.step.shutdown(redis.consumer)
    assert "Redis could not be told of 1 messages" in caplog.text


def test_redis_itself_delivers_a_message_again(redis):
    """Its time was over, or it has forgotten that it was taken."""
    request = Request(redis.receive("a"))
    redis.receive("a")
    assert redis.handled == [request.message]
    assert redis.channel._delivered == {"a": request.message}
    request.acknowledged = True
    redis.channel._delivered.clear()
    redis.receive("a", redelivered=True)
    assert redis.heard == [("taken", "a")] * 3 + [("ack", "a")]


def test_redis_delivers_again_what_still_waits_here(redis):
    """A countdown longer than the visibility timeout, say."""
    waiting = redis.receive("a")
    redis.receive("a", redelivered=True)
    assert redis.handled == [waiting]
    waiting.ack_log_error()
    redis.receive("a", redelivered=True)  # sent once more by somebody
    assert len(redis.handled) == 2


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


ENDS = pytest.mark.parametrize(
    ("end", "heard", "handled"), [("ack", [("ack", 3)], 1), ("reject", [("reject", 3)], 1), ("requeue", [], 2)]
)


def finish(message, end):
    message.ack_log_error() if end == "ack" else message.reject_log_error(requeue=end == "requeue")


@ENDS
@pytest.mark.parametrize("when", ["before", "dying", "lost", "between", "later"])
def test_what_had_ended_before_rabbitmq_delivered_it_again(rabbit, end, heard, handled, when):
    request = Request(rabbit.receive(1, "x"))
    if when == "dying":
        rabbit.channel.error = Gone("now")
    if when in ("before", "dying"):  # its connection is: a first write to it still succeeds
        finish(request.message, end)
    rabbit.lose()
    if when in ("between", "later"):
        rabbit.connect()
        if when == "between":
            finish(request.message, end)
        rabbit.lose()
    if when in ("lost", "later"):
        finish(request.message, end)
    worker_state.active_requests.discard(request)
    rabbit.connect()
    rabbit.heard.clear()
    rabbit.receive(3, "x", redelivered=True)
    assert (rabbit.heard, len(rabbit.handled)) == (heard, handled)
    rabbit.receive(4, "x", redelivered=True)  # somebody else's
    assert len(rabbit.handled) == handled + 1


@pytest.mark.parametrize("lost", ["before it comes", "while it waits"])
def test_what_is_sent_once_more_is_another_message(rabbit, lost):
    """With the same id, as ``mpworker requeue`` does."""
    request = Request(rabbit.receive(1, "x"))
    finish(request.message, "ack")
    worker_state.active_requests.discard(request)
    if lost == "before it comes":
        rabbit.lose()
        rabbit.connect()
    rabbit.receive(2, "x")
    rabbit.lose()
    rabbit.connect()
    rabbit.receive(1, "x", redelivered=True)
    assert len(rabbit.handled) == 3


def test_another_pool_has_no_use_for_it():
    node = Node("redis")
    node.consumer.pool = SimpleNamespace()
    node.step = Unacked(node.consumer)
    node.connect()
    assert "ack" not in vars(node.channel)
    assert not hasattr(node.consumer.connection, "on_lost")


def test_what_ended_long_before_a_loss_is_another_message(rabbit, monkeypatch):
    request = Request(rabbit.receive(1, "x"))
    finish(request.message, "ack")
    worker_state.active_requests.discard(request)
    now = module.time.monotonic() + 301.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    rabbit.lose()
    rabbit.connect()
    rabbit.receive(3, "x", redelivered=True)
    assert len(rabbit.handled) == 2


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
