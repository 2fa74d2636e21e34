"""A broker that goes away: the node's connection to it can be closed, whatever state it is in."""

import contextlib
import socket
from types import SimpleNamespace

from celery import Celery
from kombu import Consumer, Exchange, Producer, Queue
from kombu.common import ignore_errors

from mpworker.celery.connection import Outage, make_closable


def test_what_has_started_is_heard_before_celery_looks_at_what_runs(redis_server):
    """That is, before it cancels what runs, or reduces what it fetches by that."""
    app = Celery("node", broker=redis_server.url, set_as_current=False)
    told = []
    outage = Outage(SimpleNamespace(app=app), lambda: told.append("listened"))
    outage.connect()
    connection = app.connection_for_read()
    connection.default_channel  # noqa: B018 - connects
    connection.collect()
    assert told == []  # one that is nobody's
    connection.on_lost = lambda: told.append("lost")
    connection.collect()
    assert told == ["lost", "listened"]
    outage.disconnect()
    connection.collect()
    assert told == ["lost", "listened", "lost"]
    app.close()


def test_a_lost_connection_with_unacknowledged_messages_closes(redis_server):
    app = Celery("node", broker=redis_server.url, set_as_current=False)
    make_closable(app)
    make_closable(app)  # of two nodes in one process
    assert len(app.amqp.Connection.__mro__) == 4
    connection = app.connection_for_read()
    channel, got = connection.default_channel, []
    other = connection.channel()  # the last is closed first: to it the loss shows, and the other is left as it is
    replies = Queue("replies", Exchange("replies", type="fanout"), auto_delete=True, channel=other)
    Consumer(other, [replies]).consume()
    other.client  # noqa: B018 - connects
    Consumer(channel, [Queue("q")], callbacks=[lambda _, message: got.append(message)]).consume()
    Producer(channel).publish("hello", routing_key="q")
    while not got:
        connection.drain_events(timeout=20)
    with contextlib.suppress(socket.timeout):
        connection.drain_events(timeout=0.05)  # leaves a question to the server without an answer
    redis_server.kill()
    with contextlib.suppress(Exception):  # as Celery does
        connection.collect(socket_timeout=1)
    ignore_errors(connection, connection.close)
    app.close()
