"""The page that a worker shares with those who may outlive it."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpworker.errors import ProtocolError
from mpworker.pool.frames import Frame, FrameReader, Kind
from mpworker.pool.page import MOST, SHEETS, SIZE, Page, Ran, check, create, results, who_ran


@pytest.fixture
def page() -> Page:
    return Page(create(), worker=7, mine=True)


def _sent(page: Page) -> Frame:
    (frame,) = FrameReader("a worker").feed(page.pack(2048.0))
    page.forget()
    return frame


def test_it_tells_what_runs(page: Page) -> None:
    assert page.running()[0] == 0
    page.begin(5, 12.5)
    assert page.running() == (5, 12.5)
    page.end()
    assert page.running()[0] == 0
    assert (page.worker, page.pid, page.started()) == (7, os.getpid(), [5])


def test_it_remembers_the_jobs_that_were_started_last(page: Page) -> None:
    for job in range(1, 3001):
        page.begin(job, 0.0)
    assert set(range(3001 - 1024, 3001)) == set(page.started())


def test_results_travel_together_in_order(page: Page) -> None:
    assert [page.add(job, job % 2, 1.0, 0.25, b"x" * job) for job in (3, 4, 9)] == [1, 2, 3]
    frame = _sent(page)
    assert check(frame, "a worker") == ((3, 4, 9), 0.75)
    assert who_ran(frame) == (os.getpid(), 2048.0)
    assert list(results(frame)) == [Ran(job, job % 2, 1.0, 0.25, b"x" * job) for job in (3, 4, 9)]
    assert not page.waiting


def test_what_is_full_takes_nothing(page: Page) -> None:
    assert page.add(1, 0, 0.0, 0.0, b"x" * 40_000) == 0
    for job in range(MOST):
        assert page.add(job, 0, 0.0, 0.0, b"")
    assert page.add(MOST, 0, 0.0, 0.0, b"") == 0
    assert len(list(results(_sent(page)))) == MOST


def test_the_dead_leave_what_they_sent_last_and_what_they_did_not_send() -> None:
    fd = create()
    reader = Page(os.dup(fd))
    page = Page(fd, worker=1, mine=True)
    for batch in range(SHEETS + 2):
        for job in range(3):
            page.add(10 * batch + job, 0, 0.0, 0.0, b"%d" % job)
        if batch <= SHEETS:
            _sent(page)
    left = [ran.job for frame in reader.left() for ran in results(frame)]
    assert left == [10 * batch + job for batch in range(2, SHEETS + 2) for job in range(3)]


def test_what_nobody_has_heard_is_not_written_over() -> None:
    fd = create()
    dispatcher, page = Page(os.dup(fd), worker=1), Page(fd, mine=True)
    for _ in range(SHEETS - 1):
        assert page.has_sheet
        page.add(1, 0, 0.0, 0.0, b"")
        _sent(page)
    assert not page.has_sheet
    for _ in range(3):
        dispatcher.heard()
        assert page.has_sheet
        page.add(1, 0, 0.0, 0.0, b"")
        _sent(page)
        assert not page.has_sheet


def test_nobody_can_shrink_or_write_over_it() -> None:
    fd = create()
    other = os.dup(fd)
    Page(fd, worker=1, mine=True)
    with pytest.raises(PermissionError):
        os.ftruncate(other, 0)
    with pytest.raises(PermissionError):
        os.pwrite(other, b"garbage", 0)
    os.close(other)


def test_what_is_no_page_is_not_mapped() -> None:
    fd = os.memfd_create("short")
    with pytest.raises(ProtocolError):
        Page(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.mark.parametrize("damage", [b"", b"x", bytes(16), bytes(16 + 31), bytes(16 + 8) + b"\x09" + bytes(23)])
def test_damaged_results_name_their_sender(damage: bytes) -> None:
    with pytest.raises(ProtocolError, match="worker 3"):
        check(Frame(Kind.RESULTS, extra=damage), "worker 3")


def test_without_a_tail_a_page_is_no_larger(page: Page) -> None:
    assert page.tail is None
    fd = create()
    assert os.fstat(fd).st_size == SIZE
    os.close(fd)


def test_the_tail_is_of_one_job() -> None:
    fd = create(100)
    reader = Page(os.dup(fd)).tail
    writer = Page(fd, worker=1, mine=True).tail
    assert reader is not None
    assert writer is not None
    assert (reader.kept, reader.read(0), reader.read(1)) == (100, b"", b"")
    writer.begin(1)
    assert reader.read(1) == b""
    writer.write(b"one")
    writer.write(b"")
    assert (reader.read(1), reader.read(2), reader.read(0)) == (b"one", b"", b"")
    writer.begin(2)
    writer.write(b"two")
    assert (reader.read(1), reader.read(2)) == (b"", b"two")


@given(kept=st.integers(1, 9000), texts=st.lists(st.builds(lambda text, n: text * n, st.text(), st.integers(0, 3000))))
def test_the_tail_ends_with_what_was_written_last_and_begins_with_a_character(kept: int, texts: list[str]) -> None:
    page = Page(create(kept), worker=1, mine=True)
    tail = page.tail
    assert tail is not None
    tail.begin(1)
    whole = "".join(texts).encode(errors="replace")
    for text in texts:
        tail.write(text.encode(errors="replace"))
    found = tail.read(1)
    assert whole.endswith(found)
    assert min(len(whole), kept) - 3 <= len(found) <= kept
    assert len(whole) > kept or found == whole
    found.decode()
    page.close()
