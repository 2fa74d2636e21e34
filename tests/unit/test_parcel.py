"""Parcels: what can travel arrives as it was; what cannot says so, by name."""

from __future__ import annotations

import functools
import pickle
import signal
import threading

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
    assert parcel.unpack(packed, "the call") == (support.add, tuple(args), kwargs)


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
    body = pickle.dumps(support.Unwilling("load", how))
    succeeded, error = parcel.open_outcome(Outcome.VALUE, body)
    assert not succeeded
    assert isinstance(error, PayloadError)
    assert "cannot be unpickled here" in str(error)


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


@pytest.mark.parametrize("body", [b"", b"x", b"\x80\x05.", pickle.dumps(1)[:-1]])
def test_garbage_is_an_error_and_never_raises(body: bytes) -> None:
    succeeded, error = parcel.open_outcome(Outcome.VALUE, body)
    assert not succeeded
    assert isinstance(error, PayloadError)


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
