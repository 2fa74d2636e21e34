"""The result store: which record is a task's state, filters, pages and counts."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mpworker.errors import StoreError
from mpworker.results import query as module
from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.record import SUPERSEDED, Record


@pytest.fixture(params=["noted", "searched"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are noted task by task, large ones searched: what is found is the same."""
    if request.param == "searched":
        monkeypatch.setattr(module, "_LARGE", -1)


def at(second: float) -> str:
    return (datetime(2026, 5, 1, tzinfo=UTC) + timedelta(seconds=second)).isoformat(timespec="microseconds")


def celery(task_id: str, status: str, second: float, **more: object) -> Record:
    values: dict[str, object] = {"name": "proj.add", "key": f"celery-task-meta-{task_id}", "payload": "{}", **more}
    return Record(task_id=task_id, status=status, timestamp=at(second), **values)  # type: ignore[arg-type]


def store_of(folder: Path, *records: Record, node: str = "n") -> ResultStore:
    journal = Journal(folder, node)
    for record in records:
        journal.append(record)
    return ResultStore(folder)


@pytest.mark.parametrize("name", ["journal", "results.jsonl"])
def test_the_classic_calls(tmp_path: Path, name: str) -> None:
    store = ResultStore(tmp_path / name)
    assert store.get_statistics()["total_tasks"] == 0
    store.add_result("1", "completed", "fine", {"answer": 42})
    store.add_result("2", "failed", "ValueError: no", timestamp=datetime(2026, 1, 1, tzinfo=UTC))
    store.add_result("3", "running", "")
    (done,) = ResultStore(tmp_path / name).get_results_by_status("completed")
    assert (done["task_id"], done["status"], done["message"]) == ("1", "completed", "fine")
    assert done["response_data"] == {"answer": 42}
    (failed,) = store.get_results_by_status("FAILURE")
    assert failed.timestamp == "2026-01-01T00:00:00.000000+00:00"
    stats = store.get_statistics()
    assert (stats["total_tasks"], stats["completed"], stats["failed"], stats["running"]) == (3, 1, 1, 1)
    assert stats["success_rate"] == 50.0


def test_a_later_started_never_displaces_a_terminal_state(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        celery("a", "STARTED", 0),
        celery("a", "FAILURE", 1),
        celery("a", "STARTED", 2),
        celery("b", "STARTED", 3),
    )
    assert [r.status for r in store.query()] == ["FAILURE", "STARTED"]


def test_the_latest_terminal_state_counts_but_celerys_success_stays(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        celery("redelivered", "FAILURE", 1),
        celery("redelivered", "SUCCESS", 2),
        celery("late", "SUCCESS", 3),
        celery("late", "FAILURE", 4),
    )
    assert {r.task_id: r.status for r in store.query()} == {"redelivered": "SUCCESS", "late": "SUCCESS"}
    store.add_result("mine", "completed", "")
    store.add_result("mine", "failed", "after all")
    assert [r.task_id for r in store.query(status="failed")] == ["mine"]


def test_records_of_two_nodes_are_ordered_by_time(tmp_path: Path) -> None:
    store_of(tmp_path, celery("a", "FAILURE", 5), node="a")
    store = store_of(tmp_path, celery("a", "REVOKED", 3), celery("b", "SUCCESS", 4), node="b")
    assert [(r.task_id, r.status) for r in store.query()] == [("b", "SUCCESS"), ("a", "FAILURE")]


def test_a_superseded_record_counts_for_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "n")
    journal.append(celery("a", "STARTED", 0))
    journal.mark(journal.append(celery("a", "FAILURE", 1)), SUPERSEDED)
    assert [r.status for r in ResultStore(tmp_path).query()] == ["STARTED"]


def test_filters_and_pages(tmp_path: Path) -> None:
    store = store_of(
        tmp_path,
        *(celery(str(i), "SUCCESS" if i % 2 else "FAILURE", i, name=f"proj.t{i % 3}") for i in range(9)),
    )
    assert [r.task_id for r in store.query(status="failure")] == ["0", "2", "4", "6", "8"]
    assert [r.task_id for r in store.query(status="succeeded", limit=2)] == ["1", "3"]
    assert [r.task_id for r in store.query(name="proj.t1")] == ["1", "4", "7"]
    assert [r.task_id for r in store.query(name="*.t[02]", newest_first=True, limit=3)] == ["8", "6", "5"]
    assert list(store.query(limit=0)) == []
    assert list(store.query(status="nonsense")) == []
    assert [r.task_id for r in store.query(since=at(7))] == ["7", "8"]
    assert [r.task_id for r in store.query(since=datetime.fromisoformat(at(8)))] == ["8"]


