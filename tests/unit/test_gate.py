"""Handlers of signals wait while the pool is in the middle of something."""

from __future__ import annotations

import signal
import threading

import pytest

from mpworker.celery.gate import SignalGate


@pytest.fixture
def heard():
    """Names of the handlers that have run; ``heard.by(name)`` makes one. Handlers are restored afterwards."""

    class Heard(list):
        def by(self, name):
            return lambda signum, frame: self.append(name)

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)}
    yield Heard()
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def gate(heard):
    signal.signal(signal.SIGTERM, heard.by("term"))
    signal.signal(signal.SIGQUIT, heard.by("quit"))
    gate = SignalGate()
    gate.connect()
    yield gate
    gate.disconnect()


def test_handlers_run_at_once_outside_and_later_inside_in_order(gate, heard):
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["term"]
    with gate, gate:
        signal.raise_signal(signal.SIGQUIT)
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["term"]
    assert heard == ["term", "quit", "term"]


def test_they_run_after_an_error_too(gate, heard):
    def fails():
        with gate:
            signal.raise_signal(signal.SIGTERM)
            raise OSError("in between")

    with pytest.raises(OSError, match="in between"):
        fails()
    assert heard == ["term"]


def test_a_handler_that_puts_another_one_in_its_place(gate, heard):
    def first(signum, frame):
        heard.append("first")
        signal.signal(signal.SIGINT, heard.by("second"))

    gate.disconnect()
    signal.signal(signal.SIGINT, first)
    gate.connect()
    signal.raise_signal(signal.SIGINT)
    with gate:
        signal.raise_signal(signal.SIGINT)
        assert heard == ["first"]
    assert heard == ["first", "second"]


def test_a_handler_may_use_what_waits_for_it(gate, heard):
    def uses(signum, frame):
        with gate:
            heard.append("used")

    signal.signal(signal.SIGTERM, uses)
    gate.connect()
    with gate:
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
    assert heard == ["used"]


def test_an_ended_pool_leaves_the_handlers_as_they_were(heard):
    mine = heard.by("mine")
    signal.signal(signal.SIGTERM, mine)
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    gate = SignalGate()
    gate.connect()
    assert signal.getsignal(signal.SIGTERM) is not mine
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN
    signal.raise_signal(signal.SIGTERM)
    gate.disconnect()
    gate.disconnect()
    assert heard == ["mine"]
    assert signal.getsignal(signal.SIGTERM) is mine


def test_a_pool_in_another_thread_holds_nothing_back(heard):
    mine = heard.by("mine")
    signal.signal(signal.SIGTERM, mine)
    inside, end = threading.Event(), threading.Event()

    def other():
        gate = SignalGate()
        gate.connect()
        with gate:
            inside.set()
            end.wait(30)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["mine"]
    assert signal.getsignal(signal.SIGTERM) is mine
    end.set()
    thread.join()
