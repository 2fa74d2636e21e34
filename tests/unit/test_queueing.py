"""How long a task has waited, as the marks on its message tell it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from mpworker.celery import queueing
from mpworker.celery.queueing import RECEIVED, SENT, waited


def ago(seconds: float) -> float:
    return time.time() - seconds


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({SENT: 30, RECEIVED: 10}, 30),
        ({RECEIVED: 10}, 10),
        ({SENT: -5, RECEIVED: 10}, 10),  # the sender's clock is ahead
        ({RECEIVED: -5}, 0),
    ],
)
def test_from_when_it_was_sent_or_else_received(marks: dict[str, float], expected: float) -> None:
    assert waited({name: ago(seconds) for name, seconds in marks.items()}) == pytest.approx(expected, abs=1.0)


def test_nothing_is_known_of_other_messages() -> None:
    assert waited({}) is None
    assert waited({SENT: "yesterday", RECEIVED: None}) is None


@pytest.mark.parametrize("zone", [UTC, None])
def test_before_its_eta_it_does_not_wait(zone: Any) -> None:
    eta = (datetime.now(UTC) - timedelta(seconds=5)).replace(tzinfo=zone).isoformat()
    assert waited({SENT: ago(60), "eta": eta}) == pytest.approx(5, abs=1.0)
    assert waited({SENT: ago(60), "eta": "soon"}) == pytest.approx(60, abs=1.0)


def test_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    headers: dict[str, Any] = {"task": "proj.add"}
    queueing._sending(headers=headers)
    request = SimpleNamespace(request_dict=headers)
    queueing._received(request)
    assert 0 <= headers[RECEIVED] - headers[SENT] < 1.0
    old: dict[str, Any] = {}
    queueing._sending(headers=old)
    queueing._sending(headers=None)
    assert old == {}
