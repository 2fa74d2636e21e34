"""A signal ends the wait of the event loop."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
from kombu.asynchronous import Hub

from mpworker.celery.wakeup import SignalWakeup


@pytest.fixture
def hub():
    hub = Hub()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    yield hub
    signal.signal(signal.SIGUSR1, before)
    hub.close()


def test_a_signal_ends_the_wait_of_the_loop(hub):
    wakeup = SignalWakeup()
    for _ in range(2):  # the second time is after a reconnect
        hub.reset()
        wakeup.connect(hub)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        begun = time.monotonic()
        ((fd, _),) = hub.poller.poll(20.0)
        assert time.monotonic() - begun < 10.0
        function, args = hub.readers[fd]
        function(*args)
        assert not hub.poller.poll(0.0)
    wakeup.disconnect()
    wakeup.disconnect()
    assert hub.readers == {}
    assert signal.set_wakeup_fd(-1) == -1


def test_what_somebody_else_has_set_stays(hub):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        signal.set_wakeup_fd(ours.fileno())
        try:
            wakeup = SignalWakeup()
            wakeup.connect(hub)
            wakeup.disconnect()
            assert hub.readers == {}
        finally:
            assert signal.set_wakeup_fd(-1) == ours.fileno()


def test_in_another_thread_there_is_nothing_to_wake(hub):
    thread = threading.Thread(target=SignalWakeup().connect, args=(hub,))
    thread.start()
    thread.join()
    assert hub.readers == {}
