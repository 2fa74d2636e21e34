"""What the shipper finds, delivers, marks and remembers; Redis is a list here."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from mpworker.results import shipper as module
from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.reader import read_lines, read_open
from mpworker.results.record import SHIPPED, SUPERSEDED, Record, timestamp_now
from mpworker.results.shipper import Pass, Refused, Shipper, Witness


class Redis:
    """Takes records, or refuses."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.batches: list[int] = []
        self.refuses = False
        self.digit = SHIPPED

    def __call__(self, records: Sequence[Record]) -> list[bytes]:
        if self.refuses and records:
            raise ConnectionError("no")
        self.got += [(record.task_id, record.status) for record in records]
        self.batches.append(len(records))
        return [self.digit] * len(records)


def put(folder: Path, task_id: str, status: str = "SUCCESS", node: str = "n", **fields: Any) -> None:
    journal = Journal(folder, node)
    journal.append(Record(task_id=task_id, status=status, **{"key": f"k{task_id}", "payload": "{}", **fields}))
    journal.close()


def digits(folder: Path) -> list[int]:
    return [json.loads(line)["shipped"] for path in Journal.files(folder) for line in path.read_bytes().splitlines()]


def ship(folder: Path, redis: Redis, grace: float = 0.0) -> Pass:
    shipper = Shipper(folder, redis, grace)
    found = shipper.run()
    if shipper.has_news:
        shipper.keep(Witness("here", "t"))
    return found


def test_what_is_unshipped_is_delivered_in_order_and_marked(tmp_path: Path) -> None:
    redis = Redis()
    for name in "abc":
        put(tmp_path, name, shipped=name == "b")
    assert ship(tmp_path, redis) == Pass(2, 0)
    assert redis.got == [("a", "SUCCESS"), ("c", "SUCCESS")]
    assert digits(tmp_path) == [1, 1, 1]
    assert ship(tmp_path, redis) == Pass(0, 0)


def test_of_a_task_only_the_last_is_delivered_and_all_are_marked(tmp_path: Path) -> None:
    redis = Redis()
    for status in ("STARTED", "RETRY", "STARTED", "FAILURE"):
        put(tmp_path, "a", status)
    put(tmp_path, "b", "STARTED")
    assert ship(tmp_path, redis) == Pass(5, 0)
    assert redis.got == [("a", "FAILURE"), ("b", "STARTED")]
    assert digits(tmp_path) == [1] * 5


@pytest.mark.parametrize("after", ["STARTED", "FAILURE", "REVOKED", "SUCCESS"])
def test_nothing_follows_a_success(tmp_path: Path, after: str) -> None:
    redis = Redis()
    for status in ("STARTED", "SUCCESS", after):
        put(tmp_path, "a", status)
    ship(tmp_path, redis)
    assert redis.got == [("a", "SUCCESS")]
    assert digits(tmp_path) == [1, 1, 1 if after == "SUCCESS" else 2]


@pytest.mark.parametrize(
    ("records", "told"),
    [
        # the second run has ended before the first has said that it asked for it
        ([("FAILURE", 1), ("RETRY", 0)], 0),
        ([("STARTED", 1), ("RETRY", 0)], 0),
        ([("SUCCESS", 1), ("RETRY", 0), ("FAILURE", 0)], 0),
        ([("STARTED", 0), ("RETRY", 0), ("STARTED", 1)], 2),
        ([("STARTED", 0), ("RETRY", 0)], 1),
        ([("FAILURE", 0), ("STARTED", 1)], 1),
        ([("STARTED", 2), ("FAILURE", 0)], 1),
        ([("FAILURE", 0), ("REVOKED", 0)], 1),
        ([("FAILURE", 0), ("SUCCESS", 0)], 1),
    ],
)
def test_of_one_batch_what_is_true_now_is_delivered(tmp_path: Path, records: list[tuple[str, int]], told: int) -> None:
    redis = Redis()
    for status, retries in records:
        put(tmp_path, "a", status, retries=retries)
    ship(tmp_path, redis)
    assert redis.got == [("a", records[told][0])]
    assert all(digits(tmp_path))


def test_of_two_successes_one_counts_whichever_redis_holds(tmp_path: Path) -> None:
    redis = Redis()
    redis.digit = SUPERSEDED  # it holds the second one
    put(tmp_path, "a")
    put(tmp_path, "a", shipped=True)
    shipper = Shipper(tmp_path, redis)
    shipper.doubt(everything=True)
    shipper.run()
    assert digits(tmp_path) == [2, 1]
    assert ResultStore(tmp_path).get_statistics()["completed"] == 1


