"""What a job has said is whole and in order, whatever instant its process is killed at."""

from __future__ import annotations

import os
import random
import signal
import time

from support import wait_until

from mpworker.pool.page import Page, create

KEPT = 10_000


def write_for_ever(fd: int) -> None:
    tail = Page(fd, worker=1, mine=True).tail
    assert tail is not None
    tail.begin(1)
    number = 0
    while True:
        tail.write("".join(f"é{n}\n" for n in range(number, number + 1000)).encode())
        number += 1000


def test_a_killed_process_leaves_the_last_lines_in_order() -> None:
    for _ in range(20):
        fd = create(KEPT)
        reader = Page(os.dup(fd)).tail
        assert reader is not None
        writer = os.fork()
        if writer == 0:
            try:
                write_for_ever(fd)
            finally:
                os._exit(1)
        os.close(fd)
        try:
            wait_until(lambda: len(reader.read(1)) >= KEPT - 1, what="a full ring")  # noqa: B023
            until = time.monotonic() + random.uniform(0, 0.005)
            while time.monotonic() < until:
                pass
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
        said = reader.read(1)
        assert KEPT - 1 <= len(said) <= KEPT
        whole = said.partition(b"\n")[2].rpartition(b"\n")[0].decode()
        numbers = [int(line.removeprefix("é")) for line in whole.split("\n")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
