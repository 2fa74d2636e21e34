"""A chunk is cut between two items, whatever its task thread does at that instant; and what travels has a limit."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mpworker.pool import chunks
from mpworker.pool.chunks import MOST_BYTES, Run, Shape, pack_chunks
from mpworker.pool.mapping import Course
from mpworker.pool.parcel import open_call


class Stub:
    """As much of a worker as a run needs."""

    _interruptible = False

    def heed(self) -> None:
        self._interruptible = True


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_and_cut(size: int, when: int, how: str) -> None:
    ran: list[int] = []
    reached = threading.Event()

    def item(number: int) -> int:
        if number == when:
            reached.set()
        ran.append(number)
        if how == "fail" and number % 3 == 0:
            raise LookupError(number)
        return number

    run = Run(Stub(), item, list(range(size)))  # type: ignore[arg-type]
    thread = threading.Thread(target=run.run)
    thread.start()
    reached.wait()
    run.cut()
    taken = run.taken()
    early = run.report()
    thread.join()
    entries, _, error, told, done, _ = run.report()
    assert early[3] == taken == told == done
    assert ran == list(range(taken))
    assert early[0] == entries[: len(early[0])]
    if how == "fail":
        assert error
        assert entries == []
    else:
        assert entries == ran


@pytest.mark.parametrize("how", ["return", "fail"])
def test_what_a_cut_leaves_is_neither_run_nor_lost(how: str, hasty: None) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    choose = random.Random(seed)
    for _ in range(300):
        size = choose.choice([1, 2, 10, 300])
        run_and_cut(size, choose.randrange(size), how)


def test_the_watchdog_cuts_a_chunk_that_is_stuck_and_arms_the_limits_of_the_item() -> None:
    go, here = threading.Event(), threading.Event()

    def item(number: int) -> int:
        if number == 2:
            here.set()
            go.wait()
        return number

    run = Run(Stub(), item, list(range(5)))  # type: ignore[arg-type]
    current: Any = SimpleNamespace(soft=1.0, hard=2.0, soft_at=None, hard_at=None)
    thread = threading.Thread(target=run.run)
    thread.start()
    here.wait()
    began = run.due - chunks.LOOK
    assert not run.look(current, began + 0.010)
    assert (run.due, current.hard_at) == (began + 0.010 + chunks.LOOK, None)
    assert run.look(current, began + 0.020)
    assert (current.soft_at, current.hard_at) == (began + 1.010, began + 2.010)  # since it was seen first
    assert run.report()[:5] == ([0, 1], False, b"", 3, 2)
    go.set()
    thread.join()
    assert run.report()[:5] == ([0, 1, 2], False, b"", 3, 3)


def test_a_chunk_that_goes_on_and_on_is_cut_and_gets_a_moment() -> None:
    turns = [threading.Event() for _ in range(30)]
    heard = [threading.Event() for _ in range(30)]

    def item(number: int) -> None:
        heard[number].set()
        turns[number].wait()

    run = Run(Stub(), item, list(range(30)))  # type: ignore[arg-type]
    current: Any = SimpleNamespace(soft=0.0, hard=0.0, soft_at=None, hard_at=None)
    thread = threading.Thread(target=run.run)
    thread.start()
    began, now = run.due - chunks.LOOK, 0.0
    for number in range(30):
        heard[number].wait()
        now = run.due
        assert not run.look(current, now)
        if run.due == now + chunks.MOMENT:
            break
        turns[number].set()
    assert began + chunks.LONG <= now < began + chunks.LONG + chunks.LOOK
    assert run.look(current, run.due)
    taken = run.taken()
    for turn in turns:
        turn.set()
    thread.join()
    assert run.report()[3:5] == (taken, taken)


def test_a_chunk_of_large_results_cuts_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "MOST_RESULTS", 1000)
    for value in (b"x" * 300, "x" * 300, ["x" * 300]):
        run = Run(Stub(), lambda _, value=value: value, list(range(100)))  # type: ignore[arg-type,misc]
        run.run()
        assert run.taken() == len(run.report()[0]) == 4


def opened(*iterables: Any, workers: int = 1) -> list[tuple[int, list[Any], int, int]]:
    """Shape, items, number of items, bytes."""
    found = []
    for body, size in pack_chunks(repr, iterables, workers):
        _, (_, shape, items), _ = open_call(body)
        assert len(items) == size
        found.append((shape, list(items), size, len(body)))
    return found


@pytest.mark.parametrize(
    ("iterables", "shape"),
    [
        ((range(1000),), Shape.ONE),
        ((iter([1, 2.5, None, True] * 250),), Shape.ONE),
        (([f"{number}" for number in range(1000)],), Shape.ONE),
        (([(number, "x", b"y") for number in range(1000)],), Shape.ONE),
        ((range(1000), iter("ab" * 500)), Shape.ROW),
        (([[number] for number in range(1000)],), Shape.PARCEL),
        (([(number, []) for number in range(1000)],), Shape.PARCEL),
        ((range(1000), [{}] * 1000), Shape.PARCEL),
        (([1, "x", []] * 333 + [0],), Shape.PARCEL),
    ],
)
def test_what_can_change_or_runs_code_travels_by_itself(iterables: tuple[Any, ...], shape: Shape) -> None:
    found = opened(*iterables, workers=2)
    assert {entry[0] for entry in found} == {shape}
    assert [size for _, _, size, _ in found] == [125] * 8


@pytest.mark.parametrize(
    "make",
    [lambda n: "x" * n, lambda n: b"x" * n, lambda n: ("x" * n, 1), lambda n: ["x" * n]],
    ids=["str", "bytes", "tuple", "list"],
)
def test_a_chunk_has_a_limit_in_bytes_but_for_one_large_item(make: Callable[[int], Any]) -> None:
    sizes = [body for *_, body in opened([make(10_000) for _ in range(400)])]
    assert len(sizes) > 4
    assert max(sizes) < MOST_BYTES + 20_000
    found = opened([make(1_000_000) for _ in range(12)])
    assert [size for _, _, size, _ in found] == [1] * 12


def test_a_chunk_has_a_limit_in_items() -> None:
    found = opened(range(10 * chunks.MOST))
    assert {size for _, _, size, _ in found} == {chunks.MOST}
    assert [item for _, items, _, _ in found for item in items] == list(range(10 * chunks.MOST))


def test_nothing_makes_no_chunk() -> None:
    assert opened() == opened([]) == opened(range(0)) == opened(range(3), []) == []


def test_what_was_cut_off_before_its_chunk_is_in_its_place_is_not_left_out() -> None:
    course, first, rest, rest_of_it, second = Course(2, 0.0, 0.0), *(SimpleNamespace(next=None) for _ in range(4))
    with course.changed:
        course.insert(first, rest)  # type: ignore[arg-type]
        course.insert(rest, rest_of_it)  # type: ignore[arg-type]
    course.append(first)  # type: ignore[arg-type]
    course.append(second)  # type: ignore[arg-type]
    assert [first.next, rest.next, rest_of_it.next, second.next] == [rest, rest_of_it, second, None]