def test_since_an_age(tmp_path: Path) -> None:
    store, now = ResultStore(tmp_path), time.time()
    for hours in (30, 3, 1):
        store.add_result(f"{hours}h", "completed", "", timestamp=now - hours * 3600)
    assert [r.task_id for r in store.query(since="2h")] == ["1h"]
    assert [r.task_id for r in store.query(since="1d")] == ["3h", "1h"]
    assert [r.task_id for r in store.query(since="1.5d")] == ["30h", "3h", "1h"]
    assert [r.task_id for r in store.query(since=90 * 60)] == ["1h"]


@pytest.mark.parametrize("bad", [{"since": "yesterday"}, {"since": []}, {"since": float("nan")}, {"limit": -1}])
def test_nonsense_is_refused_at_the_call(tmp_path: Path, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"since|limit"):
        ResultStore(tmp_path).query(**bad)  # type: ignore[arg-type]


def test_bad_results_are_refused(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    with pytest.raises(ValueError, match="timestamp"):
        store.add_result("1", "completed", "", timestamp="soon")
    with pytest.raises(ValueError, match="empty"):
        store.add_result("", "completed", "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot append"):
        ResultStore(tmp_path / "file" / "below").add_result("1", "completed", "")


def test_statistics(tmp_path: Path) -> None:
    runtimes = [0.1 * n for n in range(1, 11)]
    store = store_of(
        tmp_path,
        *(celery(f"ok{n}", "SUCCESS", n, runtime=runtime) for n, runtime in enumerate(runtimes)),
        celery("again", "RETRY", 10, retries=0),
        celery("retried", "RETRY", 11, retries=0),
        celery("retried", "FAILURE", 12, retries=1),
        celery("gone", "REVOKED", 13),
        celery("now", "PROGRESS", 20),
    )
    stats = store.get_statistics()
    counts = {n: stats[n] for n in ("total_tasks", "completed", "failed", "revoked", "running", "pending", "retried")}
    assert counts == {
        "total_tasks": 14,
        "completed": 10,
        "failed": 1,
        "revoked": 1,
        "running": 1,
        "pending": 1,
        "retried": 2,
    }
    assert stats["success_rate"] == pytest.approx(1000 / 11)
    assert stats["mean_runtime"] == pytest.approx(0.55)
    assert stats["p50_runtime"] == pytest.approx(0.55)
    assert stats["p95_runtime"] == pytest.approx(0.955)
    assert stats["max_runtime"] == pytest.approx(1.0)
    assert (stats["first_timestamp"], stats["last_timestamp"]) == (at(0), at(20))
    assert stats["throughput"] == pytest.approx(12 / 20)
    assert stats["torn_lines"] == 0


def test_an_empty_store_has_statistics(tmp_path: Path) -> None:
    stats = ResultStore(tmp_path / "none").get_statistics()
    assert (stats["total_tasks"], stats["success_rate"], stats["throughput"]) == (0, 0.0, 0.0)
    assert stats["p95_runtime"] is stats["first_timestamp"] is None
    assert json.dumps(stats)


def test_a_revoke_that_knows_no_name_leaves_the_name(tmp_path: Path) -> None:
    store = store_of(tmp_path, celery("a", "STARTED", 0), celery("a", "REVOKED", 1, name=None))
    (record,) = store.query(name="proj.*")
    assert (record.status, record.name) == ("REVOKED", "proj.add")


def test_only_what_is_new_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(tmp_path, *(celery(str(i), "SUCCESS", i) for i in range(20)))
    (path,) = Journal.files(tmp_path)
    with path.open("ab") as file:
        file.write(b"garbage\n")
    assert store.get_statistics()["total_tasks"] == 20
    read: list[str] = []
    real = module.seen_of
    monkeypatch.setattr(module, "seen_of", lambda found, *place: read.append(found.task_id) or real(found, *place))
    store.add_result("new", "completed", "")
    with path.open("ab") as file:
        file.write(celery("half", "SUCCESS", 1).to_line()[:60])
    for _ in range(3):
        stats = store.get_statistics()
        assert (stats["total_tasks"], stats["torn_lines"]) == (21, 1)
    assert read == ["new"]


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store_of(tmp_path / "journal", celery("a", "SUCCESS", 1))
    assert ResultStore("~/journal").get_statistics()["total_tasks"] == 1


def test_a_file_that_was_removed_or_replaced_is_forgotten(tmp_path: Path) -> None:
    store = store_of(tmp_path, *(celery(str(i), "SUCCESS", i) for i in range(5)))
    assert store.get_statistics()["total_tasks"] == 5
    (path,) = Journal.files(tmp_path)
    found = store.query()
    path.unlink()
    assert list(found) == []
    assert store.get_statistics()["total_tasks"] == 0
    store_of(tmp_path, celery("new", "SUCCESS", 1))
    assert [r.task_id for r in store.query()] == ["new"]


def test_a_timestamp_that_is_none_is_counted_as_torn(tmp_path: Path) -> None:
    store = store_of(tmp_path, Record(task_id="a", status="SUCCESS", timestamp="noon"))
    assert store.get_statistics()["torn_lines"] == 1
    assert store.get_statistics()["p50_runtime"] is None
