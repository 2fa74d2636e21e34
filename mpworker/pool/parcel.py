"""Packs calls and their outcomes so that they always unpack.

Owns pickling, the round-trip check for exceptions and the wording when either fails. Never touches a pipe. Only bytes
that this node's own processes wrote are ever unpickled here; messages from a broker are not. A parcel ends with its
checksum: :mod:`pickle` reserves what a length says before it looks for the bytes, so damaged ones never get that far.
The bodies of calls and results are laid out by :mod:`mpworker.pool.bulk` when they are large.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from importlib import import_module
from pickle import HIGHEST_PROTOCOL as _PROTOCOL
from pickle import dumps, loads
from sys import modules
from types import BuiltinFunctionType, FunctionType
from typing import Any
from zlib import crc32

from mpworker.errors import (
    MemoryLimitExceeded,
    PayloadError,
    RemoteError,
    RemoteTraceback,
    TaskCancelled,
    TimeLimitExceeded,
    WorkerLost,
)
from mpworker.pool import bulk
from mpworker.pool.bulk import FIRST, Bulk
from mpworker.states import JobState

#: CRC-32 of whatever ends with its own CRC-32, the lowest byte first.
_SOUND = 0x2144DF1C
#: What is never large, what may be, and where else to look for it: in a few levels of what has little in it.
_SMALL = frozenset((int, float, bool, type(None), FunctionType, BuiltinFunctionType, type))
_STRINGS, _A_BIT = frozenset((bytes, bytearray, str)), 4096
_BOXES, _A_FEW, _LEVELS = frozenset((tuple, list, dict)), 16, 3
_LARGE = 2


class Outcome(IntEnum):
    """How to read the body that carries an outcome."""

    #: a pickled value
    VALUE = 0
    #: an exception, packed by :func:`pack_error`
    ERROR = 1
    #: JSON written by the dispatcher, because no child lived to tell
    VERDICT = 2


_VALUE, _ERROR = Outcome.VALUE, Outcome.ERROR


def _seal(obj: Any) -> bytes:
    data = dumps(obj, _PROTOCOL)
    return data + crc32(data).to_bytes(4, "little")


def _seal_body(obj: Any, *values: Any) -> bytes:
    """As :func:`_seal`; what is large may come in a descriptor.

    Args:
        values: what is in ``obj``, as far as it may be large.
    """
    weight = _weigh(values, _LEVELS)
    if not weight:
        return _seal(obj)
    chunks, buffers = bulk.pickled(obj, weight == _LARGE)
    if buffers or len(chunks) > 1 or len(chunks[0]) >= bulk.LARGE:
        return bulk.lay_out(chunks, buffers)
    return chunks[0] + crc32(chunks[0]).to_bytes(4, "little")


def _weigh(values: Iterable[Any], levels: int) -> int:
    """0: all of these are small, _LARGE: one is a large string of bytes; else pickling them will tell."""
    weight = 0
    for value in values:
        kind = type(value)
        if kind in _SMALL:
            continue
        if kind in _STRINGS:
            if len(value) >= bulk.LARGE:
                return _LARGE
            if len(value) >= _A_BIT:  # of these there may be many
                weight = 1
        elif kind not in _BOXES or not levels or len(value) > _A_FEW:
            weight = 1
        elif value:
            weight = max(weight, _weigh(value.values() if kind is dict else value, levels - 1))
            if weight == _LARGE:
                break
    return weight


def open_sealed(data: bytes) -> Any:
    """What is in a parcel; raises whatever unpickling it raises.

    Raises:
        PayloadError: its bytes have been damaged; nothing of them was unpickled.
    """
    if type(data) is Bulk or data[:1] == FIRST:
        return bulk.load(data)
    if crc32(data) != _SOUND:
        raise _damaged(data)
    return loads(data)  # which ends before the checksum


def _damaged(data: bytes) -> PayloadError:
    return PayloadError(f"its {len(data)} bytes are damaged, the checksum is wrong")


def pack(obj: Any, what: str) -> bytes:
    """Pickles ``obj``.

    Args:
        what: the words that name it in the error.

    Raises:
        PayloadError: it cannot be pickled.
    """
    try:
        return _seal(obj)
    except Exception as exc:
        raise PayloadError(f"{what} cannot be pickled: {type(exc).__name__}: {exc}") from exc


def unpack(data: bytes, what: str) -> Any:
    """Unpickles what :func:`pack` wrote.

    Raises:
        PayloadError: it cannot be unpickled in this process.
    """
    try:
        return open_sealed(data)
    except Exception as exc:
        raise PayloadError(f"{what} cannot be unpickled: {type(exc).__name__}: {exc}") from exc


def name_of(fn: object) -> str:
    """A readable name for a callable or a class, for messages."""
    if own := getattr(fn, "task_name", None):
        return str(own)
    inner = getattr(fn, "func", None)
    if inner is not None and not hasattr(fn, "__qualname__"):  # functools.partial
        return name_of(inner)
    module, name = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if name is None:
        return type(fn).__qualname__
    return f"{module}.{name}" if module and module != "builtins" else str(name)


def pack_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
    """Packs a call; a failure names the function.

    Raises:
        PayloadError: the function or an argument cannot be pickled.
    """
    try:
        call: tuple[Any, ...] = fn, args, kwargs
        if type(fn) is FunctionType:
            module, name = fn.__module__, fn.__qualname__
            # As pickle does, which takes several times as long for it, here and in the worker.
            if getattr(modules.get(module), name, None) is fn:
                call = module, name, args, kwargs
        if not kwargs and type(fn) in _SMALL and _SMALL.issuperset(map(type, args)):
            return _seal(call)
        return _seal_body(call, *call)
    except Exception as exc:
        raise PayloadError(f"the call of {name_of(fn)} cannot be pickled: {type(exc).__name__}: {exc}") from exc


def open_call(data: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What :func:`pack_call` packed: function, arguments, keyword arguments; raises whatever unpickling them raises."""
    call = open_sealed(data)
    if len(call) == 3:
        return call  # type: ignore[no-any-return]
    module, name, args, kwargs = call
    home = modules.get(module)
    return getattr(home if home is not None else import_module(module), name), args, kwargs


