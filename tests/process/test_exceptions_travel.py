"""Exceptions that do not travel arrive all the same: readable, with the worker's traceback as their cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
import support
from process import awkward
from process.bench import Bench, bench
from process.faults import METHODS
from support import PATIENCE, wait_until

from mpworker import RemoteTraceback
from mpworker.errors import RemoteError


@pytest.fixture(scope="module", params=METHODS)
def shared(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with bench(request.param) as shared:
        yield shared


def arrive(shared: Bench, task: Callable[[], NoReturn], folder: Path) -> BaseException:
    """What the future and the error callback get, and that nobody around notices."""
    pool, log, workers = shared.pool, folder / "log", shared.workers()
    before = [pool.submit(support.give, number) for number in range(5)]
    future = pool.schedule(task, timeout=PATIENCE, error_callback=partial(awkward.describe, log))
    after = [pool.submit(support.give, number) for number in range(5)]
    error = future.exception(PATIENCE)
    assert error is not None
    assert [task.result(PATIENCE) for task in before + after] == [*range(5), *range(5)]
    assert shared.workers() == workers
    assert isinstance(error.__cause__, RemoteTraceback)
    assert f"in {task.__name__}" in str(error.__cause__)
    (told,) = wait_until(lambda: support.lines(log), what="the error callback is called")
    assert told == f"{type(error).__name__} RemoteTraceback {getattr(error, 'type_name', '')}"
    return error


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        (awkward.two_arguments, "support.TwoArguments", "1/2"),
        (awkward.keyword_only, "process.awkward.KeywordOnly", "code 7"),
        (awkward.frozen, "support.Frozen", ""),
        (awkward.reduce_raises, "process.awkward.Reducing", "as told"),
        (awkward.reduce_exits, "process.awkward.Reducing", "as told"),
        (awkward.reduce_becomes_another, "process.awkward.Reducing", "as told"),
        (awkward.attribute, "RuntimeError", "carries a lock"),
        (awkward.argument, "ValueError", "carries a lock"),
        (awkward.homesick, "process.awkward.Homesick", "well travelled"),
        (awkward.only_in_the_child, "only_in_the_child.Hidden", "you cannot import me"),
        (awkward.local, "process.awkward.local.<locals>.Local", "you cannot even name me"),
        (awkward.group_with_an_awkward_member, "ExceptionGroup", "outer (3 sub-exceptions)"),
    ],
    ids=lambda value: getattr(value, "__name__", "as"),
)
def test_one_that_cannot_be_rebuilt_arrives_as_its_text(
    shared: Bench, task: Callable[[], NoReturn], name: str, text: str, tmp_path: Path
) -> None:
    error = arrive(shared, task, tmp_path)
    assert type(error) is RemoteError
    assert error.type_name == name
    assert text in error.text
    assert str(error) == (f"{name}: {error.text}" if error.text else name)


def test_a_groups_members_are_in_the_text(shared: Bench, tmp_path: Path) -> None:
    cause = str(arrive(shared, awkward.group_with_an_awkward_member, tmp_path).__cause__)
    for line in ("ValueError: v", "support.TwoArguments: 1/2", "RuntimeError: carries a lock", "in two_arguments"):
        assert line in cause


@pytest.mark.parametrize(
    ("task", "kinds"),
    [(awkward.group, [ValueError, ExceptionGroup]), (awkward.base_group, [KeyboardInterrupt, ValueError])],
    ids=lambda value: getattr(value, "__name__", "as"),
)
def test_a_group_of_ordinary_ones_arrives_as_a_group(
    shared: Bench, task: Callable[[], NoReturn], kinds: list[type[BaseException]], tmp_path: Path
) -> None:
    error = arrive(shared, task, tmp_path)
    assert type(error) is (ExceptionGroup if task is awkward.group else BaseExceptionGroup)
    assert error.message == "outer"
    assert [type(member) for member in error.exceptions] == kinds
    assert "+---------------- 2 ----------------" in str(error.__cause__)


@pytest.mark.parametrize(
    ("task", "kind"),
    [(awkward.refusing, support.Refusing), (awkward.speechless, awkward.Speechless)],
    ids=lambda value: value.__name__,
)
def test_one_that_refuses_attributes_or_words_arrives_as_itself(
    shared: Bench, task: Callable[[], NoReturn], kind: type[BaseException], tmp_path: Path
) -> None:
    assert type(arrive(shared, task, tmp_path)) is kind


def test_one_whose_own_cause_cannot_travel_arrives_as_itself(shared: Bench, tmp_path: Path) -> None:
    error = arrive(shared, awkward.chain, tmp_path)
    assert type(error) is ValueError
    assert str(error) == "the last straw"
    for line in ("RuntimeError: carries a lock", "direct cause", "ValueError: the last straw", "a note"):
        assert line in str(error.__cause__)
