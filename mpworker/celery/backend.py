"""The result backend ``mpworker+redis://``: Celery's Redis backend with the local journal in front of it.

Owns the order "journal first, Redis behind", the rule that nothing overwrites a SUCCESS (one script in Redis keeps it),
and how long a task may be held up by a Redis that does not answer. Groups, chords and waiting are Celery's code,
unchanged. Never retries later: that is the shipper's.

Where the node has a shipper that listens, Redis is left to it, but for what somebody in the cluster goes on with as
soon as the task has ended (groups, chords, chains, links), and for the end of a task that is its node's only one, which
is there sooner if nobody has to be woken for it; else each process writes what it has journaled itself. What is still
on its way, the node's own processes read from the journal.

A process writes a journal when its node has called :func:`enable_journal`, or, elsewhere, when ``mpworker_journal`` or
``MPWORKER_JOURNAL`` names a folder. Without one this is Celery's backend and nothing else.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property, reduce
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError
from celery.utils.log import get_logger
from kombu import serialization
from kombu.utils import json
from redis import exceptions as redis_errors

from mpworker.celery import progress, task_log
from mpworker.celery.app import settings_of
from mpworker.celery.connection import quick_client as make_quick_client
from mpworker.celery.line import Express, Line
from mpworker.celery.scripts import HISTORY_REFUSED, SKEW, STORE, WRONG_TYPE, refuses_scripts
from mpworker.errors import ConfigurationError, PoisonMessage, StoreError
from mpworker.pool.worker import task_worker
from mpworker.results.bell import ONLY_IN_REDIS, Bell
from mpworker.results.journal import Journal, Place
from mpworker.results.record import (
    SHIPPED,
    SUPERSEDED,
    UNSHIPPED,
    Record,
    describe,
    displaces,
    is_alone,
    queueing_of,
    runtime_of,
    store_name,
    timestamp_of,
)
from mpworker.results.shipper import Shipper
from mpworker.settings import Settings

logger = get_logger(__name__)

#: Seconds that one exchange with Redis may take when the journal holds the record anyway.
REDIS_TIMEOUT = 3.0
#: After a failure slower than this (seconds), Redis is left alone for a multiple of the time lost, up to a maximum.
_SLOW, _PAUSE_FACTOR, _PAUSE_MAX = 0.5, 5.0, 15.0
#: The same after a success that took so many seconds.
_TOO_SLOW = 0.9
#: Bytes up to which a result that a process brings itself is no burden.
_SMALL = 1 << 16
#: What the storing script replies when it is settled; anything else is the shipper's to find out.
_TAKEN = {1: SHIPPED, HISTORY_REFUSED: SHIPPED, 0: SUPERSEDED}
#: Seconds that one who forgets a result waits for the delivery that it may be in.
_FORGET_PATIENCE = 1.0
#: Seconds between two warnings of one kind from one process.
_WARN_EVERY = 10.0

_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "socket": "socket",
    "unix": "socket",
    "redis+socket": "socket",
    "redis+unix": "socket",
    "sentinel": "sentinel",
}

_node_journal: Journal | None = None
_bell: Bell | None = None


def enable_journal(settings: Settings, hostname: str, bell: Bell | None = None) -> Journal:
    """Makes every result that this process stores go to the node's journal first.

    To be called by the main process and by each child that stores results.

    Args:
        hostname: the node's name, such as ``celery@host``.
        bell: of the node's shipper.

    Raises:
        ConfigurationError: the journal folder cannot be written.
    """
    global _node_journal, _bell
    # The main process flushes for all of them: a file is on disk as a whole.
    fsync = "off" if settings.journal_fsync == "batch" else settings.journal_fsync
    journal = Journal(settings.journal_dir, hostname, fsync)
    journal.prepare()
    disable_journal()
    _node_journal, _bell = journal, bell
    return journal


def disable_journal() -> None:
    """Undoes :func:`enable_journal`."""
    global _node_journal, _bell
    if _node_journal is not None:
        _node_journal.close()
    _node_journal = _bell = None


def hang_bell(bell: Bell | None) -> bool:
    """From here on this process rings it when it has written to its node's journal; ``False`` if there is none."""
    global _bell
    _bell = bell if _node_journal is not None else None
    return _node_journal is not None


