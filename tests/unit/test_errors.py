"""Errors: one tree, clear words, and every one survives pickling."""

from __future__ import annotations

import copy
import pickle
import queue
import signal
from concurrent.futures import BrokenExecutor, CancelledError

import pytest

from mpworker import errors
from mpworker.errors import MPWorkerError, RemoteError, RemoteTraceback, SoftTimeLimitExceeded, TimeLimitExceeded
from mpworker.errors import WorkerLost as Lost

EXAMPLES = [
    errors.ConfigurationError("x must be y"),
    errors.BootError("why"),
    errors.PoolFull("why"),
    errors.PayloadError("why"),
    RemoteError("a.B", "text"),
    errors.UnheardError("why"),
    errors.ProtocolError("why"),
    errors.StoreError(28, "No space left on device"),
    SoftTimeLimitExceeded(1.5),
    TimeLimitExceeded(2.0),
    errors.MemoryLimitExceeded(2**29, 2**30),
    errors.TaskCancelled("why"),
    errors.PoisonMessage("why"),
    errors.RequeueError("why"),
    Lost(7, None, 9, 2**20, True),
    Lost(7, None, 9, 2**30, False, "why", 2**20, 1.5, True),
]


def test_every_error_is_in_the_tree_and_tried_here() -> None:
    tree = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    ours = {kind for kind in tree if kind.__module__ == errors.__name__} - {MPWorkerError, RemoteTraceback}
    assert ours == {type(example) for example in EXAMPLES}
    assert all(issubclass(kind, MPWorkerError) for kind in ours)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in ours)
    assert not issubclass(RemoteTraceback, MPWorkerError)


@pytest.mark.parametrize("error", [*EXAMPLES, RemoteTraceback("text")], ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling_and_copying(error: Exception) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert other.__dict__ == error.__dict__
        assert str(error)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.BootError, BrokenExecutor),
        (errors.PoolFull, queue.Full),
        (errors.PayloadError, TypeError),
        (errors.PayloadError, pickle.PicklingError),
        (TimeLimitExceeded, TimeoutError),
        (errors.TaskCancelled, CancelledError),
        (errors.StoreError, OSError),
        (errors.MemoryLimitExceeded, MemoryError),
    ],
)
def test_the_standard_librarys_handlers_catch_them(kind: type[Exception], base: type[Exception]) -> None:
    assert issubclass(kind, base)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (Lost(7, 3), "worker process 7 exited with code 3 while it ran the task"),
        (Lost(7, None, signal.SIGSEGV), "worker process 7 was ended by SIGSEGV while it ran the task"),
        (Lost(), "the worker process was lost while it ran the task"),
        (Lost(7, None, 63, 3 * 2**20), "was ended by signal 63 while it ran the task; it had used up to 3 MiB"),
        (Lost(7, 3, rss=2**30, runtime=61.234), "the task, after 61.2 s; the task was last seen with 1024 MiB"),
    ],
)
def test_a_lost_worker_is_described(lost: Lost, words: str) -> None:
    assert words in str(lost)
    assert "memory?" not in str(lost)


def test_only_a_sigkill_that_was_not_ours_hints_at_memory() -> None:
    assert str(Lost(7, None, signal.SIGKILL)).endswith("; out of memory?")
    assert "memory?" not in str(Lost(7, None, signal.SIGKILL, by_pool=True))


def test_the_kernels_own_word_is_better_than_a_guess() -> None:
    text = str(Lost(7, None, signal.SIGKILL, oom_killed=True))
    assert text.endswith("; killed by the kernel's out-of-memory killer")
    assert "memory?" not in text


def test_a_memory_limit_is_told_with_what_was_used() -> None:
    assert "used 812 MiB, limit 512 MiB" in str(errors.MemoryLimitExceeded(512 << 20, 812 << 20))
    assert "used 1.5 MiB, limit 1 MiB" in str(errors.MemoryLimitExceeded(1 << 20, 3 << 19))
    assert str(errors.MemoryLimitExceeded())


@pytest.mark.parametrize("kind", [SoftTimeLimitExceeded, TimeLimitExceeded])
def test_limits_are_told(kind: type[SoftTimeLimitExceeded | TimeLimitExceeded]) -> None:
    assert "2.5 s" in str(kind(2.5))
    assert kind(2.5).limit == 2.5
    assert str(kind())
