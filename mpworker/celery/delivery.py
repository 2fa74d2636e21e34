"""Records are brought to the Redis of a result backend, and it is noticed what that has lost of them.

Owns the exchange with Redis, and the question whether it is still the one that was brought the rest. Finds no records
and keeps no time: :mod:`mpworker.results.shipper` finds them, :mod:`mpworker.celery.shipping` says when.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from celery import states
from redis import exceptions as redis_errors

from mpworker.celery import progress
from mpworker.celery.backend import ResultBackend
from mpworker.celery.line import LONGEST
from mpworker.celery.scripts import DELIVER, HISTORY_REFUSED, refuses_scripts
from mpworker.results.record import SHIPPED, SUPERSEDED, TERMINAL, Record, describe
from mpworker.results.shipper import Pass, Shipper, Witness

logger = logging.getLogger("mpworker.results")

_DIGITS = {1: SHIPPED, 2: SHIPPED, HISTORY_REFUSED: SHIPPED, 0: SUPERSEDED}
#: Seconds after which a start, which says nothing of its time in Redis, is no news where something else is known.
_LATE = 2.0
#: Records that one script stores: others want to be served in between.
_AT_ONCE = 50


class Delivery:
    """Brings records to the Redis of a result backend, many with one exchange."""

    def __init__(self, backend: ResultBackend) -> None:
        self._backend = backend
        self._line = backend.line(LONGEST)
        #: the run of the server that all goes to; empty: not known
        self.server = ""
        #: when it is looked once more whether all has gone there, by ``time.monotonic()``
        self.recheck_at = 0.0
        #: who is at the other end now has yet to be asked
        self.is_doubtful = True
        self._line.on_connect(self._on_connect)

    def __call__(self, records: Sequence[Record]) -> list[bytes]:
        """See :data:`mpworker.results.shipper.Deliver`.

        Raises:
            redis.exceptions.RedisError: Redis is away or refuses; some of them may have been stored.
        """
        results = [record for record in records if not record.chord and _is_sendable(record)]
        digits = iter(self._results(results))
        return [self._own(self._part, record) if record.chord else self._next(digits, record) for record in records]

    @staticmethod
    def _next(digits: Iterator[bytes], record: Record) -> bytes:
        if _is_sendable(record):
            return next(digits)
        logger.error("the record of task %r stays in the journal only: Redis takes no such text", record.task_id)
        return SHIPPED

    def _results(self, records: Sequence[Record]) -> list[bytes]:
        if records and self._backend.scripted:
            try:
                replies = self._by_script(records)
            except redis_errors.ResponseError as exc:
                if not refuses_scripts(exc):
                    raise
                self._backend.scripted = False
            else:
                return [self._own(self._digit, *item) for item in zip(records, replies, strict=True)]
        return [self._own(self._plainly, record) for record in records]

    def _by_script(self, records: Sequence[Record]) -> list[Any]:
        parts = [records[at : at + _AT_ONCE] for at in range(0, len(records), _AT_ONCE)]
        try:
            replies = self._run([self._backend.arguments(part, _rule_of) for part in parts])
        except redis_errors.NoPermissionError as exc:
            if not self._backend.give_up_history(exc):
                raise
            return self._by_script(records)
        told = [reply for some in replies for reply in some]
        if HISTORY_REFUSED in told:
            self._backend.give_up_history("it does not take it")
        return told

    def _run(self, calls: Sequence[tuple[list[Any], list[Any]]]) -> list[Any]:
        replies = self._line.run(DELIVER, calls)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    @staticmethod
    def _own(do: Callable[..., bytes], record: Record, *args: Any) -> bytes:
        """What is the fault of one record, or of its key, must not be in the way of all others for ever."""
        try:
            return do(record, *args)
        except redis_errors.ResponseError as exc:
            if "WRONGTYPE" not in str(exc):
                raise
            logger.error("the record of task %s stays in the journal only: %s", record.task_id, describe(exc))
            return SUPERSEDED

    def _digit(self, record: Record, reply: Any) -> bytes:
        return _DIGITS.get(reply) or self._plainly(record)

    def _plainly(self, record: Record) -> bytes:
        """In three steps, for payloads that are no JSON and servers that refuse scripts."""
        old = self._line.call("GET", record.key)
        if old and old not in (record.payload, str(record.payload).encode()):
            meta = self._backend.decode_known(old)
            status = meta.get("status")
            if status == states.SUCCESS:
                return SUPERSEDED
            ended = status in TERMINAL and not _is_before(meta.get("date_done"), record)
            told = meta.get("told") if status == progress.STATE else None
            newer = ended or (isinstance(told, int | float) and told >= record.when)
            if record.status != states.SUCCESS and (newer or (status and _is_late_start(record))):
                return SHIPPED
        live = ("PX", left) if (left := _to_live(record)) else ()
        self._line.call("SET", record.key, record.payload, *live)
        self._line.call("PUBLISH", record.key, record.payload)
        return SHIPPED

    def _part(self, record: Record) -> bytes:
        try:
            self._backend.count_part(record)
        except self._backend.outages:
            raise
        except Exception:  # the body's own fault: trying again would not help
            logger.exception("task %s cannot be counted as a part of its chord", record.task_id)
        return SHIPPED

    # -- whether Redis still has what it was brought -------------------------------------------------------------

    def _on_connect(self, _: Any) -> None:
        self.is_doubtful = True

    def ask_server(self) -> str:
        """Which run of which server this is; empty where it does not say."""
        self.is_doubtful = False
        try:
            told = re.search(r"^run_id:(\w+)", _text(self._line.call("INFO", "server")), re.MULTILINE)
        except redis_errors.ResponseError:
            return ""
        return told[1] if told else ""

    def ask_token(self, folder: str) -> str | None:
        """The last one that it was given for that folder; empty: none. ``None``: it does not say."""
        try:
            return _text(self._line.call("GET", self._mark(folder)) or b"")
        except redis_errors.NoPermissionError:
            return None

    def give_token(self, folder: str) -> Witness:
        """Has Redis note that it has been brought something from that folder; after that."""
        token = secrets.token_hex(8)
        try:
            self._line.call("SET", self._mark(folder), token)
        except redis_errors.NoPermissionError:
            token = ""
        return Witness(self.server, token)

    def _mark(self, folder: str) -> Any:
        """A key that is there for as long as Redis forgets nothing, named as groups are: others may be forbidden."""
        return self._backend.get_key_for_group(f"mpworker-journal-{folder}")


def _text(reply: bytes | str) -> str:
    return reply if isinstance(reply, str) else reply.decode("ascii", "replace")


def _is_sendable(record: Record) -> bool:
    """Not if somebody has put half a surrogate pair into a task's id."""
    try:
        str(record.key).encode()
        if isinstance(record.payload, str):
            record.payload.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_before(done: Any, record: Record) -> bool:
    try:
        moment = datetime.fromisoformat(done)
    except (TypeError, ValueError):
        return False
    # A retry that was said only after its task had failed is none that came after that.
    margin = 1.0 if record.status == states.RETRY else 0.0
    return moment.tzinfo is not None and moment.timestamp() + margin < record.when


