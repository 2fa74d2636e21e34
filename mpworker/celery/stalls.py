"""The stall detector: messages wait, slots are free, and nothing is delivered.

    look ─▶ may this node take a message? ─▶ was one delivered since? ─▶ does one wait? ─▶ for how long now?
                    no: begin anew            yes: begin anew          no: begin anew       first strike, second strike

Owns the watch over one consumer: a thread with a connection of its own. At the first strike it restarts the consumer,
by an error that Celery takes for a lost connection; at the second one, without a delivery in between, it ends the node.
Never takes a message, never restarts a consumer while a task runs whose message the broker would deliver again.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum, auto
from typing import Any

from celery import bootsteps, signals
from celery.worker import state as worker_state

from mpworker.celery.app import settings_of
from mpworker.results.record import describe

logger = logging.getLogger("mpworker.broker")

#: Exit code of a node that is deaf to its broker (sysexits.h: EX_TEMPFAIL, "try again").
EX_STALLED = 75
#: The detector looks so many times in one timeout, but no more seldom than this (seconds).
_LOOKS, _SELDOM = 4, 15.0
#: Seconds that the broker may take to tell how many messages wait.
_PATIENCE = 5.0
#: Seconds that a loop which is not stuck may take to notice something: without a hub it looks every 2 s.
_REACTION = 3.0
#: Seconds between the end of the pool and that of the process.
_TO_LEAVE = 10.0
#: Transports whose count of waiting messages is what a consumer would get: SQS, say, counts those of blocked groups.
_COUNTABLE = {"redis", "amqp", "filesystem"}


class Verdict(Enum):
    """What a look has found."""

    FINE = auto()
    RESTART = auto()
    GIVE_UP = auto()


class Watch:
    """The brain: pure, without a clock.

    Args:
        timeout: seconds.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._since: float | None = None
        self._last = float("-inf")
        self._delivered = -1
        self._strikes = 0

    def look(self, now: float, *, ready: bool, delivered: int, waits: Callable[[], bool]) -> Verdict:
        """One look.

        Args:
            now: seconds of a monotonic clock.
            ready: the node could take a message.
            delivered: how many messages it has been given so far.
            waits: asks the broker whether messages wait; called only where that matters.
        """
        suspended = now - self._last > self._timeout  # who was not here cannot say what has happened meanwhile
        self._last = now
        if delivered != self._delivered:  # fewer: a lost connection has taken some back
            self._strikes = 0 if delivered > self._delivered else self._strikes
            self._delivered, ready = delivered, False
        if not ready or not waits():
            self._since = None
        elif self._since is None or suspended:
            self._since = now
        elif now - self._since >= self._timeout:
            self._since, self._strikes = None, self._strikes + 1
            return Verdict.RESTART if self._strikes == 1 else Verdict.GIVE_UP
        return Verdict.FINE


class StallError(ConnectionResetError):
    """What Celery is told: its connection is lost."""


