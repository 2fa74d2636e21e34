"""Parcels: what can travel arrives as it was; what cannot says so, by name."""

from __future__ import annotations

import functools
import pickle
import signal
import threading
import tracemalloc
from collections.abc import Callable

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st

from mpworker.errors import PayloadError, RemoteError, RemoteTraceback, TaskCancelled, TimeLimitExceeded, WorkerLost
from mpworker.pool import parcel
from mpworker.pool.parcel import Outcome
from mpworker.states import JobState

VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:
        return caught


@given(VALUE)
def test_a_value_arrives(value: object) -> None:
    assert parcel.open_outcome(*parcel.pack_outcome(value)) == (True, value)
    assert parcel.unpack(parcel.pack(value, "it"), "it") == value


@given(st.lists(VALUE, max_size=3), st.dictionaries(st.text(), VALUE, max_size=3))
def test_a_call_arrives(args: list[object], kwargs: dict[str, object]) -> None:
    packed = parcel.pack_call(support.add, tuple(args), kwargs)
    assert parcel.open_call(packed) == (support.add, tuple(args), kwargs)


@pytest.mark.parametrize(
    "exc", [ValueError("a", 1), KeyError("k"), OSError(2, "no"), SystemExit(3), KeyboardInterrupt()]
)
def test_an_exception_arrives_with_its_traceback(exc: BaseException) -> None:
    succeeded, arrived = parcel.open_outcome(Outcome.ERROR, parcel.pack_error(raised(exc)))
    assert not succeeded
    assert (type(arrived), arrived.args) == (type(exc), exc.args)
    assert isinstance(arrived.__cause__, RemoteTraceback)
    assert "in raised" in str(arrived.__cause__)


def test_the_text_keeps_the_chain_and_the_notes() -> None:
    exc = raised(ValueError("outer"))
    exc.__cause__ = raised(KeyError("inner"))
    exc.add_note("a note")
    text = str(parcel.unpack_error(parcel.pack_error(exc)).__cause__)
    assert "KeyError: 'inner'" in text
    assert "a note" in text