def test_what_is_meant_for_another_backend_is_left_to_others(tmp_path: Path) -> None:
    ours, theirs = Redis(), Redis()
    for name, store in (("a", "ours"), ("b", "theirs"), ("c", None), ("d", "ours")):
        put(tmp_path, name, store=store)
    shipper = Shipper(tmp_path, ours, store="ours")
    assert shipper.run() == Pass(3, 0, 1)
    shipper.keep(Witness("here", "t"))
    assert Shipper(tmp_path, ours, store="ours").run() == Pass(0)
    assert digits(tmp_path) == [1, 0, 1, 1]
    assert Shipper(tmp_path, theirs, store="theirs").run() == Pass(1)
    assert [name for name, _ in theirs.got] == ["b"]
    put(tmp_path, "e", store="theirs")
    assert Shipper(tmp_path, ours).run() == Pass(1)  # of anybody


def test_a_file_that_cannot_be_read_is_in_nobodys_way(tmp_path: Path) -> None:
    redis = Redis()
    (tmp_path / "backup-2020-01-01.jsonl").mkdir()
    put(tmp_path, "a")
    found = Shipper(tmp_path, redis).run()
    assert found.delivered == 1
    assert "backup-2020-01-01.jsonl: Is a directory" in found.problem


def test_parts_of_chords_have_a_grace_of_their_own(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a", timestamp=timestamp_now())
    put(tmp_path, "a", timestamp=timestamp_now(), chord=True, key=None)
    assert Shipper(tmp_path, redis, part_grace=60.0).run() == Pass(1, 1)
    assert Shipper(tmp_path, redis).run() == Pass(1)


def test_what_redis_holds_already_counts_for_nothing(tmp_path: Path) -> None:
    redis = Redis()
    redis.digit = SUPERSEDED
    put(tmp_path, "a", "FAILURE")
    ship(tmp_path, redis)
    assert digits(tmp_path) == [2]


def test_a_refusal_keeps_everything_and_the_next_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2)
    redis = Redis()
    for name in "abcde":
        put(tmp_path, name)
    taken = redis.__call__

    def until_two(records: Sequence[Record]) -> list[bytes]:
        redis.refuses = len(redis.got) >= 2
        return taken(records)

    with pytest.raises(Refused, match="ConnectionError: no"):
        Shipper(tmp_path, until_two).run()
    assert digits(tmp_path) == [1, 1, 0, 0, 0]
    redis.refuses = False
    assert Shipper(tmp_path, taken).run() == Pass(3, 0)
    assert [name for name, _ in redis.got] == list("abcde")
    assert redis.batches == [2, 2, 1]


def test_a_batch_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BULK", 1000)
    redis = Redis()
    for name in "abcd":
        put(tmp_path, name, payload="x" * 600)
    ship(tmp_path, redis)
    assert redis.batches == [2, 2, 0]


def test_a_new_record_is_left_to_its_writer(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "old", timestamp="2026-01-01T00:00:00.000000+00:00")
    put(tmp_path, "new", in_hand=True)
    put(tmp_path, "nobody else's")
    put(tmp_path, "old too", timestamp="2026-01-01T00:00:00.000000+00:00", in_hand=True)
    assert ship(tmp_path, redis, grace=60.0) == Pass(3, 1)
    assert digits(tmp_path) == [1, 3, 1, 1]
    assert ship(tmp_path, redis) == Pass(1, 0)
    assert [name for name, _ in redis.got] == ["old", "nobody else's", "old too", "new"]


