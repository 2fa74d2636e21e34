"""What is in journals is brought to Redis, however long that takes: by a node's shipper, and from a dead one's folder.

Owns when a node's shipper looks, and how long it waits while Redis refuses. Finds no records itself: that is
:mod:`mpworker.results.shipper`. What a late record may replace, :mod:`mpworker.celery.scripts` says.

A process of its own where the pool keeps one running, so that who runs tasks need not wait for Redis; with other pools
a thread, for what their processes could not bring themselves.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery, signals, states
from redis import exceptions as redis_errors

from mpworker.celery import child, progress
from mpworker.celery.backend import ResultBackend, hang_bell, rings_a_bell
from mpworker.celery.connection import quick_client
from mpworker.celery.scripts import DELIVER, HISTORY_REFUSED, refuses_scripts
from mpworker.errors import ConfigurationError, StoreError
from mpworker.results.bell import BROKEN, UNREADABLE, Bell
from mpworker.results.journal import Flusher, Journal
from mpworker.results.record import SHIPPED, SUPERSEDED, TERMINAL, Record, describe
from mpworker.results.shipper import Pass, Refused, Shipper, Witness
from mpworker.settings import Settings

logger = logging.getLogger("mpworker.results")

#: Seconds between two looks, and for which a new record is left to its writer.
_PAUSE = _GRACE = 1.0
#: Seconds that one who ships by hand waits for a node that ships, too: it takes a moment each time.
_TURN = 2.0
#: Seconds between two attempts to take the place of a shipper that was killed, and to have a file to oneself.
_SOON, _MOMENT = 0.01, 0.005
#: Seconds between two attempts while Redis refuses: at most, and the factor by which they grow.
_PAUSE_MAX, _GROWTH = 15.0, 2.0
#: The same while it does not even answer: to find out costs little, and new results wait for it.
_AWAY_MAX = 2.0
#: Seconds that the end of a node may be held up by what is still to be brought.
_LAST_TRY = 4.0

#: So many results at once are a burst: then who runs tasks goes first, and the next ones gather for so many seconds.
_BURST, _LINGER = 100, 0.005
#: Seconds that one exchange may take: nobody waits for it, and a large result takes its time.
_PATIENCE = 60.0
#: Seconds between two looks for files that are too old.
_DISCARD_EVERY = 3600.0

#: Seconds after which one who brings much looks for what is new.
_SLICE = 0.5
#: Seconds for which somebody may still be connected to the server that another has taken the place of.
_WARY = 15.0

_DIGITS = {1: SHIPPED, 2: SHIPPED, HISTORY_REFUSED: SHIPPED, 0: SUPERSEDED}
#: Seconds after which a start, which says nothing of its time in Redis, is no news where something else is known.
_LATE = 2.0
#: Records that one script stores: others want to be served in between.
_AT_ONCE = 50


class Delivery:
    """Brings records to the Redis of a result backend, many with one exchange."""

    def __init__(self, backend: ResultBackend) -> None:
        self._backend = backend
        self._client = quick_client(backend, _PATIENCE).client()  # with one connection, which is kept
        self._script = self._client.register_script(DELIVER)
        #: the run of the server that all goes to; empty: not known
        self.server = ""
        #: when it is looked once more whether all has gone there, by ``time.monotonic()``
        self.recheck_at = 0.0
        #: who is at the other end now has yet to be asked
        self.is_doubtful = True
        self._client.connection.register_connect_callback(self._on_connect)

    def __call__(self, records: Sequence[Record]) -> list[bytes]:
        """See :data:`mpworker.results.shipper.Deliver`.

        Raises:
            redis.exceptions.RedisError: Redis is away or refuses; some of them may have been stored.
        """
        self._connect()
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
        """Runs the script for each of these keys and arguments, straight over the connection: the layers above it take
        longer than all the rest. They are taken when something is wrong with the one or the other."""
        connection = self._client.connection
        try:
            connection.send_packed_command([_packed(self._script.sha, *call) for call in calls])
            replies = [_reply(connection) for _ in calls]
        except redis_errors.ConnectionError:
            replies = [redis_errors.NoScriptError()]
        if any(isinstance(reply, redis_errors.NoScriptError) for reply in replies):
            return [self._script(keys=keys, args=args) for keys, args in calls]
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
        old = self._client.get(record.key)
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

    def _connect(self) -> None:
        """If need be. Left to itself a connection that is lost goes to where it was, and never asks Sentinel again."""
        self._client.connection.connect()

    def _on_connect(self, _: Any) -> None:
        self.is_doubtful = True

    def ask_server(self) -> str:
        """Which run of which server this is; empty where it does not say."""
        self.is_doubtful = False
        try:
            return str(self._client.info("server").get("run_id", ""))
        except redis_errors.ResponseError:
            return ""

    def ask_token(self, folder: str) -> str | None:
        """The last one that it was given for that folder; empty: none. ``None``: it does not say."""
        self._connect()
        try:
            token = self._client.get(self._mark(folder)) or b""
            return token if isinstance(token, str) else token.decode("ascii", "replace")
        except redis_errors.NoPermissionError:
            return None

    def give_token(self, folder: str) -> Witness:
        """Has Redis note that it has been brought something from that folder; after that."""
        token = secrets.token_hex(8)
        try:
            self._client.set(self._mark(folder), token)
        except redis_errors.NoPermissionError:
            token = ""
        return Witness(self.server, token)

    def _mark(self, folder: str) -> Any:
        """A key that is there for as long as Redis forgets nothing, named as groups are: others may be forbidden."""
        return self._backend.get_key_for_group(f"mpworker-journal-{folder}")


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


def _packed(sha: str, keys: Sequence[Any], args: Sequence[Any]) -> bytes:
    """The command as it is sent."""
    words = [b"EVALSHA", sha, len(keys), *keys, *args]
    encoded = [word if type(word) is bytes else str(word).encode() for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded])


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis_errors.ConnectionError:
        raise
    except redis_errors.ResponseError as exc:  # the replies to the other calls are still to come
        return exc


def _rule_of(record: Record) -> tuple[int, str, str]:
    return _to_live(record), record.timestamp, "LATE" if _is_late_start(record) else record.status


def _is_late_start(record: Record) -> bool:
    return record.status == states.STARTED and record.when < time.time() - _LATE


def _to_live(record: Record) -> int:
    """Milliseconds; 0 for ever."""
    left = record.expires_in()
    return 0 if math.isinf(left) else max(1, int(left * 1000))


def _deliver_all(shipper: Shipper, delivery: Delivery, wary: float = 0.0, patience: float = math.inf) -> Pass:
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
    end = time.monotonic() + _TURN
    try:
        delivery = Delivery(backend)
        shipper = Shipper(folder, delivery, 0.0, part_grace, None if any_store else backend.store_name)
        if again:
            shipper.doubt(everything=True)
        deliver = shipper.run if any_store else partial(_deliver_all, shipper, delivery)
        found = deliver()
        while found.busy and time.monotonic() < end:
            time.sleep(_MOMENT)
            more = deliver()
            found = more._replace(delivered=found.delivered + more.delivered)
    except (Refused, redis_errors.RedisError) as exc:
        reason = exc if isinstance(exc, Refused) else describe(exc)
        raise StoreError(f"not all of {folder} could be delivered: {reason}") from exc
    if found.busy and not found.delivered:
        return None
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


def start_with(app: Celery, settings: Settings, node: str, flusher: Flusher | None = None) -> None:
    """Has the node of this process ship and flush its journal from when it is ready until it ends.

    A pool that keeps the shipper's process running has given the node a bell by then; for others a thread does it.
    """
    shipping = Shipping(app, settings, node)
    thread = threading.Thread(target=shipping.repeat, name="mpworker-shipper", daemon=True)

    def begin(sender: Any, **_: Any) -> None:
        if sender.app is app and thread.ident is None:
            if not rings_a_bell():
                thread.start()
            if flusher is not None:
                flusher.start()

    def end(sender: Any, **_: Any) -> None:
        if sender.app is app:
            signals.worker_ready.disconnect(begin)
            signals.worker_shutdown.disconnect(end)
            shipping.ends.set()
            if thread.ident is None:
                thread.start()
            thread.join(_LAST_TRY)
            if flusher is not None:
                flusher.end()

    signals.worker_ready.connect(begin, weak=False)
    signals.worker_shutdown.connect(end, weak=False)


def make_bell() -> Bell | None:
    """What this process and its children ring, if its node keeps a journal and the system has such a thing."""
    with suppress(OSError):
        bell = Bell()
        if hang_bell(bell):
            return bell
        bell.close()
    return None


def take_down(bell: Bell) -> None:
    """Nobody rings it any more."""
    hang_bell(None)
    bell.close()


def serve(settings: Settings, hostname: str, bell: Bell, until: int) -> None:
    """What the shipper's process does: brings records to Redis as soon as they are in the node's journal.

    Args:
        settings: the application's.
        hostname: the node's name.
        bell: that writers ring.
        until: a descriptor; returns when it is readable.
    """
    app = child.enter_service(hostname)
    Shipping(app, settings, hostname).follow(bell, until)


class Shipping:
    """Looks again and again for what a node has not brought to Redis.

    Args:
        node: its name.
    """

    def __init__(self, app: Celery, settings: Settings, node: str) -> None:
        self.ends = threading.Event()
        self._app, self._folder = app, settings.journal_dir
        self._journal = Journal(self._folder, node)
        self._kept = settings.journal_days, settings.journal_mib << 20
        self._wait, self._refused = _PAUSE, False
        self._problem = ""
        self._delivery: Delivery | None = None
        self._shipper: Shipper | None = None
        self._discard_at = 0.0
        self._follows = False
        #: the last look has left something for the next one
        self._is_cut = False
        self._bell: Bell | None = None

    def repeat(self) -> None:
        """Looks about once a second until the node ends, and once more: for nodes where each process writes to Redis
        what it can."""
        while not self.ends.wait(0.0 if self._is_cut else self._wait):
            self._look(_GRACE)
        self._look(0.0)  # nobody writes any more

    def follow(self, bell: Bell, until: int) -> None:
        """Delivers at once what the node's own processes have written, and looks about once a second for the rest.

        Args:
            until: a descriptor; returns when it is readable.
        """
        self._follows, self._bell = True, bell
        look_at, rung, poll = 0.0, bell.fileno(), select.poll()
        poll.register(until, select.POLLIN)
        while not bell.listen():  # the one before this has yet to disappear
            if poll.poll(1000 * _SOON):
                return
        while True:
            poll.register(rung, 0 if self._refused else select.POLLIN)
            ready = [fd for fd, _ in poll.poll(1000 * max(0.0, look_at - time.monotonic()))]
            if until in ready:
                self._look(0.0)  # nobody writes any more
                return
            if rung in ready:
                bell.quiet()
                delivered = self._attempt(partial(self._catch_up, bell))
                if self._refused:
                    look_at = time.monotonic() + self._wait
                elif delivered and delivered >= _BURST:
                    time.sleep(_LINGER)
            if time.monotonic() >= look_at:
                self._look(_GRACE)
                look_at = time.monotonic() + (0.0 if self._is_cut else self._wait)

    def _look(self, grace: float) -> None:
        if not self._folder.is_dir():  # somebody has removed it; the next record makes it anew
            return
        late = self._refused or not self._follows or self._shipper is None
        delivered = self._attempt(partial(self._look_everywhere, grace))
        if delivered and late:
            logger.info("Redis has been brought %d results that it did not have", delivered)

    def _attempt(self, do: Callable[[], int]) -> int | None:
        """Returns what that does; ``None`` if it failed, and is better tried again later."""
        try:
            delivered = do()
        except (redis_errors.RedisError, OSError, StoreError) as exc:
            if self._delivery is not None:
                self._delivery.is_doubtful = True  # who answers next may be another
            if not self._refused:
                logger.warning("results wait in the journal %s until Redis takes them: %s", self._folder, describe(exc))
            self._refused = True
            most = _PAUSE_MAX if isinstance(exc.__cause__ or exc, redis_errors.ResponseError) else _AWAY_MAX
            self._wait = min(self._wait * _GROWTH, most) * random.uniform(0.7, 1.0)
            return None
        except Exception:
            logger.exception("the shipper failed; it tries again")
            self._wait, self._refused = _PAUSE_MAX, True
            return None
        self._wait, self._refused = _PAUSE, False
        return delivered

    def _catch_up(self, bell: Bell) -> int:
        """What has been appended to the node's own file since the last look at it."""
        if self._shipper is None:
            return 0  # the folder has yet to be made
        found = self._shipper.follow(self._journal.path())
        if found.busy:  # another node's shipper is at it, or somebody ships by hand
            time.sleep(_MOMENT)
            bell.ring()
        return self._took(found)

    def _look_everywhere(self, grace: float) -> int:
        backend = backend_of(self._app)
        delivery = self._delivery = self._delivery or Delivery(backend)
        if self._shipper is None:
            self._shipper = Shipper(self._folder, delivery, 0.0, _part_grace(self._app), backend.store_name)
        self._shipper.grace = grace
        delivered = self._ship(self._shipper, delivery, _SLICE if grace else math.inf)
        return delivered + (self._took(self._shipper.follow(self._journal.path())) if self._follows else 0)

    def _ship(self, shipper: Shipper, delivery: Delivery, patience: float) -> int:
        self._is_cut = False
        found = _deliver_all(shipper, delivery, _WARY, patience)
        self._is_cut = found.cut > 0
        if found.problem != self._problem:
            self._problem = found.problem
            if found.problem:
                logger.error("mpworker_journal: %s; what is in there is not shipped", found.problem)
                self._count(UNREADABLE)
        if time.monotonic() > self._discard_at:
            self._discard_at = time.monotonic() + _DISCARD_EVERY
            for path in shipper.discard(*self._kept):
                logger.info(
                    "%s is removed: it is older than journals are kept here, or there is too much of them", path
                )
        return self._took(found)

    def _took(self, found: Pass) -> int:
        if found.broken:
            logger.warning("mpworker_journal: %d broken lines in %s are passed over", found.broken, self._folder)
            self._count(BROKEN, found.broken)
        return found.delivered

    def _count(self, what: str, number: int = 1) -> None:
        if self._bell is not None:
            self._bell.count(what, number)