class Local(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()


class Liar(Exception):
    """Comes back as something else."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, ("not even an exception",)


class Mute(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    def __reduce__(self) -> str:
        raise TypeError("no")


@pytest.mark.parametrize(
    ("exc", "name", "text"),
    [
        (support.TwoArguments(1, 2), "support.TwoArguments", "1/2"),
        (support.Frozen(3), "support.Frozen", ""),
        (Local(), f"{__name__}.Local", ""),
        (Liar("text"), f"{__name__}.Liar", "text"),
        (Mute(), f"{__name__}.Mute", "<str() of it raised ZeroDivisionError>"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_that_cannot_travel_arrives_as_its_text(exc: Exception, name: str, text: str) -> None:
    error = parcel.unpack_error(parcel.pack_error(raised(exc)))
    assert isinstance(error, RemoteError)
    assert error.type_name == name
    assert text in error.text
    assert isinstance(error.__cause__, RemoteTraceback)


@pytest.mark.parametrize("how", ["error", "exit"])
def test_what_fails_on_the_way_becomes_the_tasks_error(how: str) -> None:
    body = parcel.pack(support.Unwilling("load", how), "it")
    succeeded, error = parcel.open_outcome(Outcome.VALUE, body)
    assert not succeeded
    assert isinstance(error, PayloadError)
    assert "the result cannot be unpickled here, as its worker sent it: " in str(error)
    assert "damaged" not in str(error)


def test_an_unpicklable_result_is_named() -> None:
    flag, body = parcel.pack_outcome(threading.Lock())
    succeeded, error = parcel.open_outcome(flag, body)
    assert not succeeded
    assert isinstance(error, PayloadError)
    assert "lock, cannot be pickled" in str(error)


@pytest.mark.parametrize("how", ["error", "exit"])
def test_a_result_that_fails_to_be_pickled_is_the_tasks_error(how: str) -> None:
    succeeded, error = parcel.open_outcome(*parcel.pack_outcome(support.Unwilling("dump", how)))
    assert not succeeded
    assert isinstance(error, PayloadError)
    assert "support.Unwilling, cannot be pickled" in str(error)


def test_a_result_nested_too_deeply_is_an_error_like_any_other() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    flag, body = parcel.pack_outcome(deep)
    assert isinstance(parcel.open_outcome(flag, body)[1], PayloadError)


def peak_of(function: Callable[[], object]) -> int:
    """The most memory, in bytes, that a call has asked for."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_garbage(body: bytes) -> None:
    """Every reader of a parcel says what is wrong and whose it was, at once and without believing any length in it."""

    def read() -> None:
        for flag in (Outcome.VALUE, Outcome.ERROR, Outcome.VERDICT, 77):
            succeeded, error = parcel.open_outcome(flag, body)
            assert not succeeded
            if flag in (Outcome.VALUE, Outcome.ERROR):
                assert isinstance(error, PayloadError)
                assert "as its worker sent it" in str(error)
            else:
                assert isinstance(error, WorkerLost)
                assert "makes no sense" in str(error)
        with pytest.raises(PayloadError, match=r"^the thing of the parent cannot be unpickled: .* damaged"):
            parcel.unpack(body, "the thing of the parent")
        with pytest.raises(PayloadError):
            parcel.unpack_error(body)

    assert peak_of(read) < (4 << 20) + 20 * len(body)


def length(number: int, size: int = 8) -> bytes:
    return number.to_bytes(size, "little")


HOSTILE = {
    "nothing": b"",
    "a letter": b"x",
    "no value": b"\x80\x05.",
    "a value without its end": pickle.dumps(1)[:-1],
    "bytes, a TB of them": b"\x80\x05\x8e" + length(1 << 40) + b"x.",
    "bytes, a GB of them": b"\x80\x05\x8e" + length(1 << 30) + b"x.",
    "bytes, almost 4 GB of them": b"\x80\x05B" + length(2**32 - 1, 4) + b"x.",
    "a bytearray": b"\x80\x05\x96" + length(1 << 31) + b"x.",
    "text": b"\x80\x05\x8d" + length(1 << 33) + b"x.",
    "a number": b"\x80\x05\x8b" + length(2**31 - 1, 4) + b"x.",
    "a negative length": b"\x80\x05\x8b" + length(2**31 + 5, 4) + b"x.",
    "a frame": b"\x80\x05\x95" + length(1 << 40) + b"x.",
    "the place of a memo": b"\x80\x05Nr" + length(1 << 25, 4) + b".",
    "a protocol of the future": b"\x80\x63N.",
    "marks without end": b"\x80\x05" + b"(" * 100_000 + b".",
    "a deep tuple": b"\x80\x05N" + b"\x85" * 300_000 + b".",
    "a deep verdict": b"[" * 100_000,
    "half a verdict": b'{"state": "lost"',
    "a verdict without a state": b"{}",
    "a state that there is not": b'{"state": "well"}',
    "a list for a verdict": b"[1]",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_garbage_is_an_error_that_names_its_sender_and_reserves_nothing(body: bytes) -> None:
    check_garbage(body)


@given(VALUE, st.data())
def test_a_parcel_that_lacks_its_end_is_never_unpickled(value: object, data: st.DataObject) -> None:
    body = parcel.pack(value, "it")
    check_garbage(body[: data.draw(st.integers(0, len(body) - 1))])


@given(VALUE, st.lists(st.integers(0), min_size=1, max_size=3, unique=True))
def test_a_parcel_with_wrong_bits_is_never_unpickled(value: object, bits: list[int]) -> None:
    body = bytearray(parcel.pack((value, support.Frozen(3)), "it"))
    for bit in {bit % (len(body) * 8) for bit in bits}:
        body[bit // 8] ^= 1 << bit % 8
    check_garbage(bytes(body))


@given(VALUE, st.binary(min_size=1, max_size=200), st.integers(0))
def test_a_parcel_with_something_foreign_inside_is_never_unpickled(value: object, foreign: bytes, at: int) -> None:
    """As if a task had written to a descriptor that is not its own."""
    body = parcel.pack(value, "it")
    at %= len(body) + 1
    check_garbage(body[:at] + foreign + body[at:])


@pytest.mark.parametrize("value", [None, b"x" * 100_000, support.give])
def test_a_parcel_is_read_as_any_pickle_by_whoever_does_not_check_it(value: object) -> None:
    assert pickle.loads(parcel.pack(value, "it")) == value


def test_an_unpicklable_call_names_its_function() -> None:
    with pytest.raises(PayloadError, match=r"^the call of support.give cannot be pickled: TypeError: .*lock"):
        parcel.pack_call(support.give, (threading.Lock(),), {})
    with pytest.raises(PayloadError, match=r"^the call of .*<lambda> cannot be pickled"):
        parcel.pack_call(lambda: 1, (), {})
    with pytest.raises(PayloadError, match=r"^the thing cannot be pickled"):
        parcel.pack(threading.Lock(), "the thing")


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (support.give, "support.give"),
        (functools.partial(functools.partial(support.give, 1), 2), "support.give"),
        (len, "len"),
        (support.Unwilling, "support.Unwilling"),
        (support.Unwilling("dump"), "Unwilling"),
        (support.Signpost.set, "support.Signpost.set"),
    ],
)
def test_names(thing: object, name: str) -> None:
    assert parcel.name_of(thing).removeprefix("mpworker.") == name


def test_verdicts() -> None:
    def error_of(state: JobState, **facts: object) -> BaseException:
        body = parcel.pack_verdict(state, **facts)
        assert parcel.open_verdict(body)[0] is state
        succeeded, error = parcel.open_outcome(Outcome.VERDICT, body)
        assert not succeeded
        return error

    expired = error_of(JobState.TIMED_OUT, limit=2.5, stack="line 7")
    assert isinstance(expired, TimeLimitExceeded)
    assert expired.limit == 2.5
    assert "line 7" in str(expired.__cause__)
    assert error_of(JobState.TIMED_OUT, limit=2.5, stack="").__cause__ is None
    lost = error_of(JobState.LOST, pid=7, exitcode=None, signal=signal.SIGKILL, max_rss=2**20, by_pool=False, why="so")
    assert isinstance(lost, WorkerLost)
    assert (lost.pid, lost.exitcode, lost.signal, lost.max_rss) == (7, None, signal.SIGKILL, 2**20)
    assert str(lost).endswith("; so")
    assert isinstance(error_of(JobState.CANCELLED, reason="why"), TaskCancelled)
