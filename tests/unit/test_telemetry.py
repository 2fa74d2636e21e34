"""What instrumentations hold back is sent, but not at any price."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest

from mpworker.celery import telemetry


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _, _ in telemetry._HOLDERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def _load(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))  # type: ignore[arg-type]


def test_what_is_loaded_is_asked_and_nothing_is_loaded_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    _load(monkeypatch, "sentry_sdk", flush=lambda: asked.append("sentry"))
    provider = SimpleNamespace(force_flush=lambda: asked.append("spans"))
    _load(monkeypatch, "opentelemetry.trace", get_tracer_provider=lambda: provider)
    _load(monkeypatch, "opentelemetry.metrics", get_meter_provider=lambda: object())  # only the API is there
    telemetry.flush()
    assert asked == ["sentry", "spans"]
    assert "opentelemetry._logs" not in sys.modules


def test_one_that_fails_is_no_obstacle_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fails() -> None:
        raise OSError("no network")

    _load(monkeypatch, "sentry_sdk", flush=fails)
    _load(monkeypatch, "opentelemetry.trace", get_tracer_provider=fails)
    provider = SimpleNamespace(force_flush=lambda: asked.append("metrics"))
    _load(monkeypatch, "opentelemetry.metrics", get_meter_provider=lambda: provider)
    telemetry.flush()
    assert asked == ["metrics"]


def test_one_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, began = threading.Event(), threading.Event()

    def flush() -> None:
        began.set()
        hangs.wait()

    monkeypatch.setattr(telemetry, "_HOLDERS", (("sentry_sdk", "", 0.01),))
    _load(monkeypatch, "sentry_sdk", flush=flush)
    try:
        telemetry.flush()
        assert began.wait(10)
    finally:
        hangs.set()
