"""What Redis did not take is brought to it, however long that takes: a node's shipper, and that of a dead one's folder.

Owns when a node's shipper looks, how long it waits while Redis refuses, and the rule by which a late record is still
news (one script in Redis keeps it). Finds no records itself; see :mod:`mpworker.results.shipper`.

A thread of the main process and no process of its own: it has nothing to do while Redis answers, since each child
writes what it has journaled itself, and it needs the application's own connection to Redis, with all of its options.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from celery import Celery, signals, states
from redis import exceptions as redis_errors

from mpworker.celery.backend import ResultBackend, refuses_scripts, storing_script
from mpworker.celery.connection import quick_client
from mpworker.errors import ConfigurationError, StoreError
from mpworker.results.journal import Flusher
from mpworker.results.record import SHIPPED, SUPERSEDED, TERMINAL, Record, describe
from mpworker.results.shipper import Pass, Refused, Shipper
from mpworker.settings import Settings

logger = logging.getLogger("mpworker.results")

#: Seconds between two looks, and for which a new record is left to its writer.
_PAUSE = _GRACE = 1.0
#: Seconds between two attempts while Redis refuses: at most, and the factor by which they grow.
_PAUSE_MAX, _GROWTH = 15.0, 2.0
#: Seconds that the end of a node may be held up by what is still to be brought.
_LAST_TRY = 2.0

#: Seconds that one exchange may take: nobody waits for it, and a large result takes its time.
_PATIENCE = 60.0
#: Seconds between two looks for files that are too old.
_DISCARD_EVERY = 3600.0

_SECONDS = """
local function seconds(text)
    local y, m, d, h, min, s, sign, oh, om =
        string.match(text, '^(%d+)-(%d+)-(%d+)[T ](%d+):(%d+):([%d.]+)([+-])(%d+):(%d+)$')
    if not y then
        return nil
    end
    y, m = tonumber(y), tonumber(m)
    if m < 3 then
        y, m = y - 1, m + 12
    end
    local days = 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400)
        + math.floor((153 * (m - 3) + 2) / 5) + d
    local offset = (oh * 60 + om) * (sign == '-' and -60 or 60)
    return ((days * 24 + h) * 60 + min) * 60 + s - offset
end
"""
#: ARGV[3], ARGV[4]: the record's time and its state. Returns also 2: a newer end was there.
_RULE = """
    if ARGV[4] ~= 'SUCCESS' then
        if status == 'FAILURE' or status == 'REVOKED' then
            local done = meta['date_done']
            local ended, late = type(done) == 'string' and seconds(done), seconds(ARGV[3])
            if not ended or not late or ended >= late then
                return 2
            end
        elseif ARGV[4] == 'STARTED' and (status == 'STARTED' or status == 'RETRY' or status == 'PROGRESS') then
            return 2
        end
    end
"""
_DELIVER = storing_script(_RULE, _SECONDS)
_DIGITS = {1: SHIPPED, 2: SHIPPED, 0: SUPERSEDED}


class Delivery:
    """Brings records to the Redis of a result backend, many with one exchange."""

    def __init__(self, backend: ResultBackend) -> None:
        self._backend = backend
        self._client = quick_client(backend, _PATIENCE)
        self._script = self._client.register_script(_DELIVER)

    def __call__(self, records: Sequence[Record]) -> list[bytes]:
        """See :data:`mpworker.results.shipper.Deliver`.

        Raises:
            redis.exceptions.RedisError: Redis is away or refuses; some of them may have been stored.
        """
        results = [record for record in records if not record.chord]
        digits = iter(self._results(results))
        return [self._own(self._part, record) if record.chord else next(digits) for record in records]

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
        with self._client.pipeline(transaction=False) as pipe:
            for record in records:
                keys, noted = self._backend.noted(record)
                args = [record.payload, _to_live(record), record.timestamp, record.status, *noted]
                self._script(keys=keys, args=args, client=pipe)
            replies = list(pipe.execute(raise_on_error=False))
        refused = next((reply for reply in replies if isinstance(reply, redis_errors.NoPermissionError)), None)
        return self._by_script(records) if refused and self._backend.give_up_history(refused) else replies

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
        if isinstance(reply, Exception):
            raise reply
        return _DIGITS.get(reply) or self._plainly(record)

    def _plainly(self, record: Record) -> bytes:
        """In three steps, for payloads that are no JSON and servers that refuse scripts."""
        old = self._client.get(record.key)
        if old and old not in (record.payload, str(record.payload).encode()):
            meta = self._backend.decode_known(old)
            status = meta.get("status")
            if status == states.SUCCESS:
                return SUPERSEDED
            ended = status in TERMINAL and not _is_before(meta.get("date_done"), record)
            if record.status != states.SUCCESS and (ended or (record.status == states.STARTED and status)):
                return SHIPPED
        with self._client.pipeline() as pipe:
            pipe.set(record.key, record.payload, px=_to_live(record) or None)
            pipe.publish(record.key, record.payload)
            pipe.execute()
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

    def knows(self, folder: str) -> bool:
        """Whether this Redis still holds what it was brought from that folder. One that was emptied has forgotten."""
        try:
            return not folder or bool(self._client.exists(self._mark(folder)))
        except redis_errors.ResponseError:  # a key that we may not use
            return True

    def remember(self, folder: str) -> None:
        """From now on :meth:`knows` it."""
        if folder:
            with suppress(redis_errors.ResponseError):
                self._client.set(self._mark(folder), 1)

    def _mark(self, folder: str) -> Any:
        """A key that is there for as long as Redis forgets nothing, named as groups are: others may be forbidden."""
        return self._backend.get_key_for_group(f"mpworker-journal-{folder}")

    def server(self) -> str:
        """Which run of which server this is; empty where it does not say."""
        try:
            return str(self._client.info("server").get("run_id", ""))
        except redis_errors.ResponseError:
            return ""


def _is_before(done: Any, record: Record) -> bool:
    try:
        moment = datetime.fromisoformat(done)
    except (TypeError, ValueError):
        return False
    return moment.tzinfo is not None and moment.timestamp() < record.when


def _to_live(record: Record) -> int:
    """Milliseconds; 0 for ever."""
    left = record.expires_in()
    return 0 if math.isinf(left) else max(1, int(left * 1000))


def ship(app: Celery, folder: Path, again: bool = False, any_store: bool = False) -> Pass | None:
    """Delivers what a node has left in its journal folder; ``None`` if another does it now.

    Args:
        again: also what had been delivered, as far as it has not expired.
        any_store: also what was meant for another result backend, which may be this one under another name.

    Raises:
        ConfigurationError: there is no such folder, or no Redis result backend.
        StoreError: the folder cannot be locked or read, or Redis does not take what is in it.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"there is no journal folder {folder}")
    backend = backend_of(app)
    part_grace = _part_grace(app)
    shipper = Shipper(folder, Delivery(backend), 0.0, part_grace, None if any_store else backend.store_name)
    with shipper.lock() as alone:
        if not alone:
            return None
        try:
            found = shipper.run(again)
        except Refused as exc:
            raise StoreError(f"not all of {folder} could be delivered: {exc}") from exc
    if found.problem:
        raise StoreError(found.problem)
    return found


