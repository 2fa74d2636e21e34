"""``mpworker results`` and ``mpworker stats``: every option, in each form."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import wait_until

from mpworker.cli import cli
from mpworker.results.journal import Journal
from mpworker.results.record import Record


def put(folder: Path, task_id: str, status: str, minute: int, **fields: Any) -> None:
    journal = Journal(folder, fields.get("hostname", "a@here"))
    values = {"name": "shop.add", "hostname": "a@here", "runtime": 0.5, **fields}
    journal.append(
        Record(task_id=task_id, status=status, timestamp=f"2026-11-21T10:{minute:02}:00.000000+00:00", **values)
    )
    journal.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "journal"
    put(folder, "one", "SUCCESS", 1, result=[1, "x"])
    put(folder, "two", "STARTED", 2, runtime=None)
    put(folder, "two", "FAILURE", 3, message="ValueError: no", runtime=2.0)
    put(folder, "three", "FAILURE", 4, message="WorkerLostError: gone", name="shop.mail", hostname="b@there")
    put(folder, "four", "SUCCESS", 5, name="shop.mail", retries=1, runtime=8.0)
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def ids(folder: Path, *args: object) -> list[str]:
    done = run("results", "--path", folder, *args)
    assert done.exit_code == 0, done.output
    return [json.loads(line)["task_id"] for line in done.output.splitlines()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ["one", "two", "three", "four"]),
        (("--status", "failed"), ["two", "three"]),
        (("--status", "success"), ["one", "four"]),
        (("--name", "shop.m*"), ["three", "four"]),
        (("--id", "two"), ["two"]),
        (("--worker", "b@*"), ["three"]),
        (("--since", "2026-11-21T10:03:30+00:00"), ["three", "four"]),
        (("--until", "2026-11-21T10:03:30+00:00"), ["one", "two"]),
        (("--limit", 2), ["three", "four"]),
        (("--limit", 1, "--status", "failed"), ["three"]),
        (("--since", "1m"), []),
    ],
)
def test_filters(folder: Path, options: tuple[object, ...], expected: list[str]) -> None:
    assert ids(folder, *options) == expected


def test_a_pipe_gets_json_without_what_is_for_redis_only(folder: Path) -> None:
    first = json.loads(run("results", "--path", folder).output.splitlines()[0])
    assert first["result"] == [1, "x"]
    assert not {"payload", "key", "expires", "shipped"} & first.keys()
    assert run("results", "--path", folder, "--json").output == run("results", "--path", folder).output


def test_csv(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("results", "--path", folder, "--csv").output)))
    assert [row["task_id"] for row in rows] == ["one", "two", "three", "four"]
    assert json.loads(rows[0]["result"]) == [1, "x"]
    assert rows[1]["message"] == "ValueError: no"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    cli.main([str(arg) for arg in args], standalone_mode=False)
    return capsys.readouterr().out


def test_a_terminal_gets_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = on_a_terminal(monkeypatch, capsys, "results", "--path", folder)
    assert "WorkerLostError: gone" in table
    assert "2026-11-21 10:05:00" in table
    assert "no results" in on_a_terminal(monkeypatch, capsys, "results", "--path", folder, "--name", "nobody")


def test_statistics(folder: Path) -> None:
    (counts,) = [json.loads(line) for line in run("stats", "--path", folder).output.splitlines()]
    assert counts["total_tasks"] == 4
    assert (counts["completed"], counts["failed"], counts["lost"], counts["retried"]) == (2, 2, 1, 1)
    assert counts["success_rate"] == 50.0
    assert counts["p99_runtime"] == pytest.approx(8.0, abs=0.2)
    assert counts["throughput"] == pytest.approx(4 / 240)


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("name", {"shop.add": 2, "shop.mail": 2}),
        ("worker", {"a@here": 3, "b@there": 1}),
        ("hour", {"2026-11-21T10:00Z": 4}),
    ],
)
def test_statistics_by_group(folder: Path, by: str, groups: dict[str, int]) -> None:
    rows = [json.loads(line) for line in run("stats", "--path", folder, "--by", by).output.splitlines()]
    assert {row[by]: row["total_tasks"] for row in rows} == groups


def test_statistics_of_a_time(folder: Path) -> None:
    (counts,) = run("stats", "--path", folder, "--since", "2026-11-21T10:03:30+00:00").output.splitlines()
    assert json.loads(counts)["total_tasks"] == 2


def test_statistics_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = on_a_terminal(monkeypatch, capsys, "stats", "--path", folder)
    slowest = table.split("slowest")[1].split("most failing")[0]
    assert slowest.index("shop.mail") < slowest.index("shop.add")
    assert "50.0 %" in table


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("results", "--path", "/nowhere/at/all"), "there is no /nowhere/at/all"),
        (("results", "--since", "yesterday"), "since must be"),
        (("stats", "--until", "soon"), "until must be"),
        (("results", "--json", "--csv"), "exclude each other"),
        (("results", "--cluster", "--path", "/tmp"), "exclude each other"),
        (("results", "--dead", "--follow"), "only --json and --csv"),
        (("results", "--dead", "--limit", "20"), "only --json and --csv"),
        (("results", "ship", "--path", "/nowhere/at/all"), "there is no journal folder /nowhere/at/all"),
        (("stats", "--by", "colour"), "colour"),
    ],
)
def test_a_typo_is_one_line(args: tuple[str, ...], says: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output


def test_follow_goes_on_with_what_comes(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mpworker", "results", "--path", str(folder), "--limit", "1", "--follow"]
    with out.open("wb") as file, subprocess.Popen(command, stdout=file, env=dict(os.environ)) as process:
        try:
            wait_until(lambda: len(out.read_text().splitlines()) == 1, what="what was there")
            put(folder, "five", "STARTED", 6)
            wait_until(lambda: len(out.read_text().splitlines()) == 2, what="the next record")
            put(folder, "five", "SUCCESS", 7)
            wait_until(lambda: len(out.read_text().splitlines()) == 3, what="its end")
        finally:
            process.terminate()
    told = [(row["task_id"], row["status"]) for row in map(json.loads, out.read_text().splitlines())]
    assert told == [("four", "SUCCESS"), ("five", "STARTED"), ("five", "SUCCESS")]