def pack_error(exc: BaseException, text: str | None = None) -> bytes:
    """Packs an exception with its traceback's text, so that it arrives whatever its class does.

    An exception that does not survive a round trip here travels as type and text (the cure Celery found too).

    Args:
        text: the traceback, default the exception's own.
    """
    if text is None:
        text = "".join(traceback.format_exception(exc))
    try:
        inner = dumps(exc, _PROTOCOL)
        if type(loads(inner)) is not type(exc):
            inner = b""
    except BaseException:  # whatever __reduce__ or __init__ raise, sys.exit too: the text below tells the story
        inner = b""
    return _seal((name_of(type(exc)), _text_of(exc), text, inner))


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)
    except Exception as broken:
        return f"<str() of it raised {type(broken).__name__}>"


def unpack_error(body: bytes) -> BaseException:
    """The exception that :func:`pack_error` packed, with a :class:`RemoteTraceback` as its cause."""
    type_name, message, text, inner = open_sealed(body)
    exc: BaseException | None = None
    if inner:
        try:
            exc = loads(inner)
        except BaseException:  # the class exists only in the child, say, or unpickling it exits
            exc = None
    if not isinstance(exc, BaseException):
        exc = RemoteError(type_name, message)
    BaseException.__setattr__(exc, "__cause__", RemoteTraceback(text))  # also on a frozen dataclass
    return exc


def pack_outcome(value: Any, *, within: bool = False) -> tuple[Outcome, bytes]:
    """Packs a task's result; one that cannot be pickled becomes the task's error.

    Args:
        within: it will travel in another parcel, and so in no descriptor of its own.
    """
    try:
        return _VALUE, _seal(value) if within or type(value) in _SMALL else _seal_body(value, value)
    except BaseException as exc:  # also sys.exit in a __reduce__, which the task did not ask for
        error = PayloadError(f"the result, a {name_of(type(value))}, cannot be pickled: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        return Outcome.ERROR, pack_error(error)


def open_outcome(flag: int, body: bytes) -> tuple[bool, Any]:
    """What became of a job.

    Returns:
        ``(True, value)`` or ``(False, exception)``; never raises for what a child sent.
    """
    sent = "result"
    try:
        if flag == _VALUE:
            return True, open_sealed(body)
        if flag == _ERROR:
            sent = "error"
            return False, unpack_error(body)
    except BaseException as exc:  # what a child sent must not end the thread that reads it
        error = PayloadError(f"the {sent} cannot be unpickled here, as its worker sent it: {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        return False, error
    return False, verdict_error(open_verdict(body)[1])


def pack_verdict(state: JobState, **facts: Any) -> bytes:
    """What the dispatcher knows of a job that no child could report."""
    return json.dumps({"state": state.value, **facts}).encode()


def open_verdict(body: bytes) -> tuple[JobState, dict[str, Any]]:
    """Reads what :func:`pack_verdict` wrote; anything else means that nobody knows what has become of the job."""
    try:
        facts = json.loads(body)
        return JobState(facts["state"]), facts
    except (ValueError, KeyError, TypeError, RecursionError):
        facts = {"state": JobState.LOST.value, "by_pool": True, "why": "what was said of its end makes no sense"}
        return JobState.LOST, facts


def verdict_error(facts: Mapping[str, Any]) -> Exception:
    """The exception a verdict stands for."""
    state = facts["state"]
    if state == JobState.TIMED_OUT.value:
        expired = TimeLimitExceeded(facts.get("limit"))
        if facts.get("stack"):
            expired.__cause__ = RemoteTraceback(f"The task was here:\n{facts['stack']}")
        return expired
    if state == JobState.CANCELLED.value:
        return TaskCancelled(facts.get("reason", "the task was cancelled"))
    if state == JobState.FAILED.value:
        return MemoryLimitExceeded(facts.get("memory_limit"), facts.get("used"))
    known: dict[str, Any] = {key: facts.get(key) for key in ("pid", "exitcode", "signal", "max_rss", "rss", "runtime")}
    flags = {key: bool(facts.get(key)) for key in ("by_pool", "oom_killed")}
    return WorkerLost(**known, **flags, why=facts.get("why", ""))
