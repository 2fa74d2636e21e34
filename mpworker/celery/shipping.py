"""What is in journals is brought to Redis, however long that takes: by a node's shipper, and from a dead one's folder.

Owns when a node's shipper looks, and how long it waits while Redis refuses. Finds no records itself: that is
:mod:`mpworker.results.shipper`. How they get there is :mod:`mpworker.celery.delivery`'s.

A process of its own where the pool keeps one running, so that who runs tasks need not wait for Redis; with other pools
a thread, for what their processes could not bring themselves.
"""

from __future__ import annotations

import logging
import math
import random
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from celery import Celery, signals
from redis import exceptions as redis_errors

from mpworker.celery import child
from mpworker.celery.backend import ResultBackend, hang_bell, rings_a_bell
from mpworker.celery.delivery import Delivery, deliver_all
from mpworker.errors import ConfigurationError, StoreError
from mpworker.results.bell import BROKEN, UNREADABLE, Bell
from mpworker.results.journal import Flusher, Journal
from mpworker.results.record import describe
from mpworker.results.shipper import Pass, Refused, Shipper
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
#: Seconds between two looks for files that are too old.
_DISCARD_EVERY = 3600.0

#: Seconds after which one who brings much looks for what is new.
_SLICE = 0.5
#: Seconds for which somebody may still be connected to the server that another has taken the place of.
_WARY = 15.0


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
        deliver = shipper.run if any_store else partial(deliver_all, shipper, delivery)
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
        found = deliver_all(shipper, delivery, _WARY, patience)
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
