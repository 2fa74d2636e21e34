"""The journal within one process: names, days, repair of torn lines, marks, what happens when files vanish."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpworker.errors import ConfigurationError, StoreError
from mpworker.results import journal as module
from mpworker.results.journal import Flusher, Journal, Place
from mpworker.results.reader import Tally, read_at, read_entries, read_open
from mpworker.results.record import SHIPPED, SUPERSEDED, Record


def record(task_id: str, **more: object) -> Record:
    return Record(task_id=task_id, status="SUCCESS", **more)  # type: ignore[arg-type]


def ids(folder: Path, tally: Tally | None = None) -> list[str]:
    return [entry.record.task_id for entry in read_entries(Journal.files(folder), tally)]


def test_files_are_private_and_named_by_node_and_utc_day(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "journal"
    journal = Journal(folder, "celery@häst/1", clock=lambda: 1_000_000_000.0)
    journal.append(record("a"))
    (path,) = Journal.files(folder)
    assert path.name == "celery@h_st_1-2001-09-09.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_new_day_opens_a_new_file(tmp_path: Path) -> None:
    now = [86400.0 * 100 - 1]
    journal = Journal(tmp_path, "n", clock=lambda: now[0])
    first = journal.append(record("a"))
    now[0] += 2
    journal.append(record("b"))
    assert [p.name for p in Journal.files(tmp_path)] == ["n-1970-04-10.jsonl", "n-1970-04-11.jsonl"]
    assert ids(tmp_path) == ["a", "b"]
    # A result stored just before midnight is marked just after it.
    assert journal.mark(first)
    with Path(first.path).open("rb") as file:
        found = read_at(file, first.offset)
    assert found is not None
    assert found.shipped


def test_each_record_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "n")
    writes: list[int] = []
    real = os.write
    monkeypatch.setattr(module.os, "write", lambda fd, data: writes.append(len(data)) or real(fd, data))
    for number in range(5):
        journal.append(record(str(number), result="x" * 100_000))
    assert len(writes) == 5


def test_marks_change_one_digit_of_their_own_line_only(tmp_path: Path) -> None:
    one, other = Journal(tmp_path, "n"), Journal(tmp_path, "n")
    places = [(one if i % 2 else other).append(record(str(i), result="y" * i * 50)) for i in range(10)]
    assert one.mark(places[3], SHIPPED)
    assert other.mark(places[4], SUPERSEDED)
    found = {e.record.task_id: e.record for e in read_entries(Journal.files(tmp_path))}
    assert [i for i, r in found.items() if r.shipped] == ["3", "4"]
    assert [i for i, r in found.items() if r.superseded] == ["4"]


def test_a_mark_never_touches_a_line_that_is_not_the_one_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "n")
    place = journal.append(record("a"))
    journal.append(record("b"))
    before = journal.path().read_bytes()
    assert not journal.mark(Place(place.path, place.identity, place.offset + 7, place.head))
    journal.close()
    Path(place.path).unlink()
    assert not journal.mark(place)
    journal.append(record("c"))
    assert not journal.mark(place)
    assert journal.path().read_bytes() != before
    assert ids(tmp_path) == ["c"]


def test_a_torn_end_is_terminated_before_the_next_record(tmp_path: Path) -> None:
    Journal(tmp_path, "n").append(record("a"))
    (path,) = Journal.files(tmp_path)
    with path.open("ab") as file:
        file.write(record("torn").to_line()[:50])
    tally = Tally()
    assert ids(tmp_path, tally) == ["a"]
    assert (tally.torn, tally.unfinished) == (0, 1)
    Journal(tmp_path, "n").append(record("b"))
    tally = Tally()
    assert ids(tmp_path, tally) == ["a", "b"]
    assert tally.torn == 1


def test_a_record_glued_to_a_torn_one_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "n")
    journal.append(record("a"))
    with journal.path().open("ab") as file:
        file.write(record("torn", result={"v": 1, "shipped": 0, "task_id": "no"}).to_line()[:120])
    place = journal.append(record("b"))  # this process does not know that another one has died in the middle of a line
    assert journal.path().read_bytes().count(b"\n") == 2
    tally = Tally()
    entries = list(read_entries(Journal.files(tmp_path), tally))
    assert [e.record.task_id for e in entries] == ["a", "b"]
    assert tally.torn == 1
    assert entries[1].offset == place.offset
    assert journal.mark(place)
    with journal.path().open("rb") as file:
        found = read_at(file, place.offset)
    assert found is not None
    assert found.shipped


def test_a_full_disk_is_an_error_and_the_next_record_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "n")
    journal.append(record("a"))
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:40])

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", full)
        with pytest.raises(StoreError, match=r"mpworker_journal.*only 40 of .* bytes.*disk full"):
            journal.append(record("lost"))
    place = journal.append(record("b"))
    tally = Tally()
    assert ids(tmp_path, tally) == ["a", "b"]
    assert tally.torn == 1
    assert journal.mark(place)


def test_a_deleted_file_is_noticed_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    journal = Journal(tmp_path / "j", "n")
    journal.append(record("a"))
    journal.path().rename(tmp_path / "moved")
    (tmp_path / "j").rmdir()
    now[0] += 1.1
    journal.append(record("b"))
    assert ids(tmp_path / "j") == ["b"]


def test_a_descriptor_that_user_code_took_is_not_written_to(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", "n")
    journal.append(record("a"))
    file = journal._file
    assert file is not None
    victim = os.open(tmp_path / "victim", os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(victim, file.fd)
    taken = file.fd
    journal.append(record("b"))
    assert (tmp_path / "victim").read_bytes() == b""
    assert ids(tmp_path / "j") == ["a", "b"]
    os.fstat(taken)  # still open: it is not ours to close
    os.close(taken)
    os.close(victim)


def test_fsync_always_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(module.os, "fsync", synced.append)
    Journal(tmp_path, "n").append(record("a"))
    assert not synced
    Journal(tmp_path, "n", "always").append(record("a"))
    assert len(synced) == 1


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        journal = Journal(folder, "n")
        with pytest.raises(ConfigurationError, match=r"^mpworker_journal: cannot write to .*file") as caught:
            journal.prepare()
        assert "\n" not in str(caught.value)
        with pytest.raises(StoreError, match="mpworker_journal"):
            journal.append(record("a"))


def test_blank_lines_and_foreign_text_do_not_disturb(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "n")
    journal.append(record("a"))
    with journal.path().open("ab") as file:
        file.write(b"\n\n  \nnot json\n{}\n\xff\xff\n")
    journal.append(record("b"))
    tally = Tally()
    assert ids(tmp_path, tally) == ["a", "b"]
    assert tally.torn == 3
    assert tally.end == journal.path().stat().st_size


def test_days_come_in_order_whatever_the_nodes_are_called(tmp_path: Path) -> None:
    for name in ("a-2026-01-02.jsonl", "b-2026-01-01.jsonl", "a-2025-12-31.jsonl"):
        (tmp_path / name).touch()
    assert [p.name[:12] for p in Journal.files(tmp_path)] == ["a-2025-12-31", "b-2026-01-01", "a-2026-01-02"]
    assert Journal.files(tmp_path / "none") == []


def test_a_record_seen_half_written_is_read_whole_the_next_time(tmp_path: Path) -> None:
    """A reader met the end of the file in the middle of a record, and the rest of it with its next read."""
    path = tmp_path / "node.jsonl"
    lines = [Record(task_id=f"t{number}", status="SUCCESS").to_line() for number in range(3)]
    path.write_bytes(b"".join(lines))

    class Growing(io.BytesIO):
        def __iter__(self) -> Iterator[bytes]:  # type: ignore[override]
            return iter([lines[0], lines[1][:100], lines[1][100:], lines[2]])

    class GrowingPath(type(path)):  # type: ignore[misc]
        def open(self, *_: object) -> io.BytesIO:
            return Growing()

    tally = Tally()
    assert [entry.record.task_id for entry in read_entries([GrowingPath(path)], tally)] == ["t0"]
    assert (tally.end, tally.torn, tally.unfinished) == (len(lines[0]), 0, 1)
    with path.open("rb") as file:
        assert [entry.record.task_id for entry in read_open(file, path, tally, tally.end)] == ["t1", "t2"]


def test_in_batches_the_disk_is_at_most_a_moment_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(module.os, "fdatasync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    journal = Journal(tmp_path, "n")
    flusher = Flusher(journal)
    assert not flusher.flush()  # there is no file yet
    journal.append(record("a"))
    assert flusher.flush()
    assert not flusher.flush()  # nothing is new
    Journal(tmp_path, "n").append(record("b"))  # of any process
    assert flusher.flush()
    place = journal.append(record("c"))
    assert flusher.flush()
    assert journal.mark(place)  # that it has been shipped need not be on disk, but does no harm
    flusher.flush()
    journal.path().unlink()
    assert not flusher.flush()
    journal.close()
    journal.append(record("d"))
    assert flusher.flush()
    assert set(synced) == {journal.path().name}
    flusher.end()


def test_the_last_records_of_a_day_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [86400.0 * 20000]
    synced: list[str] = []
    monkeypatch.setattr(module.os, "fdatasync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    journal = Journal(tmp_path, "n", clock=lambda: now[0])
    flusher = Flusher(journal)
    journal.append(record("a"))
    flusher.flush()
    journal.append(record("late"))
    now[0] += 86400
    journal.append(record("b"))
    flusher.flush()
    assert synced == ["n-2024-10-04.jsonl", "n-2024-10-04.jsonl", "n-2024-10-05.jsonl"]
    flusher.end()


def test_the_flusher_works_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    monkeypatch.setattr(module.os, "fdatasync", lambda fd: synced.set())
    journal = Journal(tmp_path, "n")
    flusher = Flusher(journal)
    flusher.start()
    journal.append(record("a"))
    assert synced.wait(30)
    flusher.end()
    assert not flusher.is_alive()


def test_a_disk_that_fails_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "fdatasync", fails)
    journal = Journal(tmp_path, "n")
    flusher = Flusher(journal)
    for name in "ab":
        journal.append(record(name))
        assert not flusher.flush()
    assert caplog.text.count("cannot be flushed to disk: Input/output error") == 1
    flusher.end()
