"""Records from many processes stay whole, and no writer, dead or stopped, holds up the others for long."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker.logs import WholeRecordHandler, make_whole

SIZE = 20_000
WRITERS, RECORDS = 4, 25
context = multiprocessing.get_context("forkserver")


def record_of(writer: int, number: int) -> str:
    return f"<{writer}:{number}:" + chr(97 + writer) * SIZE + ">"


def logger_of(handler: logging.Handler) -> logging.Logger:
    logger = logging.Logger("whole", logging.INFO)
    logger.addHandler(handler)
    return logger


def write_many(writer: int, make: Callable[[], WholeRecordHandler], go: Signpost) -> None:
    logger = logger_of(make())
    go.wait()
    for number in range(RECORDS):
        logger.info(record_of(writer, number))


class ToPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> WholeRecordHandler:
        return WholeRecordHandler(path=str(self.path))


class ToFifo(ToPath):
    def __call__(self) -> WholeRecordHandler:
        return WholeRecordHandler(fd=os.open(self.path, os.O_WRONLY))


@contextmanager
def reader_of(path: Path) -> Iterator[Callable[[], bytes]]:
    """Reads a FIFO to its end in a thread; what is yielded waits for that end."""
    os.mkfifo(path)
    hold = os.open(path, os.O_RDWR)  # so that neither end waits for the other
    fd, chunks = os.open(path, os.O_RDONLY), []

    def read() -> None:
        while chunk := os.read(fd, 1 << 16):
            chunks.append(chunk)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def finish() -> bytes:
        nonlocal hold
        if hold >= 0:
            os.close(hold)
            hold = -1
        thread.join(PATIENCE)
        assert not thread.is_alive()
        return b"".join(chunks)

    finish.chunks = chunks  # type: ignore[attr-defined]
    try:
        yield finish
    finally:
        finish()
        os.close(fd)


def start(function: Callable[..., object], *args: Any) -> Any:
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def join(processes: list[Any]) -> None:
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0


@pytest.fixture(scope="module", autouse=True)
def _no_fork_server_stays(_no_process_stays: None) -> Iterator[None]:
    yield
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def assert_whole(data: bytes, writers: int = WRITERS) -> None:
    found = data.decode().splitlines()
    expected = {record_of(writer, number) for writer in range(writers) for number in range(RECORDS)}
    assert len(found) == len(expected)
    assert set(found) == expected
    for writer in range(writers):  # and in each one's own order
        own = [line for line in found if line.startswith(f"<{writer}:")]
        assert own == [record_of(writer, number) for number in range(RECORDS)]


def test_records_of_many_processes_in_one_file_are_whole(tmp_path: Path) -> None:
    path, go = tmp_path / "log", Signpost(tmp_path / "go")
    processes = [start(write_many, writer, ToPath(path), go) for writer in range(WRITERS)]
    go.set()
    join(processes)
    assert_whole(path.read_bytes())
    assert path.stat().st_mode & 0o777 == 0o600


def test_records_of_many_processes_in_one_pipe_are_whole(tmp_path: Path) -> None:
    path, go = tmp_path / "fifo", Signpost(tmp_path / "go")
    with reader_of(path) as finish:
        processes = [start(write_many, writer, ToFifo(path), go) for writer in range(WRITERS)]
        go.set()
        join(processes)
        assert_whole(finish())


def write_and_stop(path: Path, here: Signpost) -> None:
    """Takes the lock of the pipe as a writer does, writes half a record, and says so."""
    fd = os.open(path, os.O_WRONLY)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    os.write(fd, b"half")
    here.set(os.getpid())
    support.sleep()


def test_a_writer_killed_in_the_middle_blocks_nobody(tmp_path: Path) -> None:
    path, here, go = tmp_path / "fifo", Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with reader_of(path) as finish:
        victim = start(write_and_stop, path, here)
        here.wait()
        writers = [start(write_many, writer, ToFifo(path), go) for writer in range(2)]
        go.set()
        victim.kill()
        victim.join(PATIENCE)
        join(writers)
        data = finish()
    assert data.count(b"half") == 1
    assert_whole(data.replace(b"half", b""), 2)


def test_a_stopped_writer_delays_each_record_only_a_little(tmp_path: Path) -> None:
    path, here = tmp_path / "fifo", Signpost(tmp_path / "here")
    with reader_of(path) as finish:
        victim = start(write_and_stop, path, here)
        here.wait()
        os.kill(victim.pid, signal.SIGSTOP)
        handler = ToFifo(path)()
        logger = logger_of(handler)
        begun = time.monotonic()
        for number in range(3):
            logger.info(record_of(0, number))
        took = time.monotonic() - begun
        victim.kill()
        victim.join(PATIENCE)
        os.close(handler._fd)  # type: ignore[arg-type]
        data = finish()
    assert data.decode().removeprefix("half").splitlines() == [record_of(0, number) for number in range(3)]
    assert took < 3 * 0.2 + 1.0


def test_a_full_pipe_makes_the_writer_wait_and_loses_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    logger = logger_of(WholeRecordHandler(fd=writer))
    thread = threading.Thread(target=lambda: [logger.info(record_of(0, number)) for number in range(20)])
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    data = b""
    while data.count(b"\n") < 20:
        data += os.read(reader, 1 << 16)
    thread.join(PATIENCE)
    os.close(reader)
    os.close(writer)
    assert data.decode().splitlines() == [record_of(0, number) for number in range(20)]


def test_a_rotated_file_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = WholeRecordHandler(path=str(path))
    logger = logger_of(handler)
    logger.info("one")
    path.rename(tmp_path / "log.1")
    logger.info("two")
    handler.close()
    assert (tmp_path / "log.1").read_text() == "one\n"
    assert path.read_text() == "two\n"


def test_make_whole_replaces_plain_handlers_and_keeps_their_settings(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        logger = logging.Logger("plain")
        plain = logging.StreamHandler(stream)
        plain.setLevel(logging.ERROR)
        plain.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        plain.addFilter(lambda record: "secret" not in record.getMessage())
        other = logging.NullHandler()
        for handler in (plain, other, logging.FileHandler(tmp_path / "log")):
            logger.addHandler(handler)
        make_whole([logger])
        assert [type(handler) for handler in logger.handlers] == [
            WholeRecordHandler,
            logging.NullHandler,
            WholeRecordHandler,
        ]
        logger.error("loud")
        logger.error("secret")
        logger.info("quiet")
        assert os.read(reader, 1000) == b"ERROR loud\n"
    os.close(reader)
    assert (tmp_path / "log").read_text() == "loud\nsecret\nquiet\n"
    logger.handlers[2].close()


def test_a_task_killed_while_it_logs_harms_nobodys_records(tmp_path: Path) -> None:
    from mpworker import ProcessPool

    path = tmp_path / "fifo"
    with reader_of(path) as finish, ProcessPool(2) as pool:
        for _ in range(5):
            victim = pool.submit(log_for_ever, path)
            steady = pool.submit(log_some, path)
            wait_until(lambda: len(finish.chunks) > 3, what="records come")  # type: ignore[attr-defined]
            victim.cancel()
            assert steady.result(PATIENCE) == 20
        pool.shutdown()
        data = finish().decode()
    assert data.count("<0:") == data.count("a>") == 100


def log_for_ever(path: Path) -> None:
    logger, end = logger_of(ToFifo(path)()), time.monotonic() + 20
    while time.monotonic() < end:
        logger.info(record_of(1, 1))


def log_some(path: Path) -> int:
    logger = logger_of(ToFifo(path)())
    for number in range(20):
        logger.info(record_of(0, number))
    return 20