def _part_grace(app: Celery) -> float:
    """Seconds for which Celery may hold the claim to a chord whose last part it has counted, and not said so."""
    return max(5.0, 2 * float(app.conf.result_chord_join_timeout or 5.0)) + 2.0


def backend_of(app: Celery) -> ResultBackend:
    backend = app.backend
    if not isinstance(backend, ResultBackend):
        raise ConfigurationError("the result backend is none that keeps a journal: use mpworker+redis://host:6379/0")
    return backend


def start_with(app: Celery, settings: Settings, flusher: Flusher | None = None) -> None:
    """Has the node of this process ship and flush its journal from when it is ready until it ends."""
    shipping = Shipping(app, settings)

    def begin(sender: Any, **_: Any) -> None:
        if sender.app is app and shipping.ident is None:
            shipping.start()
            if flusher is not None:
                flusher.start()

    def end(sender: Any, **_: Any) -> None:
        if sender.app is app:
            signals.worker_ready.disconnect(begin)
            signals.worker_shutdown.disconnect(end)
            shipping.end()
            if flusher is not None:
                flusher.end()

    signals.worker_ready.connect(begin, weak=False)
    signals.worker_shutdown.connect(end, weak=False)


class Shipping(threading.Thread):
    """Looks again and again for what its node has not brought to Redis."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        super().__init__(name="mpworker-shipper", daemon=True)
        self._app, self._folder = app, settings.journal_dir
        self._kept = settings.journal_days, settings.journal_mib << 20
        self._end = threading.Event()
        self._wait, self._refused = _PAUSE, False
        self._server = self._problem = ""
        self._delivery: Delivery | None = None
        self._discard_at = 0.0

    def run(self) -> None:
        while not self._end.wait(self._wait):
            self._look(_GRACE)
        self._look(0.0)  # nobody writes any more

    def end(self) -> None:
        """Tries once more, then lets the node go."""
        self._end.set()
        if self.ident is not None:
            self.join(_LAST_TRY)

    def _look(self, grace: float) -> None:
        if not self._folder.is_dir():  # somebody has removed it; the next record makes it anew
            return
        try:
            backend = backend_of(self._app)
            delivery = self._delivery = self._delivery or Delivery(backend)
            shipper = Shipper(self._folder, delivery, grace, _part_grace(self._app), backend.store_name)
            with shipper.lock() as alone:
                delivered = self._ship(shipper, delivery) if alone else 0
        except (redis_errors.RedisError, OSError, StoreError) as exc:
            self._server = ""  # who answers next may be another
            if not self._refused:
                logger.warning("results wait in the journal %s until Redis takes them: %s", self._folder, describe(exc))
            self._refused = True
            self._wait = min(self._wait * _GROWTH, _PAUSE_MAX) * random.uniform(0.7, 1.0)
            return
        except Exception:
            logger.exception("the shipper failed; it tries again")
            self._wait = _PAUSE_MAX
            return
        if delivered:
            logger.info("Redis has been brought %d results that it did not have", delivered)
        self._wait, self._refused = _PAUSE, False

    def _ship(self, shipper: Shipper, delivery: Delivery) -> int:
        folder, is_new = shipper.name()
        forgotten = not is_new and not delivery.knows(folder)
        # The same run of a server that has forgotten everything: somebody wanted that.
        lost = forgotten and not (self._server and delivery.server() == self._server)
        found = shipper.run(again=lost)
        if is_new or forgotten:
            delivery.remember(folder)
        if forgotten or not self._server:
            self._server = delivery.server()
        if found.problem != self._problem:
            self._problem = found.problem
            if found.problem:
                logger.error("mpworker_journal: %s; what is in there is not shipped", found.problem)
        if time.monotonic() > self._discard_at:
            self._discard_at = time.monotonic() + _DISCARD_EVERY
            for path in shipper.discard(*self._kept):
                logger.info(
                    "%s is removed: it is older than journals are kept here, or there is too much of them", path
                )
        return found.delivered
