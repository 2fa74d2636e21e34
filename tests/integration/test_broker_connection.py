"""A broker that goes away: the node's connection to it can be closed, whatever state it is in."""

import contextlib
import socket

import pytest
from celery import Celery
from kombu import Consumer, Exchange, Producer, Queue
from kombu.common import ignore_errors
from support import RedisServer

from mpworker.celery.connection import make_closable


@pytest.fixture
def server():
    server = RedisServer()
    server.start()
    try:
        yield server
    finally:
        server.end()


def test_a_lost_connection_with_unacknowledged_messages_closes(server):
    app = Celery("node", broker=server.url, set_as_current=False)
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
    server.kill()
    with contextlib.suppress(Exception):  # as Celery does
        connection.collect(socket_timeout=1)
    ignore_errors(connection, connection.close)
    app.close()
