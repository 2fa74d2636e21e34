"""A chunk of a map: several items that travel as one task, and how a worker runs them.

Owns what crosses the line, and the one rule that no item runs twice: an item is taken out of the chunk's list by the
step of an iterator, which nothing can divide, and a chunk is cut by emptying that list, which nothing can divide
either. So each item is either the chunk's own or belongs to whoever cuts. Starts no thread; the parent's side is in
:mod:`mpworker.pool.mapping`.

Limits hold for each item. A chunk that has run for a moment is cut by the watchdog: what it has not begun is the
parent's again, and the one item that may run from then on gets limits of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from itertools import chain
from math import inf
from sys import getsizeof
from types import NoneType
from typing import TYPE_CHECKING, Any

from mpworker.pool.coroutines import settle
from mpworker.pool.frames import Kind, encode
from mpworker.pool.parcel import Outcome, name_of, open_sealed, pack, pack_call, pack_error, pack_outcome

if TYPE_CHECKING:
    from mpworker.pool.worker import Current, Worker

#: Seconds between two looks at a chunk. If both see the same item it is long, and the chunk is cut.
LOOK = 0.008
#: So it is after so many seconds, if they see different ones …
LONG = 0.04
#: … and if it has not ended so many seconds later, it is told.
MOMENT = 0.004
#: The most items of a chunk, and the bytes that a chunk of several may have, or its results before it cuts itself.
MOST = 1 << 15
MOST_BYTES = 1 << 18
MOST_RESULTS = 1 << 20
#: What may be pickled together with its neighbours, as may tuples of these: nobody's code runs, nothing can change.
_NUMBERS = frozenset({int, float, bool, NoneType})
_TEXTS = frozenset({str, bytes})
_PLAIN = _NUMBERS | _TEXTS

#: A plain value, or a list of one parcel.
Entry = Any
#: What is known of a chunk: results, whether parcels are among them, the packed error of the item behind them (or
#: nothing), how many items were its own, how many of these have ended, and the seconds until then.
Report = tuple[list[Entry], bool, bytes, int, int, float]


class Shape(IntEnum):
    """What an item is."""

    #: the argument
    ONE = 0
    #: the arguments
    ROW = 1
    #: the arguments, packed: each item travels by itself, and one that cannot be unpacked is nobody else's concern
    PARCEL = 2


# -- what travels ----------------------------------------------------------------------------------------------------


def pack_chunks(
    fn: Callable[..., Any], iterables: tuple[Iterable[Any], ...], workers: int
) -> Iterator[tuple[bytes, int]]:
    """Reads the iterables to their end and yields packed calls, each with the number of its items.

    Raises:
        PayloadError: the function or an item cannot be pickled.
    """
    alone = len(iterables) == 1
    rows: Any = iterables[0] if alone else list(zip(*iterables, strict=False))
    if type(rows) not in (range, list, tuple):
        rows = list(rows)
    if not rows:
        return
    what = f"the call of {name_of(fn)}"
    code = pack(fn, what)
    most = min(most_items(len(rows), workers), max(1, MOST // len(iterables)))
    for start in range(0, len(rows), most):
        part = rows[start : start + most]
        for shape, items in _shaped(part, what, Shape.ONE if alone else Shape.ROW):
            yield pack_chunk(code, shape, items), len(items)


def most_items(count: int, workers: int) -> int:
    """How many of so many items may be in a chunk, so that each worker gets several."""
    return max(1, count // (4 * workers))


def pack_chunk(code: bytes, shape: int, items: Sequence[Any]) -> bytes:
    """The call that runs these items. Several are in no descriptor, which may be closed when they are divided."""
    arguments = (code, int(shape), items)
    return pack_call(run_chunk, arguments, {}) if len(items) == 1 else pack((run_chunk, arguments, {}), "a chunk")


def _shaped(items: Sequence[Any], what: str, shape: Shape) -> Iterator[tuple[Shape, Sequence[Any]]]:
    kinds = set(map(type, items)) if type(items) is not range else {int}
    inner = set(map(type, chain.from_iterable(items))) if kinds == {tuple} else kinds
    if inner <= _NUMBERS:
        yield shape, items
    elif inner <= _PLAIN:
        weigh = _length if kinds <= _TEXTS else _size if inner is kinds else _size_of_rows
        yield from ((shape, part) for part in _light(items, weigh))
    else:
        parcels: list[bytes] = []
        weight = 0
        for item in items:
            parcel = pack(item if shape is Shape.ROW else (item,), what)
            if parcels and weight + len(parcel) > MOST_BYTES:
                yield Shape.PARCEL, parcels
                parcels, weight = [], 0
            parcels.append(parcel)
            weight += len(parcel)
        yield Shape.PARCEL, parcels


def _light(items: Sequence[Any], weigh: Callable[[Sequence[Any]], int]) -> Iterator[Sequence[Any]]:
    """Parts that are not too heavy, or consist of one item."""
    if len(items) == 1 or weigh(items) <= MOST_BYTES:
        yield items
    else:
        middle = len(items) // 2
        yield from _light(items[:middle], weigh)
        yield from _light(items[middle:], weigh)


def _length(items: Sequence[Any]) -> int:
    return sum(map(len, items))


def _size(items: Sequence[Any]) -> int:
    return sum(map(getsizeof, items))


def _size_of_rows(rows: Sequence[Any]) -> int:
    return sum(map(getsizeof, chain.from_iterable(rows)))


# -- the worker ------------------------------------------------------------------------------------------------------


class Run:
    """A chunk in its worker. The watchdog calls :meth:`look` and :meth:`word`; all else is the task thread's.

    Args:
        call: takes an item.
    """

    def __init__(self, worker: Worker, call: Callable[[Any], Any], items: list[Any]) -> None:
        self._worker, self._call, self._items = worker, call, items
        self._size = len(items)
        self._stream = iter(items)
        self._entries: list[Entry] = []  # one for each item that has ended
        self._failed = -1  # the first that has failed, and what it has raised
        self._error = b""
        self._weight = 0
        self._has_parcels = False
        self._began = time.monotonic()
        self._is_cut = False
        self._seen, self._seen_at = 0, 0.0  # items that had begun at the last look
        #: when the watchdog shall look
        self.due = self._began + LOOK

    def run(self) -> None:
        """Runs the items; whatever one raises is its own. Those behind it run all the same, as single tasks would."""
        worker, stream, call, append, keep = self._worker, self._stream, self._call, self._entries.append, self._keep
        numbers = _NUMBERS
        while True:
            try:
                worker.heed()
                for item in stream:
                    value = call(item)
                    append(value if type(value) in numbers else keep(value))
                worker._interruptible = False  # at once: a call in between might be interrupted itself
                return
            except BaseException as exc:
                worker._interruptible = False
                self._note(exc)

    def report(self) -> Report:
        """What is known now."""
        entries, taken = self._entries[:], self.taken()
        done = len(entries)
        if self._failed >= 0:
            del entries[self._failed :]
        return entries, self._has_parcels, self._error, taken, done, time.monotonic() - self._began

    def taken(self) -> int:
        """How many items have begun: the position of the iterator, which it keeps although the list is empty."""
        state: Any = self._stream.__reduce__()
        return int(state[2]) if len(state) == 3 else len(self._entries)  # at its end: all that have begun have ended

    def cut(self) -> None:
        """From here on no further item begins. Items have no finalizers: they are plain values or parcels."""
        self._items.clear()

    def look(self, current: Current, now: float) -> bool:
        """From the watchdog, which holds the gate: it is time.

        Returns:
            whether to tell.
        """
        if not self._is_cut:
            taken = self.taken()
            is_stuck = taken == self._seen > 0
            if not is_stuck:
                self._seen, self._seen_at = taken, now
                if now < self._began + LONG:
                    self.due = now + LOOK
                    return False
            self.cut()
            self._is_cut = True
            # No other item will run from now on: these limits are its own.
            current.soft_at = self._seen_at + current.soft if current.soft else inf
            current.hard_at = self._seen_at + current.hard if current.hard else inf
            self.due = min(now + MOMENT, current.hard_at)
            if not is_stuck:
                return False
        self.due = inf
        return self.taken() < self._size or bool(self._entries)

    def word(self, job: int) -> bytes:
        """The CUT frame. What is in it was packed before, or is plain: no code of the user's runs here."""
        return encode(Kind.CUT, job, body=pack_outcome(self.report(), within=True)[1])

    def _keep(self, value: Any) -> Entry:
        """A result as it can wait and travel with others."""
        kind = type(value)
        if kind in _TEXTS:
            entry, weight = value, len(value)
        elif kind is tuple and _NUMBERS.issuperset(map(type, value)):
            return value
        else:
            flag, body = pack_outcome(settle(value), within=True)
            if flag == Outcome.ERROR:
                self._fail(body)
                return None
            entry, weight, self._has_parcels = [body], len(body), True
        self._weight += weight
        if self._weight > MOST_RESULTS:
            self.cut()
        return entry

    def _note(self, exc: BaseException) -> None:
        if self.taken() == len(self._entries):
            return  # an interruption that has come too late for the item that it was meant for
        trace = exc.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # our frames are nobody's business
        if trace is not None:
            exc.with_traceback(trace)
        self._fail(pack_error(exc))
        self._entries.append(None)

    def _fail(self, body: bytes) -> None:
        if self._failed < 0:
            self._error, self._failed = body, len(self._entries)


_run: Run | None = None
_forks_are_watched = False


def run_chunk(code: bytes, shape: int, items: Sequence[Any]) -> Report:
    """The task. Runs in a worker."""
    from mpworker.pool.worker import task_worker  # here: the parent needs none of it

    global _run
    worker = task_worker()
    assert worker is not None
    unpack = partial(worker.unpack, read=open_sealed)
    fn = unpack(code)
    calls: tuple[Callable[[Any], Any], ...] = fn, lambda row: fn(*row), lambda parcel: fn(*unpack(parcel))
    _watch_forks()
    _run = run = Run(worker, calls[shape], list(items))
    several = len(items) > 1  # a single one has the limits of its task
    try:
        if several:
            worker.begin_chunk(run)
        run.run()
    finally:
        if several and _run is run:  # else this is a fork, and the lock may be held by nobody who is here
            worker.end_chunk()
        _run = None
    return run.report()


def _watch_forks() -> None:
    global _forks_are_watched
    if not _forks_are_watched:
        _forks_are_watched = True
        os.register_at_fork(after_in_child=_disown)


def _disown() -> None:
    """An item has forked: its child may come back out of it, and must not run what is left."""
    global _run
    if _run is not None:
        _run.cut()
        _run = None
