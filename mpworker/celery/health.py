"""Whether an application's nodes can do their work: broker, results, journal, disk, the nodes themselves.

Owns the questions. Never changes anything, never waits longer than it is told to.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from celery import Celery

from mpworker.celery.backend import ResultBackend
from mpworker.celery.steps import connect_once, masked
from mpworker.results.record import describe
from mpworker.results.shipper import Shipper

#: Bytes that should be free where the journal is.
_ENOUGH = 64 << 20
#: Seconds that a result may wait for Redis before that is worth a word.
_LONG = 60.0


class Finding(NamedTuple):
    """The answer to one question."""

    about: str
    well: bool
    text: str


def look(app: Celery, folder: Path, patience: float) -> Iterator[Finding]:
    """Asks one after the other.

    Args:
        folder: of the journal of this machine's node.
        patience: seconds that each answer may take.
    """
    yield _broker(app, patience)
    yield _results(app)
    yield from _journal(app, folder)
    yield from _nodes(app, patience)


def _broker(app: Celery, patience: float) -> Finding:
    url = masked(app.conf.broker_read_url)
    try:
        connect_once(app, patience)
    except Exception as exc:  # whatever a transport raises
        return Finding("broker", False, f"{url} does not answer: {describe(exc)}")
    return Finding("broker", True, url)


def _results(app: Celery) -> Finding:
    backend = app.backend
    if not isinstance(backend, ResultBackend):
        return Finding("results", True, f"{type(backend).__name__}, which is not asked")
    try:
        backend.quick_client.ping()
    except backend.outages as exc:
        return Finding("results", False, f"{backend.as_uri()} does not answer: {describe(exc)}")
    return Finding("results", True, backend.as_uri())


def _journal(app: Celery, folder: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        yield Finding("journal", True, f"{folder} is not there; a node makes it")
        return
    store = app.backend.store_name if isinstance(app.backend, ResultBackend) else None
    waiting, oldest, broken = Shipper(folder, lambda _: (), store=store).backlog()
    age = time.time() - oldest if waiting else 0.0
    state = f"{waiting:,} results wait for Redis, the first for {age:,.0f} s" if waiting else "all is in Redis"
    state += f"; {broken:,} broken lines are passed over" if broken else ""
    yield Finding("journal", age < _LONG, f"{folder}: {state}")
    free = shutil.disk_usage(folder).free
    yield Finding("disk", free > _ENOUGH, f"{free >> 20:,} MiB are free for the journal")


def _nodes(app: Celery, patience: float) -> Iterator[Finding]:
    try:
        stats: dict[str, Any] = app.control.inspect(timeout=patience).stats() or {}
    except Exception as exc:  # whatever a transport raises
        yield Finding("nodes", False, f"cannot be asked: {describe(exc)}")
        return
    if not stats:
        yield Finding("nodes", False, f"none has answered within {patience:g} s")
    for name, told in sorted(stats.items()):
        pool = told.get("pool") or {}
        processes = pool.get("processes") or []
        text = f"{name}: {len(processes)} processes, {sum((told.get('total') or {}).values()):,} tasks taken"
        counts = {what: count for what, count in (pool.get("results") or {}).items() if count}
        stalls = (told.get("mpworker") or {}).get("stalls", 0)
        counts |= {"times its consumer was deaf": stalls} if stalls else {}
        text += "".join(f"; {count:,} {what}" for what, count in counts.items())
        yield Finding("node", bool(processes), text)
