"""Large arguments and results: they arrive whole, whoever dies on their way, and no descriptor or memory stays."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, WorkerLost
from mpworker.errors import PayloadError
from mpworker.pool import bulk
from mpworker.pool.bulk import LARGE, Bulk
from mpworker.pool.frames import Frame, Kind, carry, send_fds
from mpworker.pool.worker import task_worker

METHODS = ["fork", "forkserver", "spawn", "auto"]
MB = 1 << 20


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


def flip(value: Any) -> Any:
    """The same kind of thing, with other contents."""
    if isinstance(value, dict):
        return {key: flip(item) for key, item in value.items()}
    if isinstance(value, list):
        return [flip(item) for item in value]
    return value if isinstance(value, int) else value[::-1]


VALUES = {
    "bytes": os.urandom(3 * MB),
    "bytearray": bytearray(os.urandom(3 * MB)),
    "str": "é0" * MB,
    "nested": {"a": [os.urandom(MB), "short", {"b": bytearray(os.urandom(2 * MB))}], "c": list(range(300_000))},
    "just large": os.urandom(LARGE),
    "just below": os.urandom(LARGE - 200),
}


@pytest.mark.parametrize("method", METHODS)
def test_they_arrive_whole_by_every_start_method(method: str) -> None:
    with ProcessPool(2, start_method=method) as pool:
        futures = [(pool.submit(flip, value), value) for value in VALUES.values()]
        for future, value in futures:
            assert future.result(PATIENCE) == flip(value)


def test_they_travel_through_map_and_keywords(pool: ProcessPool) -> None:
    values = [os.urandom(LARGE + number) for number in range(12)]
    assert list(pool.map(flip, values)) == [flip(value) for value in values]
    assert list(pool.map(flip, values, chunksize=5)) == [flip(value) for value in values]
    assert pool.schedule(support.give, kwargs={"value": values[0]}).result(PATIENCE) == values[0]


def double(array: Any) -> Any:
    array *= 2  # in place: it may be written to
    return array, array[:10].copy()


def test_arrays_are_not_copied_on_arrival_and_may_be_written_to() -> None:
    numpy = pytest.importorskip("numpy")
    with ProcessPool(1) as pool:
        array = numpy.arange(500_000.0)
        whole, part = pool.submit(double, array).result(PATIENCE)
        assert (whole == array * 2).all()
        assert (part == whole[:10]).all()
        whole += 1
        assert whole[7] == 15
        assert array[7] == 7


def make_buffers(sizes: list[int]) -> Any:
    return [support.Buffer(bytearray(os.urandom(size))) for size in sizes]


def checksum_and_change(buffers: list[support.Buffer]) -> list[str]:
    sums = [hashlib.sha256(buffer.memory).hexdigest() for buffer in buffers]
    for buffer in buffers:
        memoryview(buffer.memory)[:1] = b"?"[: len(memoryview(buffer.memory))]
    return sums


def test_several_buffers_of_all_sizes(pool: ProcessPool) -> None:
    buffers = make_buffers([0, 1, 5 * MB, 70_000, LARGE, 3])
    sums = [hashlib.sha256(buffer.memory).hexdigest() for buffer in buffers]
    assert pool.submit(checksum_and_change, buffers).result(PATIENCE) == sums
    came = pool.submit(make_buffers, [2 * MB, 5, 100_000]).result(PATIENCE)
    assert [len(memoryview(buffer.memory)) for buffer in came] == [2 * MB, 5, 100_000]
    checksum_and_change(came)


def write_size(path: Path, value: Any) -> None:
    path.write_text(f"{type(value).__name__} {len(value)}")


def test_a_callback_is_given_a_large_result(pool: ProcessPool, tmp_path: Path) -> None:
    done = tmp_path / "done"
    for attempt in range(3):  # the callback process is new only once
        done.unlink(missing_ok=True)
        size = 5 * MB + attempt
        future = pool.schedule(bytes, (size,), callback=_Writer(done))
        assert len(future.result(PATIENCE)) == size
        assert wait_until(lambda: done.exists() and done.read_text(), what="the callback ran") == f"bytes {size}"


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, value: Any) -> None:
        part = self.path.with_suffix(".part")
        write_size(part, value)
        part.replace(self.path)


# -- nothing stays -----------------------------------------------------------------------------------------------------


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def bodies(pid: int) -> int:
    """Descriptors and mappings of bodies that a process has."""
    count = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            count += "mpworker-body" in os.readlink(f"/proc/{pid}/fd/{fd}")
    return count + Path(f"/proc/{pid}/maps").read_text().count("mpworker-body")


def family(pool: ProcessPool) -> list[int]:
    return [os.getpid(), *(pid for pid in support.processes())]


def nothing_stays(pool: ProcessPool) -> None:
    gc.collect()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        wait_until(lambda: not any(map(bodies, family(pool))), what="no body is left in any process")


def dispatcher(pool: ProcessPool) -> int:
    pid = pool.stats()["dispatcher"]
    assert isinstance(pid, int)
    return pid


def kill_while_told(size: int) -> bytes:
    """Dies when its result is about to be sent, or while it is."""
    threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes(size)


def test_no_descriptor_stays_whatever_becomes_of_a_job() -> None:
    with ProcessPool(2) as pool:
        assert pool.submit(flip, VALUES["bytes"]).result(PATIENCE)
        nothing_stays(pool)
        before = descriptors(os.getpid()), descriptors(dispatcher(pool))
        for turn in range(2):
            futures = [pool.submit(flip, VALUES["bytes"]) for _ in range(4)]
            futures += [pool.submit(support.die, "kill") for _ in range(2)]
            futures += [pool.submit(kill_while_told, 20 * MB) for _ in range(2)]
            futures += [pool.schedule(support.sleep, (20.0, *()), timeout=0.2)]
            futures += [pool.submit(_with(support.sleep), VALUES["bytes"]) for _ in range(4)]
            futures += [pool.submit(_with(support.fail), VALUES["bytes"])]
            for future in futures[9:13]:
                future.cancel()
            for future in futures:
                with contextlib.suppress(WorkerLost, TimeoutError, ValueError, CancelledError):
                    assert future.result(PATIENCE)
            if turn == 1:
                del future, futures
                nothing_stays(pool)
        wait_until(
            lambda: (descriptors(os.getpid()), descriptors(dispatcher(pool))) == before,
            what=f"as many descriptors as before: {before}",
        )
        nothing_stays(pool)


class _with:
    """Calls a function without the argument that is given."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, _: object) -> Any:
        return self.function()


