"""What ``ps`` shows of a pool."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, wait_until

from mpworker import ProcessPool


@pytest.mark.parametrize("method", ["forkserver", "spawn", "auto"])
def test_every_process_says_what_it_is(method: str, tmp_path: Path) -> None:
    with ProcessPool(2, start_method=method) as pool:
        pool.schedule(support.give, callback=partial(support.write_title, tmp_path / "title")).result(PATIENCE)
        dispatcher = pool.stats()["dispatcher"]
        wait_until(lambda: len(pool.stats()["workers"]) == 3, what="all processes are there")
        expected = ["mpworker: callbacks", "mpworker: worker 0", "mpworker: worker 1"]
        if method != "spawn":
            expected.insert(1, "mpworker: template")
        wait_until(lambda: titles(dispatcher) == expected, what=f"{expected}, not {titles(dispatcher)}")
        assert support.look(dispatcher).title == "mpworker: dispatcher"  # type: ignore[union-attr]
    assert (tmp_path / "title").read_text() == "mpworker: callbacks"


def titles(dispatcher: int) -> list[str]:
    """Of its children. One that has just been started has another title for a moment."""
    return sorted(getattr(support.look(pid), "title", "") for pid in support.children_of(dispatcher))


def test_the_slot_of_a_dead_worker_is_taken_again() -> None:
    with ProcessPool(2) as pool:
        for _ in range(3):
            pool.submit(support.die, "exit").exception(PATIENCE)
        wait_until(lambda: sorted(worker["slot"] for worker in pool.stats()["workers"]) == [0, 1], what="two workers")


def test_the_short_name_tells_it_too() -> None:
    with ProcessPool(1) as pool:
        pid = pool.submit(support.getpid).result(PATIENCE)
        assert Path(f"/proc/{pid}/comm").read_text().strip() == "worker 0"
