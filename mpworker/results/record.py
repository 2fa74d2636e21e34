"""One result is one JSON line: what stands in it, and the two ways between the line and a :class:`Record`.

Owns the field names, the format's version, the wording of messages and the spelling of states.
Never opens a file, never talks to Redis.

A line opens with ``{"v": 1, "shipped": 0, `` and goes on as compact JSON. Those spaces are deliberate: the compact
encoder writes none, and inside a string every quote is escaped, so this opening can stand nowhere else. That gives two
things: the digit after ``shipped`` has a known place and is overwritten with one byte once Redis has the result, and a
reader that meets half a line with a whole one glued to it (its writer was killed) finds the whole one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import field

VERSION = 1
#: What every line of every version opens with; only a line's opening contains it.
OPENING = b'{"v": '
_HEAD = f'{{"v": {VERSION}, "shipped": '
#: The opening of a line of this version, up to the digit of ``shipped``.
OPENING_LINE = _HEAD.encode()
#: Where in a line the digit of ``shipped`` stands, in bytes from its start.
SHIPPED_AT = len(_HEAD)
#: The digit: Redis has not got it; Redis has it; Redis held a SUCCESS already, which nothing may overwrite; Redis has
#: not got it, and its writer is about to bring it there.
UNSHIPPED, SHIPPED, SUPERSEDED, IN_HAND = b"0", b"1", b"2", b"3"

#: Characters of a message in a summary.
_SUMMARY = 200
#: Seconds by which a run may tell what it does after another run of that task has told its end.
_HESITATION = 1.0

_ALIASES = {
    "SUCCESS": "complete completed done finished ok succeed succeeded successful",
    "FAILURE": "error errored fail failed",
    "STARTED": "active in_progress processing running start",
    "PENDING": "queued wait waiting",
    "RETRY": "retried retrying",
    "REVOKED": "cancel canceled cancelled revoke terminated",
}
_CANONICAL = {alias: state for state, aliases in _ALIASES.items() for alias in aliases.split()}
#: States that are no longer left by themselves; the last four are not Celery's but common in free text.
TERMINAL = frozenset(
    {"SUCCESS", "FAILURE", "REVOKED", "REJECTED", "IGNORED", "TIMEOUT", "TIMED_OUT", "LOST", "CRASHED"}
)


_packed = msgspec.json.Encoder().encode
#: Words of JSON that stand for what it has no words for.
_UNUSUAL = ("NaN", "Infinity", "__type__")


def _compact(fields: dict[str, Any]) -> bytes:
    """Compact JSON, of ASCII only, so that what is looked for in lines has one spelling."""
    try:
        text = _packed(fields)
        if text.isascii():
            return text
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass  # half a surrogate pair, a number without end
    result = fields["result"]
    result = json.loads(bytes(result) if type(result) is msgspec.Raw else _encode_any(result))
    return _encode(fields | {"result": result}).encode()


@lru_cache(1024)
def canonical(status: str) -> str:
    """The state that a status text means: ``failed`` → ``FAILURE``, ``ok`` → ``SUCCESS``; other text in capitals."""
    text = status.strip()
    key = text.lower().replace("-", "_").replace(" ", "_")
    return _CANONICAL.get(key) or key.upper()


def aliases(state: str) -> list[str]:
    """The texts that mean a canonical state, in small letters, with the signs that may part their words."""
    words = [state.lower(), *_ALIASES.get(state, "").split()]
    return [variant for word in words for variant in sorted({word, word.replace("_", " "), word.replace("_", "-")})]


def timestamp_now() -> str:
    """ISO 8601 in UTC with microseconds, always of one length."""
    return timestamp_of(datetime.now(UTC))


def timestamp_of(moment: datetime) -> str:
    """The same of a moment in UTC."""
    return moment.isoformat(timespec="microseconds")


def describe(exc: object) -> str:
    """``ValueError: text``; only ``ValueError`` where the exception says nothing."""
    name = type(exc).__qualname__
    try:
        text = str(exc)
    except Exception as broken:  # user code: an exception that cannot even be printed is still reported
        text = f"<its text cannot be shown: {type(broken).__name__}>"
    return f"{name}: {text}" if text else name


def store_name(url: str) -> str:
    """A short name of the result backend at a URL; no password can be told from it if none is in the URL."""
    return hashlib.blake2b(url.encode(), digest_size=6).hexdigest()


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as broken:  # user code again
        return f"<{type(value).__qualname__}, whose repr raised {type(broken).__name__}>"


_encode = json.JSONEncoder(separators=(",", ":"), default=_safe_repr, allow_nan=False).encode


def _encode_any(value: Any) -> str:
    """JSON of a value; what JSON cannot hold becomes its repr: a part where that is possible, else the whole."""
    try:
        return _encode(value)
    except (TypeError, ValueError, RecursionError):
        return _encode(_safe_repr(value))


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One state change of one task. Also reads like a mapping: ``record["status"]``, ``record.get("name")``."""

    task_id: str
    #: the task's name; ``None`` where the writer did not know it
    name: str | None = None
    #: one of Celery's states, or the free text given to ``ResultStore.add_result``
    status: str
    #: for people: ``ValueError: text`` of a failure, else what the writer had to say
    message: str = ""
    #: any JSON value
    result: Any = None
    traceback: str | None = None
    #: ISO 8601, UTC
    timestamp: str = field(default_factory=timestamp_now)
    #: seconds
    runtime: float | None = None
    #: seconds that the task waited before it began; ``None`` where that is not known
    queued: float | None = None
    process_id: int = field(default_factory=os.getpid)
    hostname: str = field(default_factory=socket.gethostname)
    #: how many retries preceded this run
    retries: int = 0
    #: the Redis key; ``None`` when the record is not meant for Redis
    key: str | None = None
    #: which result backend that is, as :func:`store_name` says it; lines of others do not mention it
    store: str | None = None
    #: exactly what Redis stores under the key
    payload: str | bytes | None = None
    #: seconds that Redis keeps it, counted from :attr:`timestamp`; ``None``: for ever
    expires: int | None = None
    #: the last of what the task printed and logged; ``None`` where that is not kept, or nothing
    log: str | None = None
    #: Redis has the result, or needs it no more
    shipped: bool = False
    #: Redis held a SUCCESS of this task already, so this record was not written there and counts for nothing
    superseded: bool = False
    #: its message has killed too many workers and is kept as dead; lines of others do not mention it
    dead: bool = False
    #: no change of state: the task has yet to be counted as a part of a chord, as :attr:`payload` says
    chord: bool = False

    #: Redis has not got it, and its writer was about to bring it there
    in_hand: bool = False

    def to_line(self) -> bytes:
        """The line with its newline. Never fails on a result: what JSON cannot hold becomes a repr."""
        mark = SUPERSEDED if self.superseded else SHIPPED if self.shipped else IN_HAND if self.in_hand else UNSHIPPED
        more: dict[str, Any] = {}
        if isinstance(self.payload, bytes):
            more["payload64"] = base64.b64encode(self.payload).decode("ascii")
        else:
            more["payload"] = self.payload
        more["expires"] = self.expires
        if self.store is not None:
            more["store"] = self.store
        for name in ("dead", "chord"):
            if getattr(self, name):
                more[name] = True
        if self.log is not None:
            more["log"] = self.log
        # What is in a payload of JSON has no need of a repr; then the quick encoder says the same as the careful one.
        payload = self.payload
        plain = isinstance(payload, str) and not any(word in payload for word in _UNUSUAL)
        return self._line(mark, self.message, self.result, self.traceback, more, plain)

    def summary(self) -> bytes:
        """A short line for those who only list and count."""
        return self._line(SHIPPED, self.message[:_SUMMARY], None, None, {"payload": None})

    def _line(
        self, mark: bytes, message: str, result: Any, traceback: str | None, more: dict[str, Any], plain: bool = False
    ) -> bytes:
        fields = {
            "task_id": self.task_id,
            "name": self.name,
            "status": self.status,
            "message": message,
            "result": result if result is None or plain else msgspec.Raw(_encode_any(result).encode()),
            "traceback": traceback,
            "timestamp": self.timestamp,
            "runtime": None if self.runtime is None else round(self.runtime, 6),
            **({} if self.queued is None else {"queued": round(self.queued, 6)}),
            "process_id": self.process_id,
            "hostname": self.hostname,
            "retries": self.retries,
            "key": self.key,
            **more,
        }
        return b"%b%b, %b\n" % (OPENING_LINE, mark, _compact(fields)[1:])

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Reads a line; unknown fields are passed over, absent ones get their defaults.

        Raises:
            ValueError: the line is torn, is no JSON object, or lacks ``task_id`` or ``status``.
        """
        try:
            return _decoder.decode(line).record()
        except msgspec.MsgspecError:
            pass  # torn, or with values of other kinds, or numbers that are none: as much as can be read is
        data = json.loads(line)
        if not isinstance(data, dict):
            raise ValueError("a journal line must be a JSON object")
        for name in ("task_id", "status", "timestamp"):
            if not isinstance(data.get(name), str):
                raise ValueError(f"a journal line needs {name} as text")
        known = {name: value for name, value in data.items() if value is not None}
        for name in ("dead", "chord"):
            known[name] = known.get(name) is True
        return msgspec.convert(known, _Line, strict=False).record()

    @property
    def when(self) -> float:
        """:attr:`timestamp` in seconds since the epoch; 0.0 where it is none."""
        try:
            return datetime.fromisoformat(self.timestamp).timestamp()
        except ValueError:
            return 0.0

    def expires_in(self) -> float:
        """Seconds for which Redis shall keep it from now on, infinite where it shall for ever."""
        return math.inf if self.expires is None else self.when + self.expires - time.time()

    @property
    def response_data(self) -> Any:
        """The result, by the name that ``ResultStore.add_result`` gives it."""
        return self.result

    def keys(self) -> Iterator[str]:
        return iter(self.__struct_fields__)

    def __getitem__(self, name: str) -> Any:
        if name not in _READABLE:
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in _READABLE else default


def displaces(new: Record, old: Record) -> bool:
    """Whether of two records of one task, the first one written later, that one tells what is true now.

    Not if it is about an earlier run: a task may be retried, and even have ended, before the process that asked for
    that has said so. A run that begins well after an end is another one. Nothing displaces a SUCCESS.
    """
    if old.status == "SUCCESS" or new.status in TERMINAL:
        return old.status != "SUCCESS"
    if old.status in TERMINAL:
        if new.retries > old.retries:
            return True
        may_be_late = new.status == "RETRY" and new.retries < old.retries
        return not may_be_late and new.when > old.when + _HESITATION
    return (new.retries, new.status == "RETRY") >= (old.retries, old.status == "RETRY")


_MARKS = frozenset({"shipped", "superseded", "in_hand"})
_NAMES = frozenset(Record.__struct_fields__) - _MARKS
_READABLE = _NAMES | _MARKS | {"response_data"}


class Glance(msgspec.Struct, gc=False):
    """What of a line tells what has become of its task; fields as :class:`Record`'s."""

    task_id: str
    status: str
    timestamp: str
    shipped: int = 0
    name: str | None = None
    message: str = ""
    runtime: float | None = None
    queued: float | None = None
    hostname: str = ""
    retries: int = 0
    key: str | None = None
    chord: bool = False

    @property
    def superseded(self) -> bool:
        return self.shipped == int(SUPERSEDED)

    @classmethod
    def at(cls, record: Record) -> Glance:
        mark = int(SUPERSEDED) if record.superseded else int(record.shipped)
        names = (name for name in Glance.__struct_fields__ if name != "shipped")
        return Glance(shipped=mark, **{name: getattr(record, name) for name in names})