def hold(data: bytes, here: Signpost, go: Signpost) -> int:
    support.meet(here, go)
    return len(data)


def test_what_runs_and_what_has_arrived_is_held_by_nobody(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        future = pool.submit(hold, os.urandom(20 * MB), here, go)
        here.wait()
        wait_until(lambda: future.running(), what="the parent has heard of it")
        nothing_stays(pool)
        queued = [pool.submit(flip, VALUES["bytes"]) for _ in range(3)]
        wait_until(lambda: bodies(dispatcher(pool)) == 3, what="three wait in the dispatcher")
        for job in queued:
            job.cancel()
        nothing_stays(pool)
        go.set()
        assert future.result(PATIENCE) == 20 * MB
        assert len(pool.submit(bytes, 20 * MB).result(PATIENCE)) == 20 * MB
        nothing_stays(pool)


def test_a_dispatcher_that_dies_costs_only_what_ran(tmp_path: Path) -> None:
    with ProcessPool(2, start_method="fork") as pool:  # its template is a fork of this process, bodies and all
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        before = descriptors(os.getpid())
        for turn in range(2):
            go, here = Signpost(tmp_path / f"go{turn}"), [Signpost(tmp_path / f"here{turn}-{n}") for n in range(2)]
            blocked = [pool.submit(hold, VALUES["bytes"], each, go) for each in here]
            for each in here:
                each.wait()
            queued = [pool.submit(flip, VALUES["bytes"]) for _ in range(8)]
            first = dispatcher(pool)
            os.kill(first, signal.SIGKILL)
            go.set()
            for future in queued:
                assert future.result(PATIENCE) == flip(VALUES["bytes"])
            for future in blocked:
                with contextlib.suppress(WorkerLost):
                    assert future.result(PATIENCE) == 3 * MB
            del future, queued, blocked
            nothing_stays(pool)
        wait_until(lambda: descriptors(os.getpid()) <= before, what=f"no more than {before} descriptors")


def test_a_dispatcher_may_die_at_any_instant() -> None:
    with ProcessPool(2) as pool:
        assert pool.submit(support.give, 1).result(PATIENCE) == 1
        for turn in range(3):
            futures = [pool.submit(flip, VALUES["bytes"]) for _ in range(6)]
            threading.Timer(0.004 * turn, os.kill, (dispatcher(pool), signal.SIGKILL)).start()
            for future in futures:
                with contextlib.suppress(WorkerLost):
                    assert future.result(PATIENCE) == flip(VALUES["bytes"])
            del future, futures
        nothing_stays(pool)


def test_a_pool_that_is_ended_holds_nothing() -> None:
    pool = ProcessPool(1)
    futures = [pool.submit(_with(support.sleep), VALUES["bytes"]) for _ in range(5)]
    pool._started().handle.kill()
    for future in futures:
        with pytest.raises((RuntimeError, CancelledError)):
            future.result(PATIENCE)
    gc.collect()
    assert bodies(os.getpid()) == 0
    pool.shutdown()


def test_a_worker_that_is_killed_while_it_tells_a_large_result_is_lost_or_has_told_it() -> None:
    with ProcessPool(2) as pool:
        told = 0
        for _ in range(6):
            with contextlib.suppress(WorkerLost):
                assert len(pool.submit(kill_while_told, 4 * MB).result(PATIENCE)) == 4 * MB
                told += 1
        assert pool.submit(flip, VALUES["bytes"]).result(PATIENCE) == flip(VALUES["bytes"])
        assert pool.stats()["done"] == told + 1


# -- few descriptors ---------------------------------------------------------------------------------------------------

MANY = """
import hashlib, os, resource, sys
import support
from mpworker import ProcessPool
from process.test_large_payloads import flip

if __name__ == "__main__":
    limit, count, size = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    most = 0
    with ProcessPool(2) as pool:
        head = os.urandom(size)
        data = [head[:-8] + number.to_bytes(8, "little") for number in range(5)]
        futures = [pool.submit(flip, data[number % 5]) for number in range(count)]
        most = len(os.listdir("/proc/self/fd"))
        for number, future in enumerate(futures):
            assert future.result(60) == data[number % 5][::-1]
            futures[number] = None
    assert most < limit, most
    print("all", most)
"""


@pytest.mark.parametrize(("limit", "count"), [(64, 300)])
def test_more_jobs_than_descriptors(limit: int, count: int, tmp_path: Path) -> None:
    ended = support.run_script(MANY, tmp_path, str(limit), str(count), str(LARGE))
    assert ended.out.startswith("all"), ended.err
    assert "Traceback" not in ended.err
    assert "dispatcher died" not in ended.err


def leave_none(here: Signpost, go: Signpost) -> None:
    """Has no descriptor left when the next job arrives."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    support.meet(here, go)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))


def restore(data: bytes) -> int:
    return len(data)


def test_a_worker_without_a_free_descriptor_is_given_the_bytes(tmp_path: Path) -> None:
    here, go = Signpost(tmp_path / "here"), Signpost(tmp_path / "go")
    with ProcessPool(1) as pool:
        assert pool.submit(support.getpid).result(PATIENCE)
        blocker = pool.submit(leave_none, here, go)
        here.wait()
        sizes = [LARGE, 3 * MB, 10]
        futures = [pool.submit(flip, os.urandom(size)) for size in sizes]
        pid = pool.submit(support.getpid)
        go.set()
        assert blocker.result(PATIENCE) is None
        assert [len(future.result(PATIENCE)) for future in futures] == sizes
        assert pid.result(PATIENCE) == int(here.wait()), "in the same process"


def test_a_parent_without_a_free_descriptor_still_hears_its_results(tmp_path: Path) -> None:
    with ProcessPool(1) as pool:
        assert pool.submit(flip, VALUES["bytes"]).result(PATIENCE)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken: list[int] = []
        try:
            taken += [os.dup(0) for _ in range(100)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1, before[1]))
            for size in (LARGE, 5 * MB):
                path = tmp_path / str(size)
                future = pool.schedule(bytes, (size,), callback=_Writer(path))
                assert len(future.result(PATIENCE)) == size
                wait_until(path.exists, what="the callback ran")
            last = pool.submit(bytes, 5 * MB)
            pool.shutdown()
            assert len(last.result(0)) == 5 * MB
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


# -- lies --------------------------------------------------------------------------------------------------------------


def say(how: str) -> None:
    """Tells a result that has not the descriptor that it says it has."""
    worker = task_worker()
    assert worker is not None
    assert worker.current is not None
    fd, size = os.memfd_create("lie", os.MFD_ALLOW_SEALING), MB
    if how == "pipe":
        fd = os.pipe()[0]
    elif how == "too small":
        os.write(fd, bytes(MB // 2))
    elif how == "not sealed":
        os.write(fd, bytes(MB))
    ticket = bulk._TICKET.pack(os.fstat(fd).st_ino, size)
    frame = Frame(Kind.DONE, worker.current.job, body=Bulk(ticket, -1))
    send_fds(worker.data, bytes(carry(frame)), *(() if how == "none" else (fd,)))
    support.sleep()


@pytest.mark.parametrize("how", ["none", "pipe", "too small", "not sealed"])
def test_a_worker_that_lies_about_a_descriptor_is_named_and_ended(pool: ProcessPool, how: str) -> None:
    before = descriptors(dispatcher(pool))
    with pytest.raises(WorkerLost, match=r"worker \d sent a frame without the descriptor that belongs to it"):
        pool.submit(say, how).result(PATIENCE)
    assert pool.submit(flip, VALUES["bytes"]).result(PATIENCE) == flip(VALUES["bytes"])
    wait_until(lambda: descriptors(dispatcher(pool)) == before, what="no descriptor of a lie is left")


def test_a_worker_whose_body_is_no_body_fails_its_own_task_only(pool: ProcessPool) -> None:
    with pytest.raises(PayloadError, match="damaged"):
        pool.submit(say_noise).result(PATIENCE)
    assert pool.submit(flip, VALUES["bytes"]).result(PATIENCE) == flip(VALUES["bytes"])


def say_noise() -> None:
    worker = task_worker()
    assert worker is not None
    assert worker.current is not None
    worker.announce()
    body = bulk._make([os.urandom(MB)])
    assert body is not None
    send_fds(worker.data, carry(Frame(Kind.DONE, worker.current.job, body=body)))
    support.sleep(0.01)
