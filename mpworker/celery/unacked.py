"""Messages outlive the connection that they came over.

    lost ─▶ what is not acknowledged is kept
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
from collections.abc import Callable
from itertools import count
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state

from mpworker.celery.loop import run_acks
from mpworker.results.record import describe

logger = logging.getLogger("mpworker.broker")

#: Seconds between two attempts to tell Redis what it did not take.
_RETRY_INTERVAL = 5.0
#: Transports that this knows; the driver types are kombu's.
_REDIS, _AMQP = "redis", "amqp"

#: How a message ends: acknowledged (None), or rejected, and then whether it goes back into its queue.
_End = bool | None


class Unacked(bootsteps.StartStopStep):  # type: ignore[misc]
    """A step of Celery's consumer."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._consumer = c
        self._line: _Line | None = None
        self._generations = count()
        #: messages of lost connections, by a line's key
        self._kept: dict[Any, Any] = {}
        #: what the broker has not been told, by the same keys
        self._owed: dict[Any, _End] = {}
        self._not_before = 0.0

    def start(self, c: Any) -> None:
        """Also after each reconnect. What is consumed comes later."""
        self._line = None
        if c.hub is not None and c.connection.transport.driver_type in (_REDIS, _AMQP):
            self._line = _Line(c.connection, next(self._generations), self._kept, self._owed)
            c.connection.on_lost = self._take

    def stop(self, c: Any) -> None:
        """What is left goes the way that Celery and kombu have for it."""

    def register_with_event_loop(self, c: Any, hub: Any) -> None:
        """Called when the consumer knows what to do with a message, and before the first can come."""
        if self._line is None:
            return
        run_acks(hub)  # of what has ended meanwhile: over the old line, which notes them
        c.task_consumer.on_message = _Filter(c.task_consumer.on_message, self._is_known)
        if self._line.qos is not None:
            hub.on_tick.add(self._settle_later)
            self._settle()

    def _take(self) -> None:
        """The connection is lost, and about to be closed; kombu would give back what it holds."""
        line = self._line
        if line is None or line.is_lost:
            return
        line.is_lost = True
        if line.qos is not None:
            line.keep_all()
            return
        # A queue of RabbitMQ's has them back already: it need not be told, but will deliver them again.
        self._kept.clear()
        for request in tuple(worker_state.active_requests):
            if request.message.channel is line.channel:
                self._kept[line.key(request.message.delivery_tag)] = request.message
        for key in [key for key in self._owed if key not in self._kept]:
            del self._owed[key]

    # -- Redis: messages are found by a tag that they keep for life ------------------------------------------------

    def _settle_later(self) -> None:
        """Called in each turn of the loop."""
        if (self._kept or self._owed) and time.monotonic() >= self._not_before:
            self._settle()

    def _settle(self) -> None:
        line = self._line
        if line is None or line.is_lost or not (self._kept or self._owed):
            return
        self._not_before = time.monotonic() + _RETRY_INTERVAL
        told = len(self._owed)
        try:
            for tag, end in list(self._owed.items()):
                line.tell(tag, end)
                del self._owed[tag]
                self._kept.pop(tag, None)
            moved, waiting = self._move(line), 0
            for tag, message in reversed(list(self._kept.items())):  # what is put back last is taken first
                waiting += line.give_back(tag, message)
                del self._kept[tag]
        except Exception as exc:
            logger.warning("what became of messages is told later, the broker does not listen: %s", describe(exc))
        else:
            logger.info(
                "messages of a lost connection: %d of tasks that run here, %d of tasks that have ended, %d put back",
                moved,
                told,
                waiting,
            )

    def _move(self, line: _Line) -> int:
        running = {id(request.message) for request in tuple(worker_state.active_requests)}
        moving = {tag: message for tag, message in self._kept.items() if id(message) in running}
        for tag, message in moving.items():
            line.adopt(tag, message)
            del self._kept[tag]
        c = self._consumer
        if moving and 0 < c.qos.value < c.max_prefetch_count:  # Celery has left room for them, and so does kombu
            c.qos.increment_eventually(min(len(moving), c.max_prefetch_count - c.qos.value))
        return len(moving)

    # -- what is delivered again -----------------------------------------------------------------------------------

    def _is_known(self, message: Any) -> bool:
        """Whether that is a message which has been here before, and has an owner; then it has been seen to."""
        line = self._line
        if line is None:
            return False
        request = worker_state.requests.get(message.headers.get("id"))
        if request is not None and request in worker_state.active_requests and line.is_same(request.message, message):
            logger.warning("task %s[%s] was delivered again while it runs here", request.name, request.id)
            if request.acknowledged:
                message.ack_log_error(logger, self._consumer.connection_errors)
            else:
                line.adopt(message.delivery_tag, request.message)
            return True
        for key in [key for key in self._kept.keys() & self._owed.keys() if line.is_same(self._kept[key], message)]:
            del self._kept[key]
            return self._end_again(self._owed.pop(key), message)
        return False

    def _end_again(self, end: _End, message: Any) -> bool:
        logger.info("task %s[%s] was delivered again and had ended here", *map(message.headers.get, ("task", "id")))
        if end is None:
            message.ack_log_error(logger, self._consumer.connection_errors)
        elif not end:
            message.reject_log_error(logger, self._consumer.connection_errors, requeue=False)
        return not end


