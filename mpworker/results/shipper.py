"""The shipper: delivers what a journal holds and Redis does not, in order, as often as it takes.

Owns the search for unshipped records, the checkpoint of how far all is settled, and the lock by which two never ship
the same file. Knows no Redis and no Celery: a function that it is given delivers. Never drops a record: what cannot
be delivered stays where it is, marked as it was.

Of each task only one record of a batch is delivered, in general its last: what came before it, Redis would hold for an
instant. A batch is bounded, so memory is, however long an outage lasts. Delivered twice does no harm, so a crash at any
point is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from mpworker.errors import StoreError
from mpworker.results.glance import pieces
from mpworker.results.journal import Journal, mark_at_offset
from mpworker.results.reader import Entry, Tally, read_entries, read_line, read_lines, read_open
from mpworker.results.record import SHIPPED, SHIPPED_AT, SUPERSEDED, Record, describe, displaces, timestamp_of

#: Delivers records in this order; returns the digit to mark each with. Raises whatever it likes when it cannot.
Deliver = Callable[[Sequence[Record]], Sequence[bytes]]

#: Records of one batch, and the bytes of their lines at which it is full all the same.
_MOST, _BULK = 500, 4 << 20
#: Bytes of a file's first line that tell it from another; they hold a task's id and state.
_HEAD = 160
#: A record that is so young is not looked at more closely.
_RECENT = timedelta(seconds=60)
#: Seconds between two attempts to have a file to oneself.
_MOMENT = 0.001


class Pass(NamedTuple):
    """What one look at a folder has found.

    Attributes:
        delivered: records that were not shipped and now are, or are needed no more.
        young: records that are perhaps being shipped by their writer.
        others: records that are meant for another result backend.
        problem: what is wrong with a file, in words; the other files are done all the same.
        broken: lines that are none, and passed over.
        busy: files that another one ships at this moment.
        cut: files of which there is more than time was given for.
    """

    delivered: int
    young: int = 0
    others: int = 0
    problem: str = ""
    broken: int = 0
    busy: int = 0
    cut: int = 0


class Witness(NamedTuple):
    """What the receiver said of itself when all that is settled was there.

    Attributes:
        server: which run of which server that was; empty where it does not say.
        token: that it was given then. One that shows another has forgotten, or is another.
    """

    server: str = ""
    token: str = ""


class Refused(StoreError):
    """What delivers has failed; its error is the cause."""


class Shipper:
    """Delivers the unshipped records of a journal folder.

    Args:
        folder: of a node, of several, or of one that is dead.
        deliver: see :data:`Deliver`.
        grace: seconds for which a record that its writer ships as well is left to it.
        part_grace: the same for parts of chords.
        store: deliver only what is meant for that result backend, or says of none; ``None``: everything.
    """

    def __init__(
        self,
        folder: Path,
        deliver: Deliver,
        grace: float = 0.0,
        part_grace: float = 0.0,
        store: str | None = None,
    ) -> None:
        self.folder, self._deliver, self._store = Path(folder), deliver, store
        self.grace, self._part_grace = grace, part_grace
        self._checkpoint = self.folder / f".shipped{f'-{store}' if store else ''}.json"
        self._settled: dict[str, tuple[str, int]] = {}
        #: what the checkpoint says of it, and which file that is
        self._kept: dict[str, tuple[str, int]] = {}
        self._kept_at: tuple[int, int] | None = None
        #: … and who stands for it
        self.witness = Witness()
        #: files of which what is shipped is to be delivered once more
        self._doubted: set[str] = set()
        self._everything = False
        #: when :meth:`run` shall come to an end, by ``time.monotonic()``
        self._until = math.inf
        self._name = ""
        self._followed: _Followed | None = None

    def close(self) -> None:
        """Closes what :meth:`follow` has opened."""
        if self._followed is not None:
            self._followed.close()
            self._followed = None

    def name(self) -> tuple[str, bool]:
        """Of this folder, for ever; and whether it has just been given. Empty where nothing can be kept in it."""
        self._refresh()
        if self._name:
            return self._name, False
        self._name = secrets.token_hex(8)
        self._write_checkpoint(first=True)
        self._settled = self._read_checkpoint()  # and the name: it may be another one's, or could not be kept
        return self._name, True

    def doubt(self, everything: bool) -> None:
        """From here on :meth:`run` also delivers what had been shipped, each file once: Redis may have lost it.

        Args:
            everything: and not only what was settled since :meth:`keep`. Who doubts that already goes on to.
        """
        everything = self._everything = everything or (self._everything and self.has_doubts)
        self._doubted.clear()
        self._refresh()
        self._settled = {} if everything else dict(self._kept)
        self._doubted = {path.name for path in Journal.files(self.folder)}

    @property
    def has_doubts(self) -> bool:
        """Some of that has yet to be delivered."""
        return bool(self._doubted)

    def run(self, patience: float = math.inf) -> Pass:
        """Delivers what is unshipped now, oldest first.

        Args:
            patience: seconds after which no further batch is begun; the next run goes on there.

        Raises:
            Refused: ``deliver`` has raised something; what it had not delivered is found again by the next run.
        """
        self._refresh()
        self._until = time.monotonic() + patience
        try:
            return self._run()
        finally:
            self._until = math.inf

    def _run(self) -> Pass:
        found, paths = Pass(0), Journal.files(self.folder)
        self._doubted &= {path.name for path in paths}
        for path in paths:
            try:
                more = self._run_file(path, path.name in self._doubted)
            except FileNotFoundError:
                continue  # rotated away meanwhile
            except Refused:
                raise
            except OSError as exc:
                found = found._replace(problem=f"cannot read {path}: {exc.strerror or exc}")
                continue
            if not (more.busy or more.cut):
                self._doubted.discard(path.name)
            found = _sum(found, more)
        return found

    @property
    def has_news(self) -> bool:
        """More is settled than the checkpoint says."""
        return self._settled != self._kept

    def keep(self, witness: Witness) -> None:
        """Writes the checkpoint: from here on :meth:`run` begins where all was settled.

        Args:
            witness: who was asked after that.
        """
        self.witness = witness
        self._write_checkpoint()

    def _run_file(self, path: Path, again: bool) -> Pass:
        fd = _open(path)
        try:
            return self._run_open(fd, path, again)
        finally:
            os.close(fd)

    def _run_open(self, fd: int, path: Path, again: bool) -> Pass:
        with _locked(fd) as alone:
            return self._run_locked(fd, path, again) if alone else Pass(0, busy=1)

    def _run_locked(self, fd: int, path: Path, again: bool) -> Pass:
        status = os.fstat(fd)
        identity, end = _identity(fd, status.st_ino), status.st_size
        known, start = self._settled.get(path.name, (identity, 0))
        if known != identity or start > end:  # another file, or cut off: from the beginning
            start = 0
        if start == end:
            return Pass(0)

        def settle(offset: int) -> None:
            self._settled[path.name] = identity, offset

        tally = Tally(end=start)
        with open(fd, "rb", closefd=False) as file:
            entries = read_open(file, path, tally, start, unshipped=not again)
            found = self._ship_all(fd, entries, tally, again, settle)
        return found if not found.young else found._replace(broken=0)  # they are counted when they are read again

    def _ship_all(
        self,
        fd: int,
        entries: Iterable[Entry],
        tally: Tally,
        again: bool = False,
        settle: Callable[[int], None] = lambda _: None,
    ) -> Pass:
        """Delivers in batches what is due of these; says how far all is settled."""
        delivered = young = others = bulk = 0
        batch: list[Entry] = []
        for entry in entries:
            record = entry.record
            if record.superseded or (record.shipped and (record.chord or not again)):
                continue
            if self._store is not None and record.store not in (None, self._store):
                others += not record.shipped
                continue
            if not record.shipped and self._is_young(record):
                young += 1
                if young == 1:
                    settle(batch[0].offset if batch else entry.offset)
                continue
            batch.append(entry)
            bulk += tally.end - entry.offset
            if len(batch) >= _MOST or bulk >= _BULK:
                delivered += self._ship(fd, batch)
                batch, bulk = [], 0
                if not young:
                    settle(tally.end)
                if time.monotonic() > self._until:
                    return Pass(delivered, young, others, broken=tally.torn, cut=1)
        delivered += self._ship(fd, batch)
        if not young:
            settle(tally.end)
        return Pass(delivered, young, others, broken=tally.torn)

    def follow(self, path: Path) -> Pass:
        """Delivers what has been appended to one file since it was read last. Leaves the checkpoint to :meth:`run`, and
        what is too young now. Somebody waits for it: it does no more than it must.

        Raises:
            Refused: as :meth:`run`.
        """
        found, followed = Pass(0), self._followed
        try:
            end = None if followed is None else followed.size(path)
            if followed is not None and end is None:  # another day, or it was removed
                found = self._follow_on(followed, os.fstat(followed.fd).st_size)
                self.close()
            if followed is None or end is None:
                followed = self._followed = _Followed(path, self._start(path))
                end = os.fstat(followed.fd).st_size
            return _sum(found, self._follow_on(followed, end))
        except Refused:
            raise
        except OSError:
            return found  # :meth:`run` tells what is wrong with it

    def _follow_on(self, followed: _Followed, end: int) -> Pass:
        if followed.at > end:  # it was cut off
            followed.at = 0
        if followed.at == end:
            return Pass(0)
        found, most = Pass(0), _BULK
        with _locked(followed.fd) as alone:
            if not alone:
                return Pass(0, busy=1)
            while (start := followed.at) < end:
                text = os.pread(followed.fd, min(end - start, most), start)
                tally = Tally(end=start)
                entries = read_lines(BytesIO(text), followed.path, tally, start, unshipped=True)
                found = _sum(found, self._ship_all(followed.fd, entries, tally))
                followed.at = tally.end
                if tally.end == start:
                    if not text or start + len(text) >= end:
                        break  # the rest of a line has yet to be written
                    most *= 2  # a long one
        return found

    def backlog(self) -> tuple[int, float, int]:
        """How many records wait for Redis, when the first of them was written (seconds since the epoch), and how many
        broken lines are among what has been written since all was settled."""
        self._settled, tally, times = self._read_checkpoint(), Tally(), []
        for path in Journal.files(self.folder):
            with contextlib.suppress(OSError), path.open("rb") as file:
                for entry in read_open(file, path, tally, self._start(path), unshipped=True):
                    record = entry.record
                    ours = self._store is None or record.store in (None, self._store)
                    if ours and not record.shipped and not _needless(record):
                        times.append(record.when)
        return len(times), min(times, default=0.0), tally.torn

    # -- one task ------------------------------------------------------------------------------------------------

    def pending(self, task_id: str) -> list[Entry]:
        """The records of a task that Redis has not got, in order; what a full look would deliver."""
        self._settled = self._read_checkpoint()
        needle = b'"task_id":%b,' % json.dumps(task_id).encode()
        found: list[Entry] = []
        for path in Journal.files(self.folder):
            with contextlib.suppress(OSError):  # gone meanwhile
                for buffer, size, offset in pieces(path, self._start(path)):
                    at = buffer.find(needle, 0, size)
                    while at >= 0:
                        begin, end = buffer.rfind(b"\n", 0, at) + 1, (buffer.find(b"\n", at, size) + 1) or size
                        found += read_line(bytes(buffer[begin:end]), path, offset + begin, Tally())
                        at = buffer.find(needle, end, size)
        return [entry for entry in found if entry.record.task_id == task_id and not entry.record.shipped]

    def _start(self, path: Path) -> int:
        """From where on not all of a file is settled."""
        with path.open("rb") as file:
            known, start = self._settled.get(path.name, ("", 0))
            return start if known == _identity(file.fileno(), os.fstat(file.fileno()).st_ino) else 0

    def forget(self, task_id: str, patience: float) -> None:
        """Has nothing delivered of a task any more, of what is written by now.

        Args:
            patience: seconds that a delivery may take which has begun.
        """
        left, end = self.pending(task_id), time.monotonic() + patience
        while left:
            busy = []
            for entry in left:
                fd = _open(entry.path)
                try:
                    with _locked(fd) as alone:
                        if alone or time.monotonic() > end:
                            mark_at_offset(fd, entry.offset, SHIPPED)
                        else:
                            busy.append(entry)
                finally:
                    os.close(fd)
            if left := busy:
                time.sleep(_MOMENT)

    def _is_young(self, record: Record) -> bool:
        grace = self._part_grace if record.chord else self.grace if record.in_hand else 0.0
        return grace > 0 and 0 <= time.time() - record.when < grace

    def _ship(self, fd: int, batch: Sequence[Entry]) -> int:
        """Delivers a batch: of each task the record that tells what is true now."""
        last: dict[tuple[str, bool], Entry] = {}
        for entry in batch:
            task = entry.record.task_id, entry.record.chord
            if task not in last or displaces(entry.record, last[task].record):
                last[task] = entry
        due = [entry for entry in batch if last[entry.record.task_id, entry.record.chord] is entry]
        recent = timestamp_of(datetime.now(UTC) - _RECENT)
        due = [entry for entry in due if not _needless(entry.record, recent)]
        try:
            digits = dict(zip((entry.offset for entry in due), self._deliver([e.record for e in due]), strict=True))
        except Exception as exc:
            raise Refused(describe(exc)) from exc
        for entry in batch:
            counted = last[entry.record.task_id, entry.record.chord]
            digit = digits.get(entry.offset, SHIPPED)
            # A second SUCCESS may be the one that Redis holds: at least one of them has to count.
            if entry.offset > counted.offset and counted.record.status == "SUCCESS" != entry.record.status:
                digit = SUPERSEDED
            mark_at_offset(fd, entry.offset, digit)
        return len(batch)

    def discard(self, days: int, most: int, today: date | None = None) -> list[Path]:
        """Removes old files in which nothing is unshipped, never one of today.

        Args:
            days: for which they are kept; 0: for ever.
            most: bytes that all of them may take; 0: any number.
        """
        today = today or datetime.now(UTC).date()
        files = [(path, _day_of(path), path.stat().st_size) for path in Journal.files(self.folder)]
        total, gone = sum(size for *_, size in files), []
        for path, day, size in files:
            is_old = bool(days) and day is not None and (today - day).days > days
            if day is None or day >= today or not (is_old or (most and total > most)):
                continue
            fd = _open(path)
            try:
                with _locked(fd) as alone:
                    if alone and all(entry.record.shipped for entry in read_entries([path], unshipped=True)):
                        path.unlink()
                        total -= size
                        gone.append(path)
            finally:
                os.close(fd)
        return gone

    # -- how far all is settled ----------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Takes over what another shipper has settled meanwhile; what this one has is known better than the file."""
        if not self._doubted and (stamp := self._stamp()) != self._kept_at:
            self._kept_at, self._settled = stamp, self._read_checkpoint()
            self._kept = dict(self._settled)

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._checkpoint)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _read_checkpoint(self) -> dict[str, tuple[str, int]]:
        try:
            found = json.loads(self._checkpoint.read_bytes())
            self._name = str(found.get("name", ""))
            self.witness = Witness(str(found.get("server", "")), str(found.get("token", "")))
            return {str(name): (str(known), int(end)) for name, (known, end) in found["files"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self._name, self.witness = "", Witness()
            return {}  # none yet, or broken: everything is looked at again

    def _write_checkpoint(self, first: bool = False) -> None:
        names = {path.name for path in Journal.files(self.folder)}
        files = {name: place for name, place in self._settled.items() if name in names}
        path = self._checkpoint
        fresh = path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk, a folder to read only: the next run looks at more than needed
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with open(fd, "w") as file:
                json.dump({"name": self._name, **self.witness._asdict(), "files": files}, file)
            if first and path.exists():  # by another one who was quicker
                fresh.unlink()
            else:
                fresh.replace(path)
            self._kept_at, self._kept = self._stamp(), dict(self._settled)


def _sum(one: Pass, two: Pass) -> Pass:
    return Pass(
        one.delivered + two.delivered,
        one.young + two.young,
        one.others + two.others,
        one.problem or two.problem,
        one.broken + two.broken,
        one.busy + two.busy,
        one.cut + two.cut,
    )


def _day_of(path: Path) -> date | None:
    try:
        return date.fromisoformat(path.stem[-10:])
    except ValueError:
        return None


def _identity(fd: int, inode: int) -> str:
    """Which file that is, also where a new one has been given the inode of one that was deleted."""
    head = os.pread(fd, _HEAD, 0)
    return f"{inode}-{zlib.crc32(head[SHIPPED_AT + 1 :]) if len(head) == _HEAD else 0}"


def _needless(record: Record, recent: str = "9") -> bool:
    """It is not meant for Redis, or would have expired there by now; what came after ``recent`` has not."""
    if record.payload is None or (record.key is None and not record.chord):
        return True
    if record.expires is None or (record.timestamp > recent and record.expires > _RECENT.seconds):
        return False
    return record.expires_in() <= 0


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[bool]:
    """``True`` inside if nobody else ships this file."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:  # not by closing alone: a process that was forked meanwhile holds it, too
        fcntl.flock(fd, fcntl.LOCK_UN)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # what cannot be marked can still be delivered, if every time again
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _Followed:
    """A file that is kept open."""

    def __init__(self, path: Path, at: int) -> None:
        self.fd = _open(path)
        #: how far it has been read
        self.path, self.at = path, at
        status = os.fstat(self.fd)
        self._text, self._which = str(path), (status.st_dev, status.st_ino)

    def size(self, path: Path) -> int | None:
        """Of this file, if the path still leads to it."""
        try:
            status = os.stat(self._text)
        except FileNotFoundError:
            return None
        leads_here = self._which == (status.st_dev, status.st_ino) and (path is self.path or path == self.path)
        return status.st_size if leads_here else None

    def close(self) -> None:
        os.close(self.fd)