def test_a_clock_that_was_ahead_holds_nothing_up(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a", timestamp="2126-01-01T00:00:00.000000+00:00")
    assert ship(tmp_path, redis, grace=60.0) == Pass(1, 0)


def test_what_has_expired_or_is_not_meant_for_redis_is_settled(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "expired", timestamp="2026-01-01T00:00:00.000000+00:00", expires=60)
    put(tmp_path, "free", key=None, payload=None)
    put(tmp_path, "lives", timestamp=timestamp_now(), expires=60)
    assert ship(tmp_path, redis) == Pass(3, 0)
    assert redis.got == [("lives", "SUCCESS")]


def test_the_checkpoint_spares_reading_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = Redis()
    put(tmp_path, "a")
    ship(tmp_path, redis)
    starts: list[int] = []

    def watched(file: Any, path: Any, tally: Any, start: int, **options: Any) -> Any:
        starts.append(start)
        return read_open(file, path, tally, start, **options)

    monkeypatch.setattr(module, "read_open", watched)
    ship(tmp_path, redis)
    assert starts == []  # nothing has been added
    put(tmp_path, "b")
    ship(tmp_path, redis)
    (file,) = Journal.files(tmp_path)
    assert starts == [len(file.read_bytes().splitlines(keepends=True)[0])]
    assert (tmp_path / ".shipped.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": [1]}', '{"files": {"n": 3}}', "\0"])
def test_a_broken_checkpoint_is_none(tmp_path: Path, text: str) -> None:
    redis = Redis()
    put(tmp_path, "a")
    (tmp_path / ".shipped.json").write_text(text)
    assert ship(tmp_path, redis) == Pass(1, 0)


def test_a_file_that_was_replaced_or_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    redis = Redis()
    for name in "ab":
        put(tmp_path, name)
    ship(tmp_path, redis)
    (file,) = Journal.files(tmp_path)
    os.truncate(file, 0)
    put(tmp_path, "c")
    assert ship(tmp_path, redis) == Pass(1, 0)
    file.unlink()
    for name in "defg":
        put(tmp_path, name)
    assert ship(tmp_path, redis) == Pass(4, 0)


def test_torn_lines_and_whole_ones_glued_to_them(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a")
    (file,) = Journal.files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:50] + whole + b"nonsense\n" + whole[:40])
    assert ship(tmp_path, redis) == Pass(1, broken=2)
    assert redis.got == [("a", "SUCCESS")]
    assert b'"shipped": 1' in file.read_bytes()
    file.write_bytes(file.read_bytes()[:-40] + whole)
    assert ship(tmp_path, redis) == Pass(1, broken=2)  # from the beginning: it has been written over


def test_again_is_everything_that_was_not_superseded(tmp_path: Path) -> None:
    redis = Redis()
    for name, status in (("a", "STARTED"), ("a", "SUCCESS"), ("b", "FAILURE")):
        put(tmp_path, name, status, shipped=True)
    put(tmp_path, "a", "FAILURE", superseded=True)
    put(tmp_path, "c", "STARTED")
    put(tmp_path, "d", "FAILURE", key=None, chord=True, shipped=True)
    shipper = Shipper(tmp_path, redis)
    shipper.doubt(everything=True)
    assert shipper.has_doubts
    assert shipper.run() == Pass(4, 0)
    assert not shipper.has_doubts
    assert redis.got == [("a", "SUCCESS"), ("b", "FAILURE"), ("c", "STARTED")]
    assert shipper.run() == Pass(0, 0)