def rings_a_bell() -> bool:
    """Whether this process' node has a shipper for what :func:`enable_journal` enabled."""
    return _bell is not None


def journal_for(app: Any) -> Journal | None:
    """The journal of this process: its node's, or the one that the application's configuration names, or none.

    Raises:
        ConfigurationError: a journal is named, and an ``mpworker_`` setting is wrong.
    """
    return _node_journal or _named_journal(app)


def _named_journal(app: Any) -> Journal | None:
    if not (os.environ.get("MPWORKER_JOURNAL") or app.conf.get("mpworker_journal")):
        return None
    settings = settings_of(app)
    return Journal(settings.journal_dir, f"client@{socket.gethostname()}", settings.journal_fsync)


class _Warnings:
    """Logs at most one warning in ``_WARN_EVERY`` seconds and counts the others."""

    def __init__(self) -> None:
        self._next = 0.0
        self.silent = 0

    def warn(self, text: str, *args: object) -> None:
        now = time.monotonic()
        if now < self._next:
            self.silent += 1
            return
        more = f"; {self.silent} more since the last such line" if self.silent else ""
        self._next, self.silent = now + _WARN_EVERY, 0
        logger.warning(text + "%s", *args, more)


class ResultBackend(RedisBackend):  # type: ignore[misc]
    """Celery's Redis backend behind a journal.

    Raises:
        ConfigurationError: the URL is none that it knows, or an ``mpworker_`` setting is wrong.
    """

    def __new__(cls, *_: Any, url: str | None = None, **__: Any) -> ResultBackend:
        if cls is ResultBackend and str(url).lower().startswith("sentinel://"):
            from mpworker.celery.sentinel import SentinelResultBackend

            return super().__new__(SentinelResultBackend)  # type: ignore[no-any-return]
        return super().__new__(cls)  # type: ignore[no-any-return]

    def __init__(self, *args: Any, url: str | None = None, **kwargs: Any) -> None:
        try:
            super().__init__(*args, url=_redis_url(url), **kwargs)
        except ConfigurationError:
            raise
        except ValueError as exc:
            shown, reason = re.sub(r"//.*@", "//**@", url or ""), " ".join(str(exc).split())
            raise ConfigurationError(f"result backend URL {shown}: {reason}") from exc
        #: what a Redis raises that is away or refuses
        self.outages = (redis_errors.RedisError, OSError, *self.connection_errors)
        self._named = _named_journal(self.app)
        self._redis_warnings, self._journal_warnings, self._chord_warnings = _Warnings(), _Warnings(), _Warnings()
        self._left_alone_until = 0.0
        self._unshipped = 0
        self._prepared: list[Line] = []
        #: one script decides; False where payloads are no JSON or the server refuses scripts
        self.scripted = self.content_type == "application/json" and not getattr(self, "compression", None)

    @cached_property
    def history_key(self) -> bytes:
        """Of the stream in which all nodes note what has ended, named as groups are: others may be forbidden."""
        key: bytes = self.get_key_for_group("mpworker-history")
        return key

    @cached_property
    def _history(self) -> int:
        return settings_of(self.app).history

    def arguments(
        self, records: Sequence[Record], rule: Callable[[Record], tuple[Any, ...]]
    ) -> tuple[list[Any], list[Any]]:
        """Keys and arguments for a script of :func:`storing_script` that stores these records.

        Args:
            rule: of a record, its time to live in milliseconds and the two arguments of the script's rule.
        """
        args: list[Any] = [self._history]
        for record in records:
            is_end = record.status in states.READY_STATES and self._history > 0
            args += (record.payload, *rule(record), record.summary() if is_end else b"")
        keys = [record.key for record in records]
        return [*keys, self.history_key] if self._history else keys, args

    def give_up_history(self, why: Exception | str) -> bool:
        """After a refusal that may be due to it; ``False`` if there was none."""
        if not self._history:
            return False
        text = why if isinstance(why, str) else describe(why)
        logger.warning("Redis keeps no history of results for --cluster: %s", text)
        self._history = 0
        return True

    @cached_property
    def _key_prefix(self) -> str:
        key: bytes = self.get_key_for_task("-")
        return key.decode()[:-1]

    @cached_property
    def store_name(self) -> str:
        """Which backend this is, for its records."""
        return store_name(f"{self.as_uri()} {self.get_key_for_task('-')!r}")

    def as_uri(self, include_password: bool = False) -> str:
        """The URL that leads back to this class."""
        return f"mpworker+{super().as_uri(include_password) or 'redis://'}"

    def store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Stores a state change: one line in the journal, then Redis.

        With a journal, a Redis that is down, slow, full or read-only costs a few seconds at most and raises nothing:
        the line stays marked as not shipped. Without one, and when it cannot be written, Celery's rules apply.

        Raises:
            BackendStoreError: the encoded result is larger than Redis can hold.
        """
        if state in states.READY_STATES or state == states.RETRY:
            progress.hush(task_id)
        journal = _node_journal or self._named
        if journal is None:
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        encoded, now = self.encode_result(result, state), datetime.now(UTC)
        meta = self._meta(encoded, state, traceback, request, now)
        meta["task_id"] = _text(task_id)
        payload = self._quick_encode(meta)
        if isinstance(payload, str) and len(payload) > self._MAX_STR_VALUE_SIZE:
            raise BackendStoreError("value too large for Redis backend", state=state, task_id=task_id)
        bell = _bell if journal is _node_journal and not _is_awaited(request) else None
        left = bell is not None and bell.has_listener()
        quick = left and state in states.READY_STATES and self._goes_by_itself(meta["task_id"], payload)
        record = self._record(meta, result, payload, request, journal.node, now, in_hand=quick or not left)
        try:
            place = journal.append(record)
        except StoreError as exc:
            self._journal_warnings.warn("result of task %s goes to Redis only: %s", record.task_id, exc)
            if _bell is not None:
                _bell.count(ONLY_IN_REDIS)
            return super().store_result(task_id, result, state, traceback=traceback, request=request, **kwargs)
        if quick and self._ship_quickly(journal, place, record):
            return encoded
        if not (left and bell is not None and journal.holds(place) and bell.ring()):
            self._ship(journal, place, record)
        return encoded

    def _meta(self, result: Any, state: str, traceback: Any, request: Any, now: datetime) -> dict[str, Any]:
        """What Redis holds of a task, as Celery's own method says it, which takes six times as long."""
        if self._extended:
            return dict(self._get_result_meta(result=result, state=state, traceback=traceback, request=request))
        ready = state in states.READY_STATES
        meta = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": self.current_task_children(request),
            "date_done": now.astimezone(self.app.timezone).isoformat() if ready else None,
        }
        for name, key in (("group", "group_id"), ("parent_id", "parent_id")):
            if value := getattr(request, name, None):
                meta[key] = value
        return meta

    def _quick_encode(self, meta: dict[str, Any]) -> str | bytes:
        """As :meth:`encode`, but past kombu's registry if that would lead to its own JSON all the same."""
        if self._is_kombus_json:
            try:
                return str(json.dumps(meta))  # type: ignore[no-untyped-call]
            except Exception:  # then it fails as everybody expects
                pass
        encoded: str | bytes = self.encode(meta)
        return encoded

    @cached_property
    def _is_kombus_json(self) -> bool:
        codec = serialization.registry._encoders.get(self.serializer)
        return self.scripted and getattr(codec, "encoder", None) is json.dumps

    @cached_property
    def _extended(self) -> bool:
        return bool(self.app.conf.find_value_for_key("extended", "result"))

    # -- what is on its way to Redis -----------------------------------------------------------------------------

    def _get_task_meta_for(self, task_id: Any) -> dict[str, Any]:
        """What Redis holds of a task; in a node, what its processes have written of it meanwhile."""
        told = self._told(task_id) if rings_a_bell() else None
        try:
            meta: dict[str, Any] = super()._get_task_meta_for(task_id)
        except self.outages:
            if told is None:
                raise
            return told
        return meta if told is None or meta["status"] in states.READY_STATES else told

    def _told(self, task_id: Any) -> dict[str, Any] | None:
        records = [entry.record for entry in self._pending.pending(_text(task_id)) if not entry.record.chord]
        records = [record for record in records if record.payload is not None and record.store == self.store_name]
        if not records:
            return None
        told = reduce(lambda old, new: new if displaces(new, old) else old, records)
        return dict(self.decode_result(told.payload))

    def _forget(self, task_id: Any) -> None:
        """As Celery's; in a node, also what its processes have written of the task and Redis has not got yet."""
        if rings_a_bell():
            try:
                self._pending.forget(_text(task_id), _FORGET_PATIENCE)
            except (StoreError, OSError) as exc:
                logger.warning("what is on its way to Redis of task %s is not forgotten: %s", task_id, describe(exc))
        super()._forget(task_id)

    @property
    def _pending(self) -> Shipper:
        assert _node_journal is not None  # who rings a bell has one
        return Shipper(_node_journal.folder, lambda _: (), store=self.store_name)

    def store_progress(self, task_id: str, told: dict[str, Any], request: Any, at: float | None = None) -> None:
        """Stores the state PROGRESS, in Redis only, unless the task has ended there or has told something newer.

        What Redis does not take is lost; nothing is raised on its account.

        Args:
            told: ``done``, ``total``, ``message``.
            at: when, in seconds since the epoch; default now.
        """
        at = time.time() if at is None else at
        meta = self._get_result_meta(result=told, state=progress.STATE, traceback=None, request=request)
        payload = self.encode(meta | {"task_id": task_id, "told": at})
        try:
            record = self._record(meta | {"task_id": task_id}, "", payload, request, "", datetime.now(UTC))
            self._put(record, at)
        except self.outages as exc:
            self._redis_warnings.warn("Redis did not take the progress of task %s: %s", task_id, describe(exc))

    def on_chord_part_return(self, request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> None:
        """Counts a part of a chord in Redis. With a journal, an outage neither fails the task that was the part nor
        leaves the chord without it: the shipper counts it later."""
        try:
            super().on_chord_part_return(request, state, result, *args, **kwargs)
        except self.outages as exc:
            if (journal := _node_journal or self._named) is None:
                raise
            self._chord_warnings.warn(
                "task %s will be counted as a part of chord %s later, because of Redis: %s",
                *(request.id, request.group, describe(exc)),
            )
            try:
                journal.append(self._part(request, state, result, journal.node))
            except StoreError as lost:
                logger.error("chord %s will never be complete: %s", request.group, lost)

    def _part(self, request: Any, state: str, result: Any, node: str) -> Record:
        part = {name: getattr(request, name, None) for name in ("id", "group", "group_index", "chord", "errbacks")}
        return Record(
            task_id=request.id,
            name=getattr(request, "task", None),
            status=state,
            hostname=getattr(request, "hostname", None) or node,
            store=self.store_name,
            payload=self.encode({"request": part, "state": state, "result": self.encode_result(result, state)}),
            chord=True,
        )

    def count_part(self, record: Record) -> None:
        """Does what :meth:`on_chord_part_return` could not do when the task ended.

        Raises:
            redis.exceptions.RedisError: nor can it be done now.
        """
        part = self.decode(record.payload)
        request, state, result = Context(part["request"]), part["state"], part["result"]
        if not self._chord_zset:  # before Celery 5.7 the same part would count twice
            counted = self.encode([1, request.id, state, result])
            self.client.lrem(self.get_key_for_group(request.group, ".j"), 0, counted)
        if state in states.EXCEPTION_STATES:
            result = self.exception_to_python(result)
        super().on_chord_part_return(request, state, result)

    def _record(
        self,
        meta: dict[str, Any],
        result: Any,
        payload: str | bytes,
        request: Any,
        node: str,
        now: datetime,
        *,
        in_hand: bool = False,
    ) -> Record:
        task_id, state, traceback = str(meta["task_id"]), meta["status"], meta["traceback"]
        finished = state in states.READY_STATES or state == states.RETRY
        # New in Celery 5.7, as is compression.
        expires = getattr(self, "failure_expires", None) if state == states.FAILURE else self.expires
        return Record(
            task_id=task_id,
            name=getattr(request, "task", None),
            status=state,
            message=describe(result) if isinstance(result, BaseException) else "",
            result=meta["result"],
            traceback=None if traceback is None else str(traceback),
            timestamp=timestamp_of(now),
            runtime=runtime_of(task_id) if finished else None,
            queued=queueing_of(task_id),
            hostname=getattr(request, "hostname", None) or node,
            retries=getattr(request, "retries", None) or 0,
            key=self._key_prefix + task_id,
            store=self.store_name,
            payload=payload,
            expires=(self.expires if expires is None else expires) or None,
            dead=isinstance(result, PoisonMessage) or getattr(result, "is_dead", False) is True,
            log=task_log.tail_of(task_id) if finished else None,
            in_hand=in_hand,
        )

    def _goes_by_itself(self, task_id: str, payload: str | bytes) -> bool:
        """Whether it is in Redis sooner if this process brings it there, and nothing else waits meanwhile."""
        small = self.scripted and len(payload) < _SMALL
        return small and is_alone(task_id) and task_worker() is not None and self._express.is_open()

    def _ship_quickly(self, journal: Journal, place: Place, record: Record) -> bool:
        """``False``: it is the shipper's. Whatever is wrong, its task has ended as it has."""
        worker = task_worker()
        assert worker is not None
        with worker.uninterrupted():
            digit = UNSHIPPED
            try:
                keys, args = self.arguments([record], lambda _: (1000 * (record.expires or 0), "", SKEW))
                (reply,) = self._express.run(keys, args)
                digit = _TAKEN.get(reply, UNSHIPPED)
            except redis_errors.NoPermissionError as exc:
                self.give_up_history(exc)
            except Exception as exc:  # the shipper will meet it, too, and say so
                logger.debug("the result of task %s is left to the shipper: %r", record.task_id, exc)
            journal.mark(place, digit)
        return digit != UNSHIPPED

    def _ship(self, journal: Journal, place: Place, record: Record) -> None:
        begun = time.monotonic()
        if begun < self._left_alone_until:
            self._unshipped += 1
            journal.mark(place, UNSHIPPED)
            return
        try:
            digit = self._put(record)
        except self.outages as exc:
            took = time.monotonic() - begun
            if took > _SLOW:
                self._left_alone_until = begun + took + min(took * _PAUSE_FACTOR, _PAUSE_MAX)
            self._unshipped += 1
            journal.mark(place, UNSHIPPED)
            self._redis_warnings.warn(
                "result of task %s (%s) is in the journal, marked as not shipped, because Redis did not take it: %s",
                *(record.task_id, record.name, describe(exc)),
            )
            return
        journal.mark(place, digit)
        took = time.monotonic() - begun
        if took > _TOO_SLOW and journal is _node_journal:  # from here on the shipper brings it, many at once
            self._left_alone_until = begun + took + min(took * _PAUSE_FACTOR, _PAUSE_MAX)
            self._redis_warnings.warn("Redis took %.1f s for a result; others wait in the journal for a while", took)
        elif self._unshipped:
            logger.info("Redis takes results again; %d of this process were left to the journal", self._unshipped)
            self._unshipped = 0

    @cached_property
    def quick_client(self) -> Any:
        """A client that gives up soon: what it writes is in the journal already."""
        return make_quick_client(self, REDIS_TIMEOUT)

    @cached_property
    def _store_script(self) -> Any:
        return self.quick_client.register_script(STORE)

    @cached_property
    def _express(self) -> Express:
        return Express(self, STORE)

    def prepare_line(self) -> None:
        """For processes that are forked after that: what each makes for itself takes a megabyte of its own."""
        self._prepared = [Line(self)]

    def line(self, patience: float) -> Line:
        """A connection to Redis, not made yet.

        Args:
            patience: seconds that each step of an exchange may take.
        """
        try:
            line = self._prepared.pop()
        except IndexError:
            line = Line(self)
        line.hasten(patience)
        return line

    def _put(self, record: Record, told: float | None = None) -> bytes:
        """Writes to Redis and publishes, unless a SUCCESS is there; returns the digit for the journal.

        Args:
            told: for progress, when that was: no other end may be there either, nor anything newer.
        """
        if self.scripted:
            try:
                reply = self._put_by_script(record, told)
            except redis_errors.ResponseError as exc:
                if not refuses_scripts(exc):
                    raise
                logger.warning("Redis refuses scripts (%s); results are written without, in three steps", exc)
                self.scripted = False
            else:
                if reply >= 0:
                    return SHIPPED if reply else SUPERSEDED
        return self._put_plainly(record, told)

    def _put_by_script(self, record: Record, told: float | None) -> int:
        rule = 1000 * (record.expires or 0), "" if told is None else told, SKEW
        try:
            keys, args = self.arguments([record], lambda _: rule)
            (reply,) = self._store_script(keys=keys, args=args)
        except redis_errors.NoPermissionError as exc:
            if not self.give_up_history(exc):
                raise
            return self._put_by_script(record, told)
        if reply == WRONG_TYPE:
            raise redis_errors.ResponseError(f"WRONGTYPE {record.key} holds no text")
        if reply == HISTORY_REFUSED:
            self.give_up_history("it does not take it")
        return int(reply)

    def _put_plainly(self, record: Record, told: float | None) -> bytes:
        current = self.quick_client.get(record.key)
        if current and self._stays(current, told):
            return SUPERSEDED
        with self.quick_client.pipeline() as pipe:
            pipe.set(record.key, record.payload, ex=record.expires)
            pipe.publish(record.key, record.payload)
            pipe.execute()
        return SHIPPED

    def decode_known(self, payload: Any) -> dict[str, Any]:
        """What Redis holds for a task. Nothing if another serializer wrote it: no reader of this application can read
        it either, so it may be replaced."""
        try:
            meta = self.decode(payload)
        except Exception as exc:  # of any serializer, any compressor
            self._redis_warnings.warn("an unreadable result in Redis is replaced: %s", describe(exc))
            return {}
        return meta if isinstance(meta, dict) else {}

    def _stays(self, payload: Any, told: float | None) -> bool:
        meta = self.decode_known(payload)
        if told is None:
            return bool(meta.get("status") == states.SUCCESS)
        try:
            return meta.get("status") in states.READY_STATES or 0 < float(meta.get("told", 0)) - told < SKEW
        except (TypeError, ValueError):
            return False


def _text(task_id: Any) -> Any:
    return task_id.decode() if isinstance(task_id, bytes) else task_id


def _is_awaited(request: Any) -> bool:
    """Whether something in the cluster goes on as soon as this task has ended, and may ask for its result."""
    if request is None:
        return False
    # Celery 5.5 has taken the next link of a chain out by now, and has left an empty list.
    chained = getattr(request, "chain", None) is not None
    parts = getattr(request, "group", None) or getattr(request, "chord", None)
    return bool(chained or parts or getattr(request, "callbacks", None) or getattr(request, "errbacks", None))


def _redis_url(url: str | None) -> str | None:
    """The URL as Celery's backend knows it; ``redis+socket`` and the like become ``socket``."""
    if url is None or "://" not in url:
        return url
    scheme, _, rest = url.partition("://")
    known = _SCHEMES.get(scheme.lower())
    if known is None:
        examples = "mpworker+redis://host:6379/0, mpworker+rediss://..., +sentinel://... or +socket:///path"
        raise ConfigurationError(f"result backend URL {scheme}://... is not known here; use {examples}")
    return f"{known}://{rest}"
