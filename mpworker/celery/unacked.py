"""Messages outlive the connection that they came over.

    lost ─▶ what is not acknowledged is remembered
    connected again ─▶ runs here: its message moves to the new connection, and is acknowledged there in the end
                    ─▶ its end could not be told: it is told now
                    ─▶ has not started: back to where it was (Redis; RabbitMQ does so itself)
    delivered again while it runs here ─▶ not run twice: the running task takes over the new delivery

Without this all of them are the broker's again: with RabbitMQ, and with a Redis that is still there, somebody runs at
once what still runs here; with a Redis that was away nobody gets what was prefetched before the visibility timeout is
over, what had ended then runs again, and a late acknowledgement over the old connection ends the whole node.

Owns which messages of the consumer are not acknowledged. Never takes a message, never decides whether a task runs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state

from mpworker.celery.loop import run_acks
from mpworker.results.record import describe

logger = logging.getLogger("mpworker.broker")

#: So many ends are remembered for RabbitMQ, of those told before a loss only what is this young (seconds): who writes
#: to a connection that is gone hears of that late.
_ENDS, _DOUBTFUL = 10_000, 300.0

#: How a message ends: acknowledged (None), or rejected, and then whether it goes back into its queue.
End = bool | None


class Unacked(bootsteps.StartStopStep):  # type: ignore[misc]
    """A step of Celery's consumer."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._book: Book | None = None

    def start(self, c: Any) -> None:
        """Also after each reconnect. What is consumed comes later."""
        if c.hub is None or not hasattr(c.pool, "each_turn"):  # the app's next worker may have another pool
            return
        if self._book is None:
            self._book = _book_for(c)
        if self._book is not None:
            self._book.open(c.connection)
            c.connection.on_lost = self._book.close

    def stop(self, c: Any) -> None:
        """Tasks still run, and their messages are acknowledged."""

    def shutdown(self, c: Any) -> None:
        """Nothing runs any more; the connection, if there is one, is closed next."""
        if self._book is not None:
            self._book.finish()

    def register_with_event_loop(self, c: Any, hub: Any) -> None:
        """Called when the consumer knows what to do with a message, and before the first can come."""
        if self._book is None:
            return
        run_acks(hub)  # of what has ended meanwhile: over the old connection, which has them noted
        c.task_consumer.on_message = _Filter(c.task_consumer.on_message, self._book)
        c.pool.each_turn(self._book.settle_later)
        self._book.settle()


def _book_for(c: Any) -> Book | None:
    kind = c.connection.transport.driver_type
    if kind == "amqp":
        return _RabbitBook(c)
    if kind == "redis":
        from kombu.transport.redis import QoS  # loaded already: this is a connection of its kind

        from mpworker.celery.unacked_redis import RedisBook

        if isinstance(c.connection.default_channel.qos, QoS):  # not with the option "ack_emulation" off
            return RedisBook(c)
    return None


class _Filter:
    """Celery's handler of messages, but for those that the book has seen to."""

    def __init__(self, handler: Callable[[Any], Any], book: Book) -> None:
        self._handler, self._book = handler, book

    def __call__(self, message: Any) -> Any:
        return None if self._book.has_seen_to(message) else self._handler(message)


class Line:
    """The channel that messages come over, as long as one of its messages is not acknowledged.

    Args:
        channel: kombu's. What it would tell the broker of a message's end goes through the book.
    """

    def __init__(self, channel: Any, book: Book) -> None:
        self.channel: Any = channel
        self.qos: Any = getattr(channel, "qos", None)
        #: of RabbitMQ's messages, by tag
        self.prints: dict[int, Any] = {}
        self.is_lost = False
        self._ack, self._reject, self._book = channel.basic_ack, channel.basic_reject, book
        channel.basic_ack, channel.basic_reject = self.ack, self.reject

    def ack(self, tag: Any, multiple: bool = False) -> None:
        if multiple:  # nobody does in Celery
            self._ack(tag, multiple=True)
        else:
            self._book.end(self, tag, None)

    def reject(self, tag: Any, requeue: bool = False) -> None:
        self._book.end(self, tag, requeue)

    def tell(self, tag: Any, end: End) -> None:
        """Raises what kombu raises."""
        if end is None:
            self._ack(tag)
        else:
            self._reject(tag, requeue=end)


