"""One connection to the Redis of a result backend, without redis-py's client around it.

Owns the exchange over it, and the quick way of a process that has one result and nothing else to do. The layers above
take longer than all the rest, and a process that makes a client writes to a megabyte of what it had shared with its
parent. Knows no records.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha1
from typing import Any

from redis import exceptions as redis_errors

from mpworker.celery.connection import impatient

logger = logging.getLogger("mpworker.results")

#: Seconds that an exchange may take where nobody waits for it: a large result takes its time.
LONGEST = 60.0
#: Seconds for which the quick way waits until Redis takes a result, and as long until it says so.
QUICK = 0.25
#: Seconds for which that way is closed after a failure, and after an exchange that took so many times less …
_PAUSE, _FACTOR = 5.0, 20.0
#: … but more than this.
_SLOW = 0.05

#: A command and its arguments; also the keys and the arguments of a script.
Words = Sequence[Any]


class Line:
    """A connection that is made when it is needed. For one thread at a time; a process that is forked before it is made
    may have it instead.

    Args:
        backend: Celery's for Redis, or one derived from it.
    """

    def __init__(self, backend: Any) -> None:
        params = impatient(backend.connparams, LONGEST) | {"health_check_interval": 0}  # it shows when it is used
        #: kept: behind Sentinel the connection asks it for the master
        self._pool = backend._get_pool(**params)
        self._connection = self._pool.make_connection()
        self._which = 0, 0

    def hasten(self, patience: float) -> None:
        """From the next connection on each step of an exchange takes no longer than that, in seconds."""
        for name in ("socket_timeout", "orig_socket_timeout", "socket_connect_timeout"):
            if hasattr(self._connection, name):
                setattr(self._connection, name, min(getattr(self._connection, name) or patience, patience))

    def on_connect(self, callback: Callable[[Any], None]) -> None:
        """Has each new connection call a method, which is not kept alive by that."""
        self._connection.register_connect_callback(callback)

    def connect(self) -> None:
        """If need be.

        Raises:
            redis.exceptions.RedisError, OSError: Redis is away or refuses.
        """
        if self._connection._sock is None:
            self._connection.connect()
            self._which = _identity(self._connection._sock)

    def is_made(self) -> bool:
        """It is connected, and what has its descriptor's number is still that. Else it is given up: what user code has
        opened in its place is left alone."""
        sock = self._connection._sock
        if sock is None:
            return False
        if _identity(sock) == self._which:
            return True
        sock.detach()
        self._connection._sock = None
        self.close()
        return False

    def close(self) -> None:
        """What has not been answered by now never will be."""
        self._connection.disconnect()

    def call(self, *words: Any) -> Any:
        """Runs one command.

        Raises:
            redis.exceptions.RedisError, OSError: Redis is away or refuses; it may have been done all the same.
        """
        (reply,) = self.call_all([words])
        if isinstance(reply, Exception):
            raise reply
        return reply

    def call_all(self, commands: Sequence[Words]) -> list[Any]:
        """Runs commands, sent at once; once more if the server turns out to have closed the connection.

        Returns:
            The replies; among them what Redis refused, as :exc:`redis.exceptions.ResponseError`.

        Raises:
            redis.exceptions.RedisError, OSError: Redis is away; some of them may have been done.
        """
        self.connect()
        try:
            return self.exchange(commands)
        except redis_errors.ConnectionError:
            self.connect()
            return self.exchange(commands)

    def exchange(self, commands: Sequence[Words]) -> list[Any]:
        """As :meth:`call_all`, of one that is connected, and once."""
        try:
            self._connection.send_packed_command([_packed(words) for words in commands])
            return [self._reply() for _ in commands]
        except BaseException:  # the reply to these must not be taken for the next ones'
            self.close()
            raise

    def run(self, script: str, calls: Sequence[tuple[Words, Words]]) -> list[Any]:
        """As :meth:`call_all`, of one script for each of these keys and arguments."""
        commands = [_evaluating(script, *call) for call in calls]
        replies = self.call_all(commands)
        if any(isinstance(reply, redis_errors.NoScriptError) for reply in replies):
            self.call("SCRIPT", "LOAD", script)
            replies = self.call_all(commands)
        return replies

    def _reply(self) -> Any:
        try:
            return self._connection.read_response()
        except redis_errors.ResponseError as exc:  # the replies to the other commands are still to come
            return exc


def _identity(sock: Any) -> tuple[int, int]:
    try:
        status = os.fstat(sock.fileno())
    except (OSError, ValueError):
        return 0, 0
    return status.st_dev, status.st_ino


def _evaluating(script: str, keys: Words, args: Words) -> Words:
    return "EVALSHA", _sha(script), len(keys), *keys, *args


@cache
def _sha(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def _packed(words: Words) -> bytes:
    """The command as it is sent."""
    encoded = [word if type(word) is bytes else str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded])


class Express:
    """The quick way to Redis for a single result: by the process that has it, while its node has nothing else to do.
    What it does not bring is the shipper's, and so are the results before it is connected: a thread sees to that, as
    nobody knows how long it takes.

    Args:
        backend: of ours.
        script: that stores results.
    """

    def __init__(self, backend: Any, script: str) -> None:
        self._backend, self._script = backend, script
        #: connected and not in use: there is one at most
        self._idle: list[Line] = []
        self._opens_at = 0.0
        self._connecting: threading.Thread | None = None

    def is_open(self) -> bool:
        """Redis can be told at once. If nothing speaks against it, it soon can."""
        if time.monotonic() < self._opens_at:
            return False
        if not self._idle and (self._connecting is None or not self._connecting.is_alive()):
            thread = threading.Thread(target=self._connect, name="mpworker-connecting", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there can be no more of them
                self._close(0.0)
            self._connecting = thread
        return bool(self._idle)

    def _connect(self) -> None:
        try:
            line = self._backend.line(QUICK)
            try:
                line.call("SCRIPT", "LOAD", self._script)
            except BaseException:
                line.close()  # it may be connected, and refused the script
                raise
        except Exception as exc:  # whatever a provider of credentials raises, too
            logger.debug("results are left to the shipper: %r", exc)
            self._close(0.0)
        else:
            self._idle.append(line)

    def run(self, keys: Words, args: Words) -> Any:
        """Runs the script, within twice the time that the line has.

        Returns:
            What it does.

        Raises:
            Exception: whatever it is, the script may have been run all the same.
        """
        line, begun = self._idle.pop(), time.monotonic()
        try:
            if not line.is_made():
                raise redis_errors.ConnectionError("the line is not that of before")
            (reply,) = line.exchange([_evaluating(self._script, keys, args)])
            if isinstance(reply, Exception):
                raise reply
        except BaseException:
            line.close()
            self._close(time.monotonic() - begun)
            raise
        if (took := time.monotonic() - begun) > _SLOW:
            self._opens_at = time.monotonic() + _FACTOR * took
        self._idle.append(line)
        return reply

    def _close(self, took: float) -> None:
        self._opens_at = time.monotonic() + max(_PAUSE, _FACTOR * took)