class _Line(Glance):
    """A whole line, as it is written here."""

    result: Any = None
    traceback: str | None = None
    process_id: int = 0
    store: str | None = None
    payload: str | None = None
    payload64: str | None = None
    expires: int | None = None
    log: str | None = None
    dead: bool = False

    def record(self) -> Record:
        mark = self.shipped
        return Record(
            task_id=self.task_id,
            name=self.name,
            status=self.status,
            message=self.message,
            result=self.result,
            traceback=self.traceback,
            timestamp=self.timestamp,
            runtime=self.runtime,
            queued=self.queued,
            process_id=self.process_id,
            hostname=self.hostname,
            retries=self.retries,
            key=self.key,
            store=self.store,
            payload=self.payload if self.payload64 is None else base64.b64decode(self.payload64),
            expires=self.expires,
            log=self.log,
            shipped=mark in (1, 2),
            superseded=mark == 2,
            dead=self.dead,
            chord=self.chord,
            in_hand=mark == 3,
        )


_decoder = msgspec.json.Decoder(_Line)

#: The task that this thread runs: its id, when it began by the monotonic clock, how long it had waited, and whether it
#: is its node's only one.
_running: ContextVar[tuple[str, float, float | None, bool] | None] = ContextVar("mpworker_running", default=None)


def task_begins(task_id: str, at: float | None = None, queued: float | None = None, alone: bool = False) -> None:
    """Notes that this thread starts a task, so that its record can tell the run time.

    Args:
        at: seconds of the monotonic clock; default now.
        queued: seconds that it had waited, if that is known.
        alone: its node had no other one when it was taken.
    """
    _running.set((task_id, time.monotonic() if at is None else at, queued, alone))


def task_ends() -> None:
    """Forgets what :func:`task_begins` noted."""
    _running.set(None)


def runtime_of(task_id: str) -> float | None:
    """Seconds since the task began, if it is the one that this thread runs; else ``None``."""
    running = _running.get()
    return time.monotonic() - running[1] if running and running[0] == task_id else None


def queueing_of(task_id: str) -> float | None:
    """Seconds that a task had waited before it began, if it is the one that this thread runs; else ``None``."""
    running = _running.get()
    return running[2] if running and running[0] == task_id else None


def is_alone(task_id: str) -> bool:
    """Whether this thread runs that task, and its node had no other one when it was taken."""
    running = _running.get()
    return running is not None and running[0] == task_id and running[3]
