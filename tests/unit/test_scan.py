"""A filter over large files finds what one finds that has noted every task, in any number of rounds and parts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import support
from hypothesis import given, settings
from hypothesis import strategies as st

from mpworker.errors import StoreError
from mpworker.results import census, glance, query, scan
from mpworker.results.query import ResultStore
from mpworker.results.record import Record
from mpworker.results.tasks import GROUPS

START = datetime(2026, 5, 1, tzinfo=UTC)
STATES = ["SUCCESS", "FAILURE", "failed", "Error ", "in progress", "RETRY", "STARTED", "REVOKED", "tired"]
NAMES = [None, "proj.add", "proj.mul", 'a "b"', "größe", "other"]
IDS = ["a", "b", "c", 'd"\\', "é", "a*", "caf\udce9"]

LINES = st.builds(
    lambda second, flags, **values: Record(
        **values,
        **flags,
        timestamp=(START + timedelta(seconds=second)).isoformat(timespec="microseconds"),
        result={"status": "FAILURE", "task_id": "a", "name": "proj.add"},
    ).to_line(),
    second=st.integers(0, 5),
    task_id=st.sampled_from(IDS),
    status=st.sampled_from(STATES),
    name=st.sampled_from(NAMES),
    hostname=st.sampled_from(["celery@one", "celery@two"]),
    key=st.none() | st.just("k"),
    retries=st.integers(0, 1),
    message=st.sampled_from(["", "WorkerLost", "x" * 300]),
    flags=st.sampled_from([{}, {}, {}, {"superseded": True}, {"chord": True}]),
)
FOREIGN = st.sampled_from(
    [
        b"\n",
        b"garbage\n",
        b'{"task_id": "b", "status": "FAILURE", "timestamp": "2026-05-01T00:00:02+00:00", "runtime": 1}\n',
        b'{"v": 1, "shipped": 0, "task_id":"torn","sta',
        b'{"status" : "failed", "timestamp": "2026-05-01T00:00:03Z", "task_id" : "c", "runtime": "long"}\n',
    ]
)
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["failed", "SUCCESS", "running", "tired", "retry", "nothing"]),
        "name": st.sampled_from(["proj.*", "proj.add", 'a "*', "gr*", "*", "[op]*"]),
        "task_id": st.sampled_from(["a", "a*", "[ab]", 'd"\\', "é", "?"]),
        "worker": st.sampled_from(["celery@one", "*two"]),
        "since": st.integers(0, 6).map(lambda second: START + timedelta(seconds=second)),
        "until": st.integers(0, 6).map(lambda second: START + timedelta(seconds=second)),
        "limit": st.integers(0, 4),
        "newest_first": st.booleans(),
    },
)


@contextmanager
def searching(most: int, part: int, piece: int) -> Iterator[None]:
    """Everything is large: files are searched, in small parts, read in small pieces, with few lines kept."""
    with (
        mock.patch.object(query, "_LARGE", -1),
        mock.patch.object(query, "MOST", most),
        mock.patch.object(scan, "_PART", part),
        mock.patch.object(glance, "_PIECE", piece),
    ):
        yield


@settings(deadline=None, max_examples=300)
@given(
    files=st.lists(st.lists(LINES | FOREIGN, max_size=12), min_size=1, max_size=3),
    options=FILTERS,
    most=st.integers(1, 20),
    part=st.integers(1, 3000),
    piece=st.integers(1, 2000),
)
def test_the_same_is_found(files: list[list[bytes]], options: dict[str, Any], most: int, part: int, piece: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, lines in enumerate(files):
            (Path(folder) / f"n{number}-2026-05-01.jsonl").write_bytes(b"".join(lines))
        noted = list(ResultStore(folder).query(**options))
        with searching(most, part, piece):
            searched = list(ResultStore(folder).query(**options))
    if "limit" in options:  # of records of one instant, any may come first
        assert [found.timestamp for found in searched] == [found.timestamp for found in noted]
    else:
        assert sorted(map(repr, searched)) == sorted(map(repr, noted))


@settings(deadline=None, max_examples=200)
@given(
    files=st.lists(st.lists(LINES | FOREIGN, max_size=12), min_size=1, max_size=3),
    times=st.tuples(*[st.none() | st.integers(0, 6).map(lambda second: START + timedelta(seconds=second))] * 2),
    share=st.integers(1, 5000),
    part=st.integers(1, 3000),
)
def test_the_same_is_counted(files: list[list[bytes]], times: tuple[Any, Any], share: int, part: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, lines in enumerate(files):
            (Path(folder) / f"n{number}-2026-05-01.jsonl").write_bytes(b"".join(lines))
        noted = ResultStore(folder).get_breakdowns(list(GROUPS), *times)
        with searching(9, part, 700), mock.patch.object(census, "_SHARE", share):
            counted = ResultStore(folder).get_breakdowns(list(GROUPS), *times)
    assert [list(groups) for groups in counted] == [list(groups) for groups in noted]
    for groups, others in zip(counted, noted, strict=True):
        for name, figures in groups.items():  # a mean is the sum of what comes in any order
            assert figures == {key: pytest.approx(value) for key, value in others[name].items()}


def test_no_room_to_count_is_said(tmp_path: Path) -> None:
    ResultStore(tmp_path / "a.jsonl").add_result("a", "failed", "")
    full = OSError(28, "No space left on device")
    with (
        searching(9, 100, 100),
        mock.patch.object(census.tempfile, "TemporaryDirectory", side_effect=full),
        pytest.raises(StoreError, match=r"cannot sort the journal in .*: No space left on device"),
    ):
        ResultStore(tmp_path / "a.jsonl").get_breakdown("all")


def test_a_task_is_found_by_the_name_that_is_shown(tmp_path: Path) -> None:
    """Should two records of one task name it differently: the one that counts does."""
    for status, name, second in (("SUCCESS", "proj.add", 1), ("STARTED", "proj.mul", 2)):
        stamp = (START + timedelta(seconds=second)).isoformat(timespec="microseconds")
        line = Record(task_id="a", status=status, name=name, key="k", timestamp=stamp).to_line()
        with (tmp_path / "n-2026-05-01.jsonl").open("ab") as file:
            file.write(line)
    for wanted, found in (("proj.add", 1), ("proj.mul", 0)):
        assert len(list(ResultStore(tmp_path).query(name=wanted))) == found
        with searching(9, 1 << 20, 1 << 19):
            assert len(list(ResultStore(tmp_path).query(name=wanted))) == found


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_a_file_in_parts_is_the_whole_file(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "n-2026-05-01.jsonl"
    path.write_bytes(b"".join(b"%d\n" % number for number in range(200)) + b"half")
    monkeypatch.setattr(scan, "_PART", size)
    monkeypatch.setattr(glance, "_PIECE", 16)
    found = [
        (piece.offset, bytes(piece.buffer[: piece.size]))
        for part in scan.parts_of([path])
        for piece in glance.pieces(*part)
    ]
    assert b"".join(text for _, text in found) == path.read_bytes()
    assert [offset for offset, _ in found] == [sum(len(text) for _, text in found[:n]) for n in range(len(found))]
    assert all(text.endswith(b"\n") for _, text in found[:-1])


def test_several_processes_look_through_a_large_journal(tmp_path: Path) -> None:
    """In a program with one thread; beside threads, which a fork would not bring along, one process does it all."""
    script = """
import os, sys, threading
from mpworker.results import query, scan
from mpworker import ResultStore
query._LARGE, scan._MANY, scan._PART = 0, 0, 2000
looked = scan._fitting
def note(*args, **options):
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    return looked(*args, **options)
scan._fitting = note
store = ResultStore("journal.jsonl")
for number in range(100):
    store.add_result(str(number), "failed" if number % 2 else "done", "x" * 100)
if sys.argv[1] == "threads":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(len(list(store.query(status="failed"))), len(set(open("pids").read().split())) > 1)
"""
    for how in ("alone", "threads"):
        folder = tmp_path / how
        folder.mkdir()
        ended = support.run_script(script, folder, how)
        several = how == "alone" and len(os.sched_getaffinity(0)) > 1
        assert (ended.code, ended.out, ended.err) == (0, f"50 {several}\n", "")