class StallDetector(bootsteps.StartStopStep):  # type: ignore[misc]
    """Watches one consumer. ``inspect stats`` shows what it has seen under ``mpworker``."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._timeout = settings_of(c.app).stall_timeout
        self.enabled = self._timeout > 0
        self._discarded = self._looks = self._stalls = self._starts = 0
        self._connection: Any = None
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._may_exit = False

    def info(self, c: Any) -> dict[str, Any]:
        return {"mpworker": {"stall-timeout": self._timeout, "stall-looks": self._looks, "stalls": self._stalls}}

    # -- called by Celery, in the consumer's thread ----------------------------------------------------------------

    def start(self, c: Any) -> None:
        """Also after each reconnect."""
        self._starts += 1
        # Of a worker inside somebody's program only the consumer may be ended.
        self._may_exit = threading.current_thread() is threading.main_thread()
        if self._thread is None and c.connection.transport.driver_type in _COUNTABLE:
            for signal in (signals.task_unknown, signals.task_rejected, signals.task_revoked):
                signal.connect(self._on_discarded, weak=True)
            self._thread = threading.Thread(target=self._watch, args=(c,), name="mpworker-stalls", daemon=True)
            self._thread.start()

    def stop(self, c: Any) -> None:
        if c.blueprint.state != bootsteps.RUN:
            self._ending.set()

    def _on_discarded(self, **_: Any) -> None:
        self._discarded += 1

    def _delivered(self, c: Any) -> int:
        """A number that each delivery raises: a message goes to the pool, waits for its time, or is discarded."""
        return int(c.pool.taken) + held_back(c) + self._discarded

    # -- the thread ------------------------------------------------------------------------------------------------

    def _watch(self, c: Any) -> None:
        watch = Watch(self._timeout)
        while not self._ending.wait(min(self._timeout / _LOOKS, _SELDOM)):
            verdict = watch.look(
                time.monotonic(), ready=may_take(c), delivered=self._delivered(c), waits=lambda: self._messages_wait(c)
            )
            self._looks += 1
            if verdict is Verdict.FINE:
                continue
            self._stalls += 1
            if verdict is Verdict.GIVE_UP:
                self._give_up(c)
                return
            self._restart(c)
        self._disconnect()

    def _messages_wait(self, c: Any) -> bool:
        try:
            if self._connection is None:
                self._connection = self._connect(c)
            consumer = c.task_consumer
            names = [queue.name for queue in consumer.queues if _serves_everybody(queue)] if consumer else []
            return any(_count(self._connection, name) for name in names)
        except Exception as exc:  # whatever a transport raises: a broker that is away is no stall
            logger.debug("the stall detector cannot ask the broker: %r", exc)
            self._disconnect()
            return False

    def _connect(self, c: Any) -> Any:
        kind = c.connection.transport.driver_type
        names = {"redis": ("socket_timeout", "socket_connect_timeout"), "amqp": ("read_timeout", "write_timeout")}
        options = dict.fromkeys(names.get(kind, ()), _PATIENCE)
        return c.app.connection_for_read(transport_options=options, connect_timeout=_PATIENCE, heartbeat=0)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(Exception):
                connection.close()

    def _restart(self, c: Any) -> None:
        """First strike."""
        later = ", when the tasks that are to be acknowledged late have ended" if late_tasks_run() else ""
        logger.error("%s%s", self._tell("the consumer is restarted"), later)
        before = self._delivered(c), self._starts
        while late_tasks_run():
            if self._ending.wait(min(self._timeout / _LOOKS, 1.0)) or before != (self._delivered(c), self._starts):
                return
        self._break_connection(c, lambda: before != (self._delivered(c), self._starts) or c.connection is None)

    def _give_up(self, c: Any) -> None:
        """Second strike: a warm shutdown, which lets running tasks end; if the node is deaf to that too, its end."""
        logger.critical("%s", self._tell("restarting the consumer did not help: this node ends"))
        self._disconnect()
        worker_state.should_stop = EX_STALLED
        self._break_connection(c, lambda: c.blueprint.state != bootsteps.RUN)
        if self._ending.wait(self._timeout):
            while not c.pool.handle.finished:
                time.sleep(0.1)
        if self._may_exit:
            time.sleep(_TO_LEAVE)
            logger.critical("this node cannot even end in peace")
            os._exit(EX_STALLED)

    def _tell(self, what: str) -> str:
        return f"messages wait, slots are free, and nothing was delivered for {self._timeout:g} s: {what}"

    def _break_connection(self, c: Any, broken: Callable[[], bool]) -> None:
        """By an error in the consumer's loop. If that hangs in a system call, by shutting its sockets down."""
        raise_in_loop(c)
        if not self._wait_for(broken):
            for each in list(_sockets(c.connection)):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._wait_for(broken)  # no other strike before this one could have helped

    def _wait_for(self, broken: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + max(self._timeout, _REACTION)
        while not broken() and not self._ending.wait(0.02):
            if time.monotonic() > deadline:
                return False
        return True


def may_take(c: Any) -> bool:
    """Whether a consumer that is not deaf would take a message now."""
    connected = c.connection is not None and c.task_consumer is not None and c.qos is not None
    stopping = worker_state.should_stop is not None or worker_state.should_terminate is not None
    if not connected or stopping or c.blueprint.state != bootsteps.RUN or c.controller.blueprint.state != bootsteps.RUN:
        return False
    reserved = len(worker_state.reserved_requests)
    return reserved < c.pool.num_processes and (not c.qos.value or reserved + held_back(c) < c.qos.value)


def held_back(c: Any) -> int:
    """How many messages wait in this node for their time or for their rate limit."""
    limited = sum(len(bucket.contents) for bucket in list(c.task_buckets.values()) if bucket)
    return limited + len(worker_state.scheduled_requests)


def raise_in_loop(c: Any) -> None:
    """Has the consumer's loop, with a hub or without, raise an error that Celery takes for a lost connection.

    Both loops bring the prefetch count up to date before they wait for messages, and let errors of that out; those of
    timers and callbacks they only log.
    """
    qos, usual = c.qos, c.qos.callback
    kind = StallError if issubclass(StallError, tuple(c.connection_errors)) else c.connection_errors[0]

    def fail(prefetch_count: int) -> None:
        qos.callback = usual
        if late_tasks_run():  # begun meanwhile
            usual(prefetch_count=prefetch_count)
        else:
            raise kind("nothing was delivered")

    qos.callback, qos.prev = fail, None
    if c.hub is not None:
        c.hub.call_soon(lambda: None)  # wakes it


def late_tasks_run() -> bool:
    """Whether tasks are in the pool whose messages the broker would deliver again if their connection were lost."""
    while True:
        try:
            reserved = list(worker_state.reserved_requests)
        except RuntimeError:  # it has changed meanwhile, in its own thread
            continue
        return any(request.task.acks_late and not request.acknowledged for request in reserved)


def _serves_everybody(queue: Any) -> bool:
    """Not those queues whose messages may wait for good reasons beside a consumer that is free."""
    arguments = queue.queue_arguments or {}
    one_at_a_time = arguments.get("x-single-active-consumer")
    return not (one_at_a_time or arguments.get("x-queue-type") == "stream" or queue.exclusive)


def _count(connection: Any, name: str) -> int:
    channel = connection.default_channel
    if hasattr(channel, "_size"):  # kombu's virtual channels
        return int(channel._size(name))
    try:
        with connection.channel() as channel:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
    except connection.channel_errors as exc:  # there is no such queue; that has cost the channel
        logger.debug("counting the messages of %s: %s", name, describe(exc))
        return 0


def _sockets(connection: Any) -> Iterator[Any]:
    """The sockets that a connection to the broker has open, found without opening any."""
    if connection is None:
        return
    for channel in list(getattr(connection._transport, "channels", None) or ()):
        cached = vars(channel)
        clients = [getattr(cached.get(name), "connection", None) for name in ("client", "subclient")]
        pooled = getattr(cached.get("_pool"), "_in_use_connections", ())
        yield from (each._sock for each in [*clients, *pooled] if getattr(each, "_sock", None) is not None)
    sock = getattr(getattr(connection._connection, "_transport", None), "sock", None)
    if sock is not None:
        yield sock
