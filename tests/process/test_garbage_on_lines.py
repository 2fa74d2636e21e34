"""Garbage on the lines of real processes: each says who sent it, ends or replaces that one, and leaves nobody."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import support
from process import faults
from process.bench import bench

from mpworker import WorkerLost
from mpworker.pool import boot as booting
from mpworker.pool import fleet as fleets
from mpworker.pool import handle as handles
from mpworker.pool.frames import Frame, FrameReader, Kind, encode, header
from mpworker.pool.handle import PoolOptions
from mpworker.pool.parcel import pack_call


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 60,
        encode(Kind.DONE, 1),
        encode(Kind.RESIZE, 1 << 40),
        encode(Kind.SUBMIT, 9, 0xF0),
        header(Kind.SUBMIT, 9, 0, 0.0, 0.0, 0, 1 << 60),
    ],
    ids=["noise", "kind", "size", "lane", "length"],
)
def test_a_dispatcher_that_is_sent_garbage_says_so_and_ends(garbage: bytes) -> None:
    """The process itself, which leaves nobody behind."""
    process, line = fleets.launch()
    try:
        line.setblocking(True)
        line.settimeout(support.PATIENCE)
        options = PoolOptions(size=1, start_method="spawn").to_json()
        boot = booting.describe(import_main=False)
        line.sendall(encode(Kind.BOOT, extra=options, body=boot) + encode(Kind.RESIZE, 2) + garbage)
        reader, told = FrameReader("the dispatcher"), []
        while data := line.recv(1 << 16):
            told += reader.feed(data)
        assert process.wait(support.PATIENCE) == 0
        assert [frame for frame in told if frame.kind is Kind.LOG and b"the parent sent" in frame.body]
        assert not [frame for frame in told if frame.kind is Kind.BYE]
    finally:
        line.close()
        process.wait(support.PATIENCE)


def load_garbage(how: str, folder: Path) -> None:
    """A preload that writes to a line that is not its own."""
    if support.Signpost(folder / "once").is_set:
        return
    support.Signpost(folder / "once").set()
    data = {"noise": b"\0" * 60, "kind": encode(Kind.DONE, 1)}[how]
    for descriptor in range(3, 64):
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:
            continue
        if sock.family == socket.AF_UNIX and sock.type == socket.SOCK_STREAM:
            sock.sendall(data)
        sock.detach()


@pytest.mark.parametrize("how", ["noise", "kind"])
def test_a_template_that_sends_garbage_is_replaced(how: str, tmp_path: Path) -> None:
    handle = handles.make(PoolOptions(size=1), preload=(load_garbage, (how, tmp_path)), import_main=False)
    handle.start()
    try:
        job = handle.next_id()
        handle.submit(job, pack_call(support.give, (5,), {}))
        told: list[Frame] = []
        while not any(frame.kind is Kind.DONE for frame in told) and handle.wait(support.PATIENCE):
            told += handle.drain()
        logged = b"\n".join(frame.body for frame in told if frame.kind is Kind.LOG)
        assert b"the template sent" in logged
        assert handle.generation == 0
        assert any(frame.kind is Kind.DONE and frame.job == job for frame in told)
    finally:
        handle.kill()


def write_garbage_unheard(log: Path) -> None:
    """Nobody reads the garbage before this worker has done much more: the dispatcher stands still meanwhile."""
    dispatcher = os.getppid()
    os.kill(dispatcher, signal.SIGSTOP)
    threading.Timer(0.2, os.kill, (dispatcher, signal.SIGCONT)).start()
    faults.write_garbage()
    note(log)


def note(log: Path) -> bytes:
    """What it returns fills a page quickly, so that results leave."""
    support.append(log, os.getpid())
    return b"x" * (20 << 10)


def test_what_a_worker_did_behind_garbage_is_lost_and_not_done_again(tmp_path: Path) -> None:
    log, again = tmp_path / "log", 0
    with bench("auto", start=False, size=1) as shared:
        pool = shared.pool
        for attempt in range(20):
            for _ in range(50):
                pool.submit(support.give)
            first = pool.submit(write_garbage_unheard, log)
            others = [pool.submit(note, log) for _ in range(5)]
            errors = [future.exception(support.PATIENCE) for future in [first, *others]]
            done = log.read_text().split()
            assert len(done) == 6 * (attempt + 1), "each of them ran once"
            again = done[-6:].count(done[-6])
            if again > 3:  # more than its page remembers the results of
                break
        else:
            pytest.fail(f"the dispatcher was never slow enough: {again}")
        assert [type(error) for error in errors[:again]].count(WorkerLost) >= 1
        assert errors[again:] == [None] * (6 - again)
        assert pool.submit(support.give, 5).result(support.PATIENCE) == 5
