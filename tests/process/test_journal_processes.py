"""The journal under many processes: nothing lost, nothing interleaved, also when writers fork or are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from mpworker.results.journal import Journal
from mpworker.results.query import ResultStore
from mpworker.results.reader import Tally, read_entries
from mpworker.results.record import Record

WRITERS, EACH = 8, 500
SECONDS = 100.0


def _record(writer: int, number: int) -> Record:
    # Lines from 300 bytes to 20 KB, so that writes cross page boundaries at all offsets.
    size = (number * 37) % 400 if number % 50 else 20_000
    return Record(task_id=f"{writer}-{number}", status="SUCCESS", result=str(writer) * size, key="k", payload="{}")


def _write(folder: str, writer: int, barrier: Barrier) -> None:
    journal = Journal(folder, "node")
    barrier.wait(SECONDS)
    for number in range(EACH):
        place = journal.append(_record(writer, number))
        if number % 2 and not journal.mark(place):
            os._exit(3)


def _add(folder: str, writer: int, barrier: Barrier) -> None:
    store = ResultStore(folder)
    barrier.wait(SECONDS)
    for number in range(100):
        store.add_result(f"{writer}-{number}", "completed" if number % 4 else "failed", "m", {"n": number})


def _run(target: Any, folder: Path, method: str, count: int) -> None:
    context = multiprocessing.get_context(method)
    barrier = context.Barrier(count)
    children = [context.Process(target=target, args=(str(folder), n, barrier)) for n in range(count)]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(SECONDS)
        assert [child.exitcode for child in children] == [0] * count
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()


def test_eight_writers_lose_nothing_and_mark_only_their_own(tmp_path: Path) -> None:
    _run(_write, tmp_path, "spawn", WRITERS)
    tally = Tally()
    found = {e.record.task_id: e.record for e in read_entries(Journal.files(tmp_path), tally)}
    assert (tally.torn, tally.unfinished) == (0, 0)
    assert len(found) == WRITERS * EACH
    for record in found.values():
        writer, number = map(int, record.task_id.split("-"))
        assert record.result == _record(writer, number).result
        assert record.shipped == bool(number % 2)


def test_eight_stores_add_at_once(tmp_path: Path) -> None:
    _run(_add, tmp_path, "spawn", WRITERS)
    stats = ResultStore(tmp_path).get_statistics()
    assert (stats["total_tasks"], stats["torn_lines"]) == (WRITERS * 100, 0)
    assert stats["failed"] == WRITERS * 25
    assert stats["success_rate"] == 75.0


FORKING = """
    import os, sys
    from mpworker.results.journal import Journal
    from mpworker.results.record import Record
    journal = Journal(sys.argv[1], "node")
    kept = journal.append(Record(task_id="before", status="SUCCESS"))
    children = []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            ok = all(journal.mark(journal.append(Record(task_id=f"{child}-{n}", status="SUCCESS"))) for n in range(500))
            os._exit(0 if ok else 3)
        children.append(pid)
    own = [journal.append(Record(task_id=f"parent-{n}", status="SUCCESS")) for n in range(500)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * 4, codes
    assert journal.mark(kept) and all(journal.mark(place) for place in own)
"""


def test_a_journal_that_was_opened_before_a_fork(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FORKING), str(tmp_path)], timeout=SECONDS, check=False)
    assert done.returncode == 0
    tally = Tally()
    found = [e.record for e in read_entries(Journal.files(tmp_path), tally)]
    assert (len(found), len({r.task_id for r in found}), tally.torn) == (2501, 2501, 0)
    assert all(r.shipped for r in found)


ENDLESS = """
    import sys
    from mpworker.results.journal import Journal
    from mpworker.results.record import Record
    journal, n = Journal(sys.argv[1], "node"), 0
    while True:
        journal.append(Record(task_id=f"{sys.argv[2]}-{n}", status="SUCCESS", result="x" * 300_000))
        n += 1
        if n == 10:
            print("going", flush=True)
"""


def test_a_killed_writer_leaves_whole_lines_for_the_others(tmp_path: Path) -> None:
    survivor = Journal(tmp_path, "node")
    written = 0
    for round_number in range(5):
        command = [sys.executable, "-c", textwrap.dedent(ENDLESS), str(tmp_path), str(round_number)]
        victim = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"going\n"
            for _ in range(20):
                survivor.append(Record(task_id=f"survivor-{written}", status="SUCCESS", result=written))
                written += 1
        finally:
            victim.send_signal(signal.SIGKILL)
            victim.wait(SECONDS)
            victim.stdout.close()  # type: ignore[union-attr]
        survivor.append(Record(task_id=f"survivor-{written}", status="SUCCESS", result=written))
        written += 1
    tally = Tally()
    entries = read_entries(Journal.files(tmp_path), tally)
    found = [e.record for e in entries if e.record.task_id.startswith("survivor")]
    assert [r.result for r in found] == list(range(written))
    assert tally.torn <= 5  # at most the line that each victim was writing


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """A file size limit makes the kernel cut a write short, as a full disk does."""
    code = """
        import resource, signal, sys
        from mpworker.errors import StoreError
        from mpworker.results.journal import Journal
        from mpworker.results.record import Record
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal = Journal(sys.argv[1], "node")
        journal.append(Record(task_id="a", status="SUCCESS"))
        size = journal.path().stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                journal.append(Record(task_id="lost", status="SUCCESS"))
            except StoreError as exc:
                print(exc)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert journal.mark(journal.append(Record(task_id="b", status="SUCCESS")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], timeout=SECONDS, check=True, capture_output=True
    )
    first, second = done.stdout.decode().splitlines()
    assert "only 100 of" in first
    assert "File too large" in second
    tally = Tally()
    assert [e.record.task_id for e in read_entries(Journal.files(tmp_path), tally)] == ["a", "b"]
    assert tally.torn == 1
    (path,) = Journal.files(tmp_path)
    assert json.loads(path.read_bytes().splitlines()[-1])["task_id"] == "b"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_one_clear_line(tmp_path: Path) -> None:
    from mpworker.errors import ConfigurationError

    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigurationError, match="mpworker_journal: cannot write to"):
            Journal(tmp_path, "n").prepare()
    finally:
        tmp_path.chmod(0o700)
