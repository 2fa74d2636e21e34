"""Results and statistics as text: a table for people, JSON lines or CSV for pipes.

Owns columns and their wording. Asks a :class:`~mpworker.results.query.ResultStore`; reads no file itself.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from mpworker.monitor.views import duration
from mpworker.monitor.views import print_rows as print_table
from mpworker.results.query import ResultStore
from mpworker.results.record import Record, timestamp_now

#: Seconds between two looks of ``--follow``.
_PAUSE = 0.5
#: By how much a record may come after a newer one.
_LATE = timedelta(seconds=60)
#: What of a record is for nobody but Redis.
_INNER = frozenset({"key", "payload", "expires", "shipped", "superseded", "in_hand", "chord", "response_data"})
_MOST_TEXT = 60


def list_results(store: ResultStore, form: str, follow: bool, options: Mapping[str, Any]) -> None:
    """Prints the latest results that fit, oldest first.

    Args:
        form: ``table``, ``json`` or ``csv``.
        follow: goes on with what comes until it is interrupted.
        options: for :meth:`ResultStore.query`; ``limit`` counts from the newest.

    Raises:
        ValueError: a time makes no sense.
    """
    coming = store.from_now()
    found = list(store.query(**{**options, "newest_first": True}))[::-1]
    print_rows([_row(record, form) for record in found], form, "no results")
    if follow:
        newest = max((record.timestamp for record in found), default=timestamp_now())
        for record in _more(coming, newest, {**options, "limit": None}):
            print_rows([_row(record, form)], form, "", header=False)
            sys.stdout.flush()


def _more(store: ResultStore, newest: str, options: dict[str, Any]) -> Iterator[Record]:
    """What is newer than what has been shown, as it comes: perhaps a little later than what is newer still."""

    def latest() -> Iterator[Record]:
        return store.query(**{**options, "since": datetime.fromisoformat(newest) - _LATE})

    known = {record.task_id: record.timestamp for record in latest() if record.timestamp <= newest}
    while True:
        for record in latest():
            if known.get(record.task_id, "") < record.timestamp:
                known[record.task_id] = record.timestamp
                newest = max(newest, record.timestamp)
                yield record
        time.sleep(_PAUSE)


def _row(record: Record, form: str) -> dict[str, Any]:
    if form == "table":
        text = record.message or json.dumps(record.result, ensure_ascii=False, default=str)
        return {
            "time": record.timestamp[:19].replace("T", " "),
            "state": record.status,
            "took": duration(record.runtime),
            "task": record.name or "",
            "id": record.task_id,
            "result": text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 1]}…",
        }
    return {name: record[name] for name in record.keys() if name not in _INNER}  # noqa: SIM118 - no dict


def print_rows(rows: Sequence[Mapping[str, Any]], form: str, nothing: str, *, header: bool = True) -> None:
    """Prints rows that have the same columns.

    Args:
        form: ``table``, ``json`` (one object per line) or ``csv``.
        nothing: what a table says that is empty.
        header: whether names stand above the columns of a table or of CSV.
    """
    if form == "table":
        if rows or nothing:
            print_table(rows, nothing, header=header)
    elif form == "json":
        sys.stdout.writelines(f"{json.dumps(row, default=str)}\n" for row in rows)
    elif rows:
        writer = csv.DictWriter(sys.stdout, list(rows[0]))
        if header:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, dict | list) else value


def print_statistics(store: ResultStore, by: str | None, since: Any, until: Any, as_json: bool) -> None:
    """Prints totals, or one row for each group.

    Args:
        by: ``name``, ``worker`` or ``hour``; ``None``: all together, with what is slowest and what fails most.

    Raises:
        ValueError: a time makes no sense.
    """
    groups, *more = store.get_breakdowns([by] if by else ["all", "name"], since, until)
    if as_json:
        print_rows([{**({by: name} if by else {}), **counts} for name, counts in groups.items()], "json", "")
        return
    print_rows([_counts(by or "", name, counts) for name, counts in groups.items()], "table", "no results")
    for names in more:
        _ranking("slowest", names, "p95_runtime")
        _ranking("most failing", names, "failed")


def _counts(by: str, name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **({by: name} if by else {}),
        "total": f"{counts['total_tasks']:,}",
        "succeeded": f"{counts['completed']:,}",
        "failed": f"{counts['failed']:,}",
        "lost": f"{counts['lost']:,}",
        "retried": f"{counts['retried']:,}",
        "success": f"{counts['success_rate']:.1f} %",
        "per second": f"{counts['throughput']:.3g}",
        "p50": duration(counts["p50_runtime"]),
        "p95": duration(counts["p95_runtime"]),
        "p99": duration(counts["p99_runtime"]),
        "waited p50": duration(counts["p50_queueing"]),
        "p95 ": duration(counts["p95_queueing"]),
        "p99 ": duration(counts["p99_queueing"]),
    }


def _ranking(title: str, names: Mapping[str, Mapping[str, Any]], figure: str) -> None:
    ranked: Iterable[tuple[str, Mapping[str, Any]]] = sorted(
        ((name, counts) for name, counts in names.items() if counts[figure]), key=lambda item: -item[1][figure]
    )
    rows = [_counts(title, name, counts) for name, counts in list(ranked)[:5]]
    if rows:
        sys.stdout.write("\n")
        print_rows(rows, "table", "")