class Book:
    """What is known of messages, whatever connection they came over.

    Args:
        consumer: Celery's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._line: Line | None = None
        self._errors: tuple[type[BaseException], ...] = ()

    def open(self, connection: Any) -> None:
        """There is a new connection."""
        self._errors = connection.connection_errors
        self._line = Line(connection.default_channel, self)

    def close(self) -> None:
        """It is lost, and what it holds is given up next."""
        if self._line is not None:
            self._line.is_lost = True

    def finish(self) -> None:
        """This node ends."""

    def end(self, line: Line, tag: Any, end: End) -> None:
        """A task is done with its message."""
        if not line.is_lost:
            try:
                self.tell(line, tag, end)
                return
            except self._errors as exc:
                logger.warning("the broker does not take an acknowledgement, and is told later: %s", describe(exc))
        self.owe(line, tag, end)

    def tell(self, line: Line, tag: Any, end: End) -> None:
        line.tell(tag, end)

    def owe(self, line: Line, tag: Any, end: End) -> None:
        """The broker is to be told when it listens again."""
        raise NotImplementedError

    def settle_later(self) -> None:
        """Called in each turn of the loop."""

    def settle(self) -> None:
        """Called when the new connection can be used."""

    def has_seen_to(self, message: Any) -> bool:
        """Whether a message that has just come has been here before, and has an owner."""
        raise NotImplementedError

    def _say_again(self, message: Any) -> None:
        name, task_id = message.headers.get("task"), message.headers.get("id")
        logger.warning("task %s[%s] was delivered again to the node that has it", name, task_id)

    def _adopt(self, tag: Any, message: Any) -> None:
        """From here on this message has come over the new connection, with this tag."""
        assert self._line is not None
        message.channel, message.delivery_tag = self._line.channel, tag


class _RabbitBook(Book):
    """RabbitMQ gives back itself what was not acknowledged, to anybody. What comes here is told by what it says."""

    def __init__(self, consumer: Any) -> None:
        super().__init__(consumer)
        self._told: deque[tuple[float, Any, End]] = deque(maxlen=_ENDS)
        self._untold: dict[Any, End] = {}

    def close(self) -> None:
        super().close()
        since = time.monotonic() - _DOUBTFUL
        # One that was sent once more, and has not ended, is another message.
        here = set(self._line.prints.values()) if self._line is not None else set()
        self._untold.update((print_, end) for when, print_, end in self._told if when > since and print_ not in here)
        self._told.clear()
        for fingerprint in list(self._untold)[:-_ENDS]:
            del self._untold[fingerprint]

    def tell(self, line: Line, tag: Any, end: End) -> None:
        super().tell(line, tag, end)
        if (fingerprint := line.prints.pop(tag, None)) is not None:
            self._told.append((time.monotonic(), fingerprint, end))

    def owe(self, line: Line, tag: Any, end: End) -> None:
        if (fingerprint := line.prints.pop(tag, None)) is not None:
            self._untold[fingerprint] = end

    def has_seen_to(self, message: Any) -> bool:
        fingerprint = _fingerprint(message)
        if fingerprint is None or self._line is None:
            return False
        self._line.prints[message.delivery_tag] = fingerprint
        if not message.delivery_info.get("redelivered"):
            self._untold.pop(fingerprint, None)  # somebody has sent it once more
            return False
        for request in tuple(worker_state.active_requests):
            if request.id == fingerprint[0] and _fingerprint(request.message) == fingerprint:
                self._say_again(message)
                if request.acknowledged:
                    message.ack_log_error(logger, self._consumer.connection_errors)
                else:
                    self._adopt(message.delivery_tag, request.message)
                return True
        if fingerprint not in self._untold or (end := self._untold.pop(fingerprint)):
            return False
        logger.info("task %s[%s] was delivered again and had ended here", message.headers.get("task"), fingerprint[0])
        if end is None:
            message.ack_log_error(logger, self._consumer.connection_errors)
        else:
            message.reject_log_error(logger, self._consumer.connection_errors, requeue=False)
        return True


def _fingerprint(message: Any) -> tuple[Any, ...] | None:
    """What two deliveries of one message have in common, and two tries of one task have not."""
    task_id = message.headers.get("id")
    body = message.body if isinstance(message.body, str | bytes) else bytes(message.body)
    return (task_id, message.headers.get("retries"), len(body), hash(body)) if task_id else None
