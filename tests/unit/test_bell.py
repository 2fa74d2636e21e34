"""The bell: who rings it learns whether anybody listens, whatever has become of the listener."""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from mpworker.results import bell as module
from mpworker.results.bell import BROKEN, ONLY_IN_REDIS, UNREADABLE, Bell

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has such a bell")


@pytest.fixture
def bell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bell]:
    monkeypatch.setattr(module, "_MOMENT", 0.0)
    bell = Bell()
    yield bell
    bell.close()


def rung(bell: Bell, patience: float = 0.0) -> bool:
    return bool(select.select([bell], [], [], patience)[0])


def listener(bell: Bell) -> int:
    """A process that listens until it is killed, and tells by a byte what it has heard."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, b"y" if bell.listen() else b"n")
        signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"y"
    os.close(reader)
    return pid


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_nobody_listens_at_first_nor_after_the_listener_was_killed(bell: Bell) -> None:
    assert not bell.has_listener()
    pid = listener(bell)
    assert bell.has_listener()
    end(pid)
    assert not bell.has_listener()


def test_ringing_wakes_once_however_often_it_is_rung(bell: Bell) -> None:
    assert not rung(bell)
    for _ in range(3):
        assert bell.ring()
    assert rung(bell)
    bell.quiet()
    bell.quiet()
    assert not rung(bell)


def test_two_do_not_listen(bell: Bell) -> None:
    pid = listener(bell)
    assert not bell.listen()
    end(pid)
    assert bell.listen()


def test_what_user_code_has_opened_in_its_place_is_not_written_to(bell: Bell) -> None:
    fd = bell.fileno()
    kept = os.dup(fd)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), fd)
        assert not bell.ring()
        assert os.fstat(file.fileno()).st_size == 0
    os.dup2(kept, fd)
    os.close(kept)
    assert bell.ring()


def test_who_inherits_its_descriptors_may_be_handed_it(bell: Bell) -> None:
    copy = pickle.loads(pickle.dumps(bell))
    assert copy.ring()
    assert rung(bell)
    pid = listener(bell)
    assert copy.has_listener()
    end(pid)


def counting(bell: Bell) -> int:
    pid = os.fork()
    if pid == 0:
        for _ in range(100):
            bell.count(BROKEN)
        os._exit(0)
    return pid


def test_what_any_process_counts_is_counted_for_all(bell: Bell) -> None:
    assert set(bell.counts().values()) == {0}
    children = [counting(bell) for _ in range(4)]
    for pid in children:
        os.waitpid(pid, 0)
    bell.count(ONLY_IN_REDIS, 7)
    assert bell.counts() == {ONLY_IN_REDIS: 7, BROKEN: 400, UNREADABLE: 0}
    pid = listener(bell)
    bell.count(UNREADABLE)  # the listener's lock is in nobody's way
    assert bell.counts()[UNREADABLE] == 1
    assert bell.has_listener()
    end(pid)


def test_where_the_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="only Linux"):
        Bell()