def test_what_came_after_the_checkpoint_is_doubtful(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a")
    ship(tmp_path, redis)
    shipper = Shipper(tmp_path, redis)
    put(tmp_path, "b")
    put(tmp_path, "c", shipped=True)
    assert shipper.run() == Pass(1)
    assert shipper.has_news
    assert shipper.witness == Witness("here", "t")
    redis.got.clear()
    shipper.doubt(everything=False)
    assert shipper.run() == Pass(2)
    assert redis.got == [("b", "SUCCESS"), ("c", "SUCCESS")]
    shipper.keep(Witness("there", "u"))
    assert not shipper.has_news
    shipper.doubt(everything=False)
    assert shipper.run() == Pass(0)
    other = Shipper(tmp_path, redis)
    other.name()
    assert other.witness == Witness("there", "u")


def test_what_is_doubted_is_delivered_once_file_by_file(tmp_path: Path) -> None:
    redis = Redis()
    for node in ("one", "two"):
        put(tmp_path, node, node=node)
    shipper = Shipper(tmp_path, redis)
    shipper.run()
    shipper.doubt(everything=True)
    redis.got.clear()
    with Journal.files(tmp_path)[1].open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert shipper.run() == Pass(1, busy=1)
        assert shipper.has_doubts
        assert shipper.run() == Pass(0, busy=1)
    assert shipper.run() == Pass(1)
    assert not shipper.has_doubts
    assert redis.got == [("one", "SUCCESS"), ("two", "SUCCESS")]


def test_a_smaller_doubt_does_not_take_the_place_of_a_larger_one(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a")
    ship(tmp_path, redis)
    shipper = Shipper(tmp_path, redis)
    shipper.doubt(everything=True)
    shipper.doubt(everything=False)
    assert shipper.run() == Pass(1)
    shipper.doubt(everything=False)
    assert shipper.run() == Pass(0)


def test_what_is_doubted_outlives_an_outage(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a")
    shipper = Shipper(tmp_path, redis)
    shipper.run()
    shipper.doubt(everything=True)
    redis.refuses = True
    with pytest.raises(Refused):
        shipper.run()
    redis.refuses = False
    redis.got.clear()
    assert shipper.run() == Pass(1)
    assert redis.got == [("a", "SUCCESS")]


def test_much_is_delivered_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis = Redis()
    monkeypatch.setattr(module, "_MOST", 2)
    for name in "abcde":
        put(tmp_path, name)
    shipper = Shipper(tmp_path, redis)
    shipper.run()
    shipper.doubt(everything=True)
    redis.got.clear()
    assert [shipper.run(patience=-1.0) for _ in range(3)] == [Pass(2, cut=1), Pass(2, cut=1), Pass(1)]
    assert not shipper.has_doubts
    assert [name for name, _ in redis.got] == list("abcde")


def test_a_folder_keeps_its_name(tmp_path: Path) -> None:
    name, is_new = Shipper(tmp_path, Redis()).name()
    assert name
    assert is_new
    put(tmp_path, "a")
    ship(tmp_path, Redis())
    assert Shipper(tmp_path, Redis()).name() == (name, False)


def test_a_folder_where_nothing_can_be_kept_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert Shipper(tmp_path, Redis()).name()[0] == ""


def at(folder: Path, day: str, task_id: str = "a", **fields: Any) -> Path:
    moment = datetime.fromisoformat(f"{day}T12:00:00+00:00").timestamp()
    journal = Journal(folder, "n", clock=lambda: moment)
    journal.append(Record(task_id=task_id, status="SUCCESS", key="k", payload="{}", **fields))
    journal.close()
    return journal.path()


TODAY = date(2026, 11, 21)


def test_only_old_files_of_which_all_is_settled_are_removed(tmp_path: Path) -> None:
    redis = Redis()
    old, young = at(tmp_path, "2026-11-10", "old"), at(tmp_path, "2026-11-14", "young")
    shipper = Shipper(tmp_path, redis)
    assert shipper.discard(7, 0, TODAY) == []  # not delivered yet
    shipper.run()
    at(tmp_path, "2026-11-10", "late")
    assert shipper.discard(7, 0, TODAY) == []  # not all of it
    shipper.run()
    assert shipper.discard(0, 0, TODAY) == []
    with old.open("ab") as file:
        file.write(b'{"v": 1, "shipped": 0, "task')  # its writer was killed
    shipper.run()
    assert shipper.discard(7, 0, TODAY) == [old]
    assert Journal.files(tmp_path) == [young]
    assert shipper.run() == Pass(0, 0)


def test_too_much_costs_the_oldest_files_but_never_today_s(tmp_path: Path) -> None:
    files = [at(tmp_path, f"2026-11-{day}") for day in (18, 19, 20, 21)]
    size = files[0].stat().st_size
    shipper = Shipper(tmp_path, Redis())
    shipper.run()
    assert shipper.discard(0, 4 * size, TODAY) == []
    assert shipper.discard(0, 3 * size - 1, TODAY) == files[:2]
    assert shipper.discard(0, 1, TODAY) == [files[2]]
    assert Journal.files(tmp_path) == [files[3]]


def test_a_file_without_a_day_in_its_name_is_nobodys_to_remove(tmp_path: Path) -> None:
    Journal.single(tmp_path / "mine.jsonl").append(Record(task_id="a", status="SUCCESS"))
    shipper = Shipper(tmp_path, Redis())
    shipper.run()
    assert shipper.discard(1, 1, TODAY) == []


def test_two_never_ship_the_same_file_and_do_not_wait_for_each_other(tmp_path: Path) -> None:
    put(tmp_path, "a", node="one")
    put(tmp_path, "b", node="two")
    second, told = Redis(), []

    def deliver(records: Sequence[Record]) -> list[bytes]:
        if records and not told:
            told.append(Shipper(tmp_path, second).run())
        return [SHIPPED] * len(records)

    assert Shipper(tmp_path, deliver).run() == Pass(1)
    assert told == [Pass(1, busy=1)]
    assert second.got == [("b", "SUCCESS")]
    assert digits(tmp_path) == [1, 1]


def test_a_fork_in_between_does_not_keep_the_lock(tmp_path: Path) -> None:
    put(tmp_path, "a")
    reader, writer = os.pipe()
    children = []

    def deliver(records: Sequence[Record]) -> list[bytes]:
        if not (pid := os.fork()):
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        children.append(pid)
        return [SHIPPED] * len(records)

    assert Shipper(tmp_path, deliver).run() == Pass(1)
    os.close(reader)
    put(tmp_path, "b")
    assert ship(tmp_path, Redis()) == Pass(1)
    os.close(writer)
    for pid in children:
        os.waitpid(pid, 0)


def test_who_follows_leaves_what_is_young_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redis, starts = Redis(), []
    shipper = Shipper(tmp_path, redis, part_grace=60.0, grace=60.0)

    def watched(lines: Any, path: Any, tally: Any, start: int, **options: Any) -> Any:
        starts.append(start)
        return read_lines(lines, path, tally, start, **options)

    monkeypatch.setattr(module, "read_lines", watched)
    put(tmp_path, "part", chord=True)
    (file,) = Journal.files(tmp_path)
    ends = [file.stat().st_size]
    for name in "abc":
        put(tmp_path, name, in_hand=name == "b")
        shipper.follow(file)
        ends.append(file.stat().st_size)
    assert starts == [0, *ends[1:3]]
    assert [name for name, _ in redis.got] == ["a", "c"]
    shipper.grace = 0.0
    assert shipper.run() == Pass(1, 1)
    assert Shipper(tmp_path, redis).run() == Pass(1)
    assert [name for name, _ in redis.got] == ["a", "c", "b", "part"]


def test_several_nodes_in_one_folder(tmp_path: Path) -> None:
    redis = Redis()
    put(tmp_path, "a", node="one")
    put(tmp_path, "b", node="two")
    assert ship(tmp_path, redis) == Pass(2, 0)


def test_what_is_followed_is_delivered_as_it_comes_whatever_becomes_of_the_file(tmp_path: Path) -> None:
    redis, journal = Redis(), Journal(tmp_path, "n")
    shipper = Shipper(tmp_path, redis)

    def write(task_id: str) -> None:
        journal.append(Record(task_id=task_id, status="SUCCESS", key="k", payload="{}"))

    assert shipper.follow(journal.path()).delivered == 0  # there is none yet
    for name in "ab":
        write(name)
        assert shipper.follow(journal.path()).delivered == 1
    assert shipper.follow(journal.path()).delivered == 0
    write("c")
    journal.path().unlink()
    write("d")
    assert shipper.follow(journal.path()).delivered == 2
    journal.close()
    write("e")  # to a new file
    assert shipper.follow(journal.path()).delivered == 1
    write("f")
    assert shipper.follow(tmp_path / "another day").delivered == 1
    redis.refuses = True
    write("g")
    with pytest.raises(Refused):
        shipper.follow(journal.path())
    redis.refuses = False
    assert shipper.follow(journal.path()).delivered == 1
    assert [name for name, _ in redis.got] == list("abcdefg")
    descriptors = len(os.listdir("/proc/self/fd"))
    shipper.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1


def test_of_one_task_what_is_pending_is_found_and_forgotten(tmp_path: Path) -> None:
    redis = Redis()
    for task_id, status in (("a", "STARTED"), ("b", "SUCCESS"), ("a", "SUCCESS"), ('"a', "SUCCESS")):
        put(tmp_path, task_id, status, payload='{"task_id":"a","status":"SUCCESS"}')
    put(tmp_path, "a", "RETRY", shipped=True)
    put(tmp_path, "a", "FAILURE", node="other")
    (tmp_path / "empty-2026-01-01.jsonl").touch()
    shipper = Shipper(tmp_path, redis)
    assert [entry.record.status for entry in shipper.pending("a")] == ["STARTED", "SUCCESS", "FAILURE"]
    assert shipper.pending("nobody") == []
    shipper.forget("a", 1.0)
    assert shipper.pending("a") == []
    ship(tmp_path, redis)
    assert redis.got == [("b", "SUCCESS"), ('"a', "SUCCESS")]
    assert shipper.pending("b") == []


def test_a_large_backlog_in_constant_memory(tmp_path: Path) -> None:
    redis = Redis()
    journal = Journal(tmp_path, "n")
    for number in range(2000):
        journal.append(Record(task_id=str(number), status="SUCCESS", key="k", payload="{}"))
    assert ship(tmp_path, redis) == Pass(2000, 0)
    assert max(redis.batches) == module._MOST
