"""A record and its line: what goes in comes out, and nothing that a task returns can break a line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpworker.results import record as module
from mpworker.results.glance import glance_at
from mpworker.results.reader import Tally
from mpworker.results.record import (
    OPENING,
    SHIPPED_AT,
    Glance,
    Record,
    canonical,
    describe,
    displaces,
    is_alone,
    runtime_of,
    task_begins,
    task_ends,
    timestamp_of,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(task_id=st.text(min_size=1), message=st.text(), result=JSON, payload=st.none() | st.text() | st.binary())
def test_everything_survives_the_way_through_a_line(
    task_id: str, message: str, result: object, payload: object
) -> None:
    record = Record(
        task_id=task_id,
        status="SUCCESS",
        message=message,
        result=result,
        payload=payload,  # type: ignore[arg-type]
        runtime=0.25,
        retries=2,
        key="celery-task-meta-x",
        expires=60,
        shipped=True,
    )
    line = record.to_line()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert line.isascii()
    assert Record.from_line(line) == record


def test_a_line_is_plain_json_with_the_documented_fields() -> None:
    line = Record(task_id="a", status="FAILURE", message="ValueError: no").to_line()
    data = json.loads(line)
    assert data["v"] == 1
    assert data["shipped"] == 0
    documented = "task_id name status message result traceback timestamp runtime process_id hostname retries"
    assert list(data)[2:] == [*documented.split(), "key", "payload", "expires"]
    assert datetime.fromisoformat(data["timestamp"]).tzinfo == UTC


def test_a_log_is_a_field_only_where_there_is_one() -> None:
    record = Record(task_id="a", status="FAILURE", log='said "é"\n')
    line = record.to_line()
    assert list(json.loads(line))[-1] == "log"
    assert Record.from_line(line) == record
    assert record["log"] == record.log == 'said "é"\n'
    assert Record.from_line(Record(task_id="a", status="FAILURE").to_line()).log is None


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def _endless() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"when": datetime(2026, 1, 2)}, {"when": "datetime.datetime(2026, 1, 2, 0, 0)"}),
        ({1, 2}, "{1, 2}"),
        (float("nan"), "nan"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        (_endless(), "[[...]]"),
        (_Unprintable(), "<_Unprintable, whose repr raised RuntimeError>"),
        ("\ud800", "\ud800"),
        ("a\nb\u2028c", "a\nb\u2028c"),
    ],
)
def test_what_json_cannot_hold_becomes_its_repr(value: object, expected: object) -> None:
    record = Record.from_line(Record(task_id="a", status="SUCCESS", result=value).to_line())
    assert record.result == expected


def test_the_opening_and_the_digit_stand_at_their_place_and_nowhere_else() -> None:
    inner = Record(task_id="inner", status="SUCCESS")
    nested = json.loads(inner.to_line())
    outer = Record(task_id="outer", status="SUCCESS", result=[nested, inner.to_line().decode()])
    line = outer.to_line()
    assert line.count(OPENING) == 1
    assert line[SHIPPED_AT : SHIPPED_AT + 1] == b"0"
    changed = line[:SHIPPED_AT] + b"1" + line[SHIPPED_AT + 1 :]
    assert Record.from_line(changed).shipped


def test_unknown_fields_are_passed_over() -> None:
    data = json.loads(Record(task_id="a", status="SUCCESS").to_line())
    line = json.dumps({**data, "v": 2, "colour": "red"}).encode()
    assert Record.from_line(line).task_id == "a"


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"[]", b'{"v": 1}', b'{"task_id": 1, "status": "SUCCESS", "timestamp": ""}', b"\xff\xfe"]
)
def test_what_is_no_record_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Record.from_line(line)


def test_every_proper_beginning_of_a_line_is_torn() -> None:
    line = Record(task_id="a", status="SUCCESS", result={"a": [1, 2]}).to_line()
    for length in range(len(line) - 1):
        with pytest.raises(ValueError):  # noqa: PT011
            Record.from_line(line[:length])


def test_a_record_reads_like_a_mapping() -> None:
    record = Record(task_id="a", status="SUCCESS", result=3)
    assert record["status"] == "SUCCESS"
    assert record["response_data"] == record.get("result") == 3
    assert record.get("to_line") is None
    assert dict(record)["task_id"] == "a"  # type: ignore[call-overload]
    with pytest.raises(KeyError):
        record["nothing"]


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("failed", "FAILURE"),
        ("Completed", "SUCCESS"),
        ("success", "SUCCESS"),
        ("in progress", "STARTED"),
        ("odd", "ODD"),
    ],
)
def test_canonical(text: str, state: str) -> None:
    assert canonical(text) == state


def test_describe() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise TypeError

    assert describe(ValueError("text")) == "ValueError: text"
    assert describe(ValueError()) == "ValueError"
    assert describe(Mute()).endswith("its text cannot be shown: TypeError>")


def test_the_runtime_is_known_only_for_the_task_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: 12.5)
    assert runtime_of("a") is None
    task_begins("a", at=10.0)
    assert runtime_of("a") == 2.5
    assert runtime_of("b") is None
    assert not is_alone("a")
    task_ends()
    assert runtime_of("a") is None


def test_a_task_may_be_its_nodes_only_one() -> None:
    task_begins("a", alone=True)
    assert is_alone("a")
    assert not is_alone("b")
    task_ends()
    assert not is_alone("a")


def test_a_dead_message_is_marked_and_lines_of_others_and_of_older_versions_read_as_before() -> None:
    assert Record.from_line(Record(task_id="a", status="FAILURE", dead=True).to_line()).dead
    line = Record(task_id="a", status="FAILURE").to_line()
    assert b"dead" not in line
    assert not Record.from_line(line).dead
    assert not Record.from_line(line.replace(b'"expires"', b'"dead":"no","expires"')).dead


#: Text that looks like a piece of a line, besides any text.
TRICKS = st.sampled_from(
    [
        '","timestamp":"',
        ',"timestamp":"x","runtime":1,',
        '{"v": 1, "shipped": 0, ',
        '"',
        "\\",
        "é",
        "\n",
        "a.b",
        "celery@h",
    ]
)
TEXT = st.text(max_size=8) | TRICKS | st.lists(TRICKS, max_size=3).map("".join)
TREE = st.recursive(
    TEXT | st.integers(0, 9) | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT | st.just("timestamp"), inner, max_size=3),
    max_leaves=6,
)


@given(
    values=st.fixed_dictionaries(
        {"task_id": TEXT, "status": TEXT, "message": TEXT, "result": TREE},
        optional={
            "name": st.none() | TEXT,
            "traceback": st.none() | TEXT,
            "runtime": st.none() | st.floats(0, 1e9) | st.sampled_from([1e-9, 0.1 + 0.2, 12345678.9]),
            "hostname": TEXT,
            "retries": st.integers(0, 99),
            "key": st.none() | TEXT,
            "payload": st.none() | TEXT | st.binary(max_size=5),
            "expires": st.none() | st.integers(0, 9),
            "store": st.none() | TEXT,
            "log": st.none() | TEXT,
            "shipped": st.booleans(),
            "superseded": st.booleans(),
            "dead": st.booleans(),
            "chord": st.booleans(),
        },
    )
)
def test_a_glance_sees_what_a_reader_reads(values: dict[str, object]) -> None:
    line = Record(**values).to_line()  # type: ignore[arg-type]
    ((seen, _),) = glance_at(line, Path("of.jsonl"), 0, Tally())
    assert seen == Glance.at(Record.from_line(line))


@pytest.mark.parametrize(
    ("old", "new", "later", "displaced"),
    [
        (("SUCCESS", 0), ("FAILURE", 1), 60, False),
        (("FAILURE", 0), ("SUCCESS", 0), 0, True),
        (("FAILURE", 0), ("RETRY", 0), 0.5, False),
        (("FAILURE", 0), ("STARTED", 1), 0.5, True),
        (("FAILURE", 0), ("STARTED", 0), 60, True),
        (("FAILURE", 1), ("RETRY", 0), 60, False),
        (("STARTED", 0), ("RETRY", 0), 0, True),
        (("RETRY", 0), ("STARTED", 0), 0, False),
        (("RETRY", 0), ("STARTED", 1), 0, True),
    ],
)
def test_what_is_true_now(old: tuple[str, int], new: tuple[str, int], later: float, displaced: bool) -> None:
    """A run that speaks late of what another has ended since says nothing; one that begins anew does."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    records = [
        Record(task_id="a", status=status, retries=retries, timestamp=timestamp_of(at + timedelta(seconds=after)))
        for (status, retries), after in ((old, 0), (new, later))
    ]
    assert displaces(records[1], records[0]) is displaced


