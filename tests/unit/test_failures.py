"""Errbacks that the broker does not take are kept, and tried again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from kombu.exceptions import OperationalError

from mpworker.celery import failures as module
from mpworker.celery.failures import Failures


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


class Broker:
    """A backend whose broker refuses so many times."""

    def __init__(self, refuses, error=OperationalError):
        self.refuses, self.error = refuses, error
        self.attempts, self.sent = 0, []

    def _call_task_errbacks(self, request, error, traceback):
        self.attempts += 1
        if self.attempts <= self.refuses:
            raise self.error("not now")
        self.sent += request.errbacks


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module, "time", clock := Clock())
    return clock


def failures_at(broker, *errbacks):
    failures = Failures(SimpleNamespace())
    failures._keep(broker)(SimpleNamespace(id="i", errbacks=list(errbacks)), ValueError(), None)
    return failures


def test_what_is_not_taken_is_tried_again_in_order_but_not_at_each_turn(clock):
    broker = Broker(2)
    failures = failures_at(broker, "a", "b")
    for _ in range(3):
        failures.send_errbacks()
    assert (broker.attempts, broker.sent) == (1, [])
    clock.now += 6.0
    for _ in range(3):
        failures.send_errbacks()
    assert (broker.attempts, broker.sent) == (2, [])
    clock.now += 6.0
    failures.send_errbacks()
    assert broker.sent == ["a", "b"]


@pytest.mark.parametrize("how", ["at_once", "last"])
def test_some_do_not_wait(clock, how):
    broker = Broker(1)
    failures = failures_at(broker, "a")
    failures.send_errbacks()
    failures.send_errbacks(**{how: True})
    assert broker.sent == ["a"]


def test_the_last_attempt_says_what_is_lost(clock, caplog):
    failures = failures_at(Broker(9), "a")
    failures.send_errbacks(last=True)
    assert "the errback of i is lost with its broker (not now): ['a']" in caplog.text


def test_an_errback_that_cannot_be_sent_at_all_holds_up_no_other(clock, caplog):
    broker = Broker(1, TypeError)
    failures_at(broker, "a", "b").send_errbacks()
    assert broker.sent == ["b"]
    assert "the errback of i failed: ['a']" in caplog.text