def _rule_of(record: Record) -> tuple[int, str, str]:
    return _to_live(record), record.timestamp, "LATE" if _is_late_start(record) else record.status


def _is_late_start(record: Record) -> bool:
    return record.status == states.STARTED and record.when < time.time() - _LATE


def _to_live(record: Record) -> int:
    """Milliseconds; 0 for ever."""
    left = record.expires_in()
    return 0 if math.isinf(left) else max(1, int(left * 1000))


def deliver_all(shipper: Shipper, delivery: Delivery, wary: float = 0.0, patience: float = math.inf) -> Pass:
    """What is unshipped; and of the rest what a server has lost that was restarted, or that has taken another's place.

    After each delivery the server is given a token, which the checkpoint notes with what was settled by then. One that
    still has it has all of that, and is brought again only what came after it; one that has not, everything. One that
    was there all the time has lost nothing that somebody did not want it to.

    Args:
        wary: seconds after which another server is brought once more what came after the token: somebody may have gone
            on for a moment with the one before, and have marked as shipped what went there.
        patience: as for :meth:`Shipper.run`.
    """
    folder, is_new = shipper.name()
    token = delivery.ask_token(folder) if folder else None
    if delivery.is_doubtful:
        before, server = delivery.server or shipper.witness.server, delivery.ask_server()
        if is_new and folder:  # or it is as old as what is in it, and its checkpoint is lost
            shipper.doubt(everything=True)
        elif (before or not is_new) and (not server or server != before):
            forgotten = token is not None and shipper.witness.token not in ("", token)
            if forgotten:
                logger.warning("Redis has lost results; it is brought again what is in the journal")
            shipper.doubt(everything=forgotten)
            delivery.recheck_at = time.monotonic() + wary
        delivery.server = server
    elif delivery.recheck_at and time.monotonic() >= delivery.recheck_at and not shipper.has_doubts:
        delivery.recheck_at = 0.0
        shipper.doubt(everything=False)
    try:
        found = shipper.run(patience)
    except BaseException:
        delivery.is_doubtful = True
        raise
    if wary == 0.0:
        delivery.recheck_at = 0.0
    if folder and not (delivery.is_doubtful or shipper.has_doubts or delivery.recheck_at):
        known = Witness(delivery.server, shipper.witness.token if token is None else token)
        if shipper.has_news or shipper.witness != known:
            witness = delivery.give_token(folder)
            if not delivery.is_doubtful:  # it has been the same one all the time
                shipper.keep(witness)
    return found