class _Filter:
    """Celery's handler of messages, but for those that ``is_known`` has seen to."""

    def __init__(self, handler: Callable[[Any], Any], is_known: Callable[[Any], bool]) -> None:
        self._handler, self._is_known = handler, is_known

    def __call__(self, message: Any) -> Any:
        return None if self._is_known(message) else self._handler(message)


class _Line:
    """One connection of the consumer, and the channel that its messages come over.

    Args:
        connection: kombu's.
        generation: tells its messages from those of others, whose tags may be the same with AMQP.
        kept: where its messages go, by :meth:`key`, when it is lost.
        owed: where the ends of messages go that it cannot tell the broker.
    """

    def __init__(self, connection: Any, generation: int, kept: dict[Any, Any], owed: dict[Any, _End]) -> None:
        self.channel = channel = connection.default_channel
        self.qos = channel.qos if connection.transport.driver_type == _REDIS else None
        self.is_lost = False
        self._generation, self._kept, self._owed = generation, kept, owed
        self._refusals = connection.channel_errors if self.qos is not None else ()
        self._errors = connection.connection_errors + self._refusals
        self._ack, self._reject = channel.basic_ack, channel.basic_reject
        channel.basic_ack, channel.basic_reject = self.ack, self.reject
        if self.qos is not None:
            self._append = self.qos.append
            self.qos.append = self.append

    def key(self, tag: Any) -> Any:
        return tag if self.qos is not None else (self._generation, tag)

    def is_same(self, message: Any, again: Any) -> bool:
        """Whether two deliveries are of one message. A task that is tried again is another message."""
        if message is again:
            return False
        if self.qos is not None:
            return bool(message.delivery_tag == again.delivery_tag)
        return bool(again.delivery_info.get("redelivered") and _essence(message) == _essence(again))

    def ack(self, tag: Any, multiple: bool = False) -> None:
        """Instead of the channel's ``basic_ack``."""
        self._end(tag, None, lambda: self._ack(tag, multiple=multiple))

    def reject(self, tag: Any, requeue: bool = False) -> None:
        """Instead of the channel's ``basic_reject``."""
        self._end(tag, requeue, lambda: self._reject(tag, requeue=requeue))

    def _end(self, tag: Any, end: _End, tell: Callable[[], None]) -> None:
        if not self.is_lost:
            try:
                tell()
                return
            except self._errors as exc:
                logger.warning("the broker does not take an acknowledgement, and is told later: %s", describe(exc))
                if self.qos is not None:
                    self.qos._quick_ack(tag)
        self._owed[self.key(tag)] = end

    def adopt(self, tag: Any, message: Any) -> None:
        """From here on this message is one of this line's."""
        message.channel, message.delivery_tag = self.channel, tag
        if self.qos is not None:
            self.qos._quick_append(tag, message)

    # -- Redis -----------------------------------------------------------------------------------------------------

    def append(self, message: Any, tag: str) -> None:
        """Instead of the channel's ``qos.append``."""
        message.delivered_at = time.time()
        try:
            self._append(message, tag)
        except BaseException as exc:  # it is in no queue any more, and not among those either whose end is awaited
            message.delivered_at = 0.0
            if not isinstance(exc, self._refusals):
                self._kept[tag] = message
                raise
            logger.warning("Redis does not note that this node has a message, and could lose it: %s", describe(exc))
            self.adopt(tag, message)
        if self.is_lost:  # kombu reads what has come already
            self.keep_all()

    def keep_all(self) -> None:
        """Keeps what is not acknowledged. From here on kombu does not know of it."""
        assert self.qos is not None
        self.qos._flush()
        self._kept.update(self.qos._delivered)
        self.qos._delivered.clear()

    def tell(self, tag: str, end: _End) -> None:
        """Tells the end of a message of an earlier line."""
        assert self.qos is not None
        if end:
            self.qos.restore_by_tag(tag, leftmost=True)
        else:
            self.qos._remove_from_indices(tag).execute()

    def give_back(self, tag: str, message: Any) -> bool:
        """Puts a message back into its queue, unless it has been away for so long that others may have done so."""
        assert self.qos is not None
        if not message.delivered_at:  # Redis has not been told, or has not answered, that it was taken
            self._append(message, tag)
            del self.qos._delivered[tag]
        elif time.time() - message.delivered_at >= self.qos.visibility_timeout:
            return False
        self.qos.restore_by_tag(tag)
        return True


def _essence(message: Any) -> tuple[Any, ...]:
    headers = {name: value for name, value in message.headers.items() if not name.startswith("x-")}  # RabbitMQ's own
    return headers, message.body, message.properties.get("correlation_id")
