"""Unacknowledged messages with Redis as the broker.

kombu pops a message from its list and notes in a hash that it was taken, by a tag that the message keeps for life. So
any connection can tell its end, and put it back; after the visibility timeout so can any node.

Owns what this node has taken and Redis has not been told the end of. Never reads a queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from celery.worker import state as worker_state

from mpworker.celery.unacked import Book, End, Line
from mpworker.results.record import describe

logger = logging.getLogger("mpworker.broker")

#: Seconds between two attempts to tell Redis what it did not take.
_RETRY_INTERVAL = 5.0
#: Seconds that Redis may take at the end of a node whose connection is lost.
_LAST_PATIENCE = 3.0
#: Seconds after a reconnect in which Redis may have forgotten what it last did (``appendfsync everysec``, a replica).
_FORGETFUL = 60.0


class RedisBook(Book):
    """kombu has what was taken in a hash, by tags that messages keep for life: any connection can tell their ends."""

    def __init__(self, consumer: Any) -> None:
        super().__init__(consumer)
        self._refusals: tuple[type[BaseException], ...] = ()
        #: messages of lost connections
        self._kept: dict[str, Any] = {}
        self._owed: dict[str, End] = {}
        #: messages that are in no queue any more, and of which Redis has not noted that they were taken
        self._unnoted: dict[str, Any] = {}
        self._append: Any = None  # kombu's, of the open connection
        self._not_before = self._forgetful_until = 0.0

    def open(self, connection: Any) -> None:
        if self._line is not None:
            self._forgetful_until = time.monotonic() + _FORGETFUL
        super().open(connection)
        self._refusals = connection.channel_errors
        self._errors = self._errors + self._refusals
        line, qos = self._line, connection.default_channel.qos
        self._append = append = qos.append

        def note(message: Any, tag: str) -> None:
            """Instead of kombu's: the message has just been popped, and is to be noted."""
            message.earlier = qos._delivered.get(tag) if tag not in qos._dirty else None
            message.delivered_at = time.time()
            try:
                append(message, tag)
            except BaseException as exc:
                self._unnoted[tag] = message
                if not isinstance(exc, self._refusals):
                    self._kept[tag] = message
                    raise
                logger.warning("Redis does not note that this node has a message, and could lose it: %s", describe(exc))
                qos._quick_append(tag, message)
            if line is not None and line.is_lost:  # kombu reads what has come already
                self._keep(qos)

        qos.append = note

    def close(self) -> None:
        super().close()
        if self._line is not None:
            self._keep(self._line.qos)

    def _keep(self, qos: Any) -> None:
        """From here on kombu does not know what is not acknowledged."""
        qos._flush()
        self._kept.update(qos._delivered)
        qos._delivered.clear()

    def tell(self, line: Line, tag: Any, end: End) -> None:
        if end and tag in self._unnoted:
            self._note(tag)  # or there would be nothing to put back
        super().tell(line, tag, end)
        self._unnoted.pop(tag, None)

    def owe(self, line: Line, tag: Any, end: End) -> None:
        if not line.is_lost:
            line.qos._quick_ack(tag)  # there is room for another
        self._owed[tag] = end

    def finish(self) -> None:
        if not (self._kept or self._owed or self._unnoted):
            return
        if self._line is None or self._line.is_lost:
            try:
                self._finish_elsewhere()
            except Exception as exc:
                logger.debug("no last connection to the broker: %s", describe(exc))
        else:
            self.settle()
        if left := len(self._kept.keys() | self._owed.keys() | self._unnoted.keys()):
            logger.warning("Redis could not be told of %d messages: it delivers them again, after a while", left)

    def _finish_elsewhere(self) -> None:
        patience = {"socket_timeout": _LAST_PATIENCE, "socket_connect_timeout": _LAST_PATIENCE}
        with self._consumer.app.connection_for_write(transport_options=patience) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.0, timeout=_LAST_PATIENCE)
            self.open(connection)
            self.settle()

    def settle_later(self) -> None:
        if (self._kept or self._owed or self._unnoted) and time.monotonic() >= self._not_before:
            self.settle()

    def settle(self) -> None:
        if self._line is None or self._line.is_lost or not (self._kept or self._owed or self._unnoted):
            return
        self._not_before = time.monotonic() + _RETRY_INTERVAL
        moved, told, waiting = self._move(), 0, 0
        try:
            for tag in list(self._owed):
                told += self._unless_refused(self._pay, tag)
            # What is put back last is taken first.
            for tag in reversed([tag for tag in self._kept if tag not in self._owed]):
                waiting += self._unless_refused(self._give_back, tag)
            for tag in [tag for tag in self._unnoted if tag not in self._owed]:
                self._unless_refused(self._note, tag)
        except Exception as exc:
            logger.warning("what became of messages is told later, Redis does not listen: %s", describe(exc))
        if moved or told or waiting:
            logger.info(
                "messages of a lost connection: %d of tasks that run here, %d of tasks that have ended, %d put back",
                moved,
                told,
                waiting,
            )

    def _unless_refused(self, action: Callable[[str], bool], tag: str) -> bool:
        try:
            return action(tag)
        except self._refusals as exc:
            logger.warning("Redis does not take what became of a message, and is told later: %s", describe(exc))
            return False

    def _move(self) -> int:
        running = {id(request.message) for request in tuple(worker_state.active_requests)}
        moving = [tag for tag, message in self._kept.items() if id(message) in running and tag not in self._owed]
        for tag in moving:
            self._adopt(tag, self._kept.pop(tag))
        c = self._consumer
        if moving and 0 < c.qos.value < c.max_prefetch_count:  # Celery has left room for them, and so does kombu
            c.qos.increment_eventually(min(len(moving), c.max_prefetch_count - c.qos.value))
        return len(moving)

    def _adopt(self, tag: Any, message: Any) -> None:
        super()._adopt(tag, message)
        assert self._line is not None
        self._line.qos._quick_append(tag, message)

    def _pay(self, tag: str) -> bool:
        """Tells an end."""
        assert self._line is not None
        if end := self._owed[tag]:
            self._put_back(tag, self._unnoted.get(tag) or self._kept.get(tag), self._owed, end, leftmost=True)
        else:
            self._line.qos._remove_from_indices(tag).execute()
            del self._owed[tag]
        self._kept.pop(tag, None)
        self._unnoted.pop(tag, None)
        return True

    def _give_back(self, tag: str) -> bool:
        """Puts a message back, unless it has been away for so long that others may have done so."""
        assert self._line is not None
        message = self._kept[tag]
        if tag not in self._unnoted and time.time() - message.delivered_at >= self._line.qos.visibility_timeout:
            del self._kept[tag]
            return False
        self._put_back(tag, message, self._kept, message)
        return True

    def _put_back(self, tag: str, message: Any, book: dict[str, Any], entry: Any, **options: Any) -> None:
        assert self._line is not None
        qos = self._line.qos
        if message is not None and (tag in self._unnoted or not self._is_noted(tag)):  # Redis may have lost it
            self._unnoted[tag] = message
            self._note(tag)
        # Asked once. If its answer is lost the message may be somebody's by now; else it is visible again in the end.
        del book[tag]
        try:
            qos.restore_by_tag(tag, **options)
        except self._refusals:
            book[tag] = entry
            raise

    def _is_noted(self, tag: str) -> bool:
        assert self._line is not None
        with self._line.channel.conn_or_acquire() as client:
            return client.hget(self._line.qos.unacked_key, tag) is not None

    def _note(self, tag: str) -> bool:
        """What kombu does with a message that it has taken."""
        assert self._line is not None
        delivered = self._line.qos._delivered
        is_ours = tag in delivered and tag not in self._line.qos._dirty
        self._append(self._unnoted[tag], tag)
        if not is_ours:
            delivered.pop(tag, None)
        del self._unnoted[tag]
        return True

    def has_seen_to(self, message: Any) -> bool:
        if message.earlier is not None:  # it runs here, or waits: its time was over, or Redis has forgotten something
            self._say_again(message)
            self._adopt(message.delivery_tag, message.earlier)
            return True
        if not message.delivery_info.get("redelivered") and time.monotonic() >= self._forgetful_until:
            return False
        for request in tuple(worker_state.active_requests):
            if request.message.delivery_tag == message.delivery_tag and request.message is not message:
                self._say_again(message)  # it was acknowledged when it began
                message.ack_log_error(logger, self._consumer.connection_errors)
                return True
        return False