def test_of_a_line_that_does_not_say_it_nobody_claims_to_be_the_writer() -> None:
    read = Record.from_line(b'{"task_id": "a", "status": "SUCCESS", "timestamp": "x", "retries": "1"}')
    assert (read.process_id, read.hostname, read.retries) == (0, "", 1)


@pytest.mark.parametrize(
    "more", ['"retries": []', '"hostname": 5', '"name": {}', '"expires": "soon"', '"runtime": "long"']
)
def test_a_line_with_values_of_another_kind_is_none(more: str) -> None:
    with pytest.raises(ValueError, match=r"Expected|number|Invalid"):
        Record.from_line(b'{"task_id": "a", "status": "SUCCESS", "timestamp": "x", %b}' % more.encode())


def test_a_glance_at_what_is_broken_is_a_readers() -> None:
    line = Record(task_id="a", name="x", status="SUCCESS", result={"timestamp": "no"}, key="k", payload="{}").to_line()
    half, whole = line[:40] + line, line[:-1]
    for torn in (line[:-2] + b"\n", line[5:], b"\n", b"[]\n", b'{"task_id": 1}\n', line[:30]):
        assert list(glance_at(torn, Path("of.jsonl"), 0, Tally())) == []
    ((seen, offset),) = glance_at(half, Path("of.jsonl"), 100, Tally())
    assert (seen.task_id, seen.key, seen.runtime, offset) == ("a", "k", None, 140)
    assert [seen.task_id for seen, _ in glance_at(whole, Path("of.jsonl"), 0, Tally())] == ["a"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2.5, True, None, "x"], "b": {"1": "ü"}},
        {1: "int", 2.5: "float"},
        {None: 1},
        [float("nan")],
        [float("inf")],
        "NaN",
        1 << 80,
        ["\ud800"],
        (1, 2),
        object,
        [[[[1]]]],
    ],
)
def test_the_quick_way_to_write_a_result_says_the_same_as_the_careful_one(value: object) -> None:
    payload = json.dumps({"result": value}, default=repr)
    quick = Record(task_id="a", status="SUCCESS", result=value, payload=payload)
    careful = msgspec.structs.replace(quick, payload=b"{}")
    assert json.loads(quick.to_line())["result"] == json.loads(careful.to_line())["result"]
    assert quick.to_line().isascii()
