"""Each worker has a slot, which its replacement inherits; variables derived from it are there before anything else."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import support
from support import PATIENCE, Signpost, wait_until

from mpworker import ProcessPool, current_slot

METHODS = ["fork", "forkserver", "spawn", "auto"]
at_start: list[object] = []


def port_of(slot: int) -> dict[str, str | int]:
    return {"PORT": 8000 + slot, "DEVICE": f"gpu{slot}"}


def look_around() -> tuple[object, ...]:
    return current_slot(), *(os.environ.get(name) for name in ("MPWORKER_SLOT", "PORT", "DEVICE"))


def remember() -> None:
    at_start.append(look_around())


def tell(here: Signpost, go: Signpost) -> tuple[int, object, object]:
    support.meet(here, go)
    return os.getpid(), look_around(), at_start


def around(slot: int) -> tuple[object, ...]:
    return slot, str(slot), str(8000 + slot), f"gpu{slot}"


def from_all(pool: ProcessPool, folder: Path) -> list[tuple[int, object, object]]:
    """What each of two workers tells, in the order of slots."""
    go, heres = Signpost(folder / "go"), [Signpost(folder / f"here{number}") for number in range(2)]
    futures = [pool.submit(tell, here, go) for here in heres]
    for here in heres:
        here.wait()
    go.set()
    return sorted((future.result(PATIENCE) for future in futures), key=lambda told: str(told[1]))


@pytest.mark.parametrize("method", METHODS)
def test_a_replacement_inherits_slot_and_variables(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPWORKER_SLOT", "7")  # as in a pool that a task has started
    note = Signpost(tmp_path / "callback")
    with ProcessPool(2, start_method=method, slot_env=port_of, initializer=remember) as pool:
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            first, second = from_all(pool, folder)
            assert [told[1:] for told in (first, second)] == [(around(slot), [around(slot)]) for slot in range(2)]
            support.kill_ours(second[0])
            wait_until(partial(is_unknown, pool, second[0]), what="the pool knows of the death")
        pool.schedule(support.give, callback=partial(write_around, note))
        assert note.wait() == str((None, None, os.environ.get("PORT"), os.environ.get("DEVICE")))


def is_unknown(pool: ProcessPool, pid: int) -> bool:
    return pid not in {worker["pid"] for worker in pool.stats()["workers"]}


def write_around(note: Signpost, _: object) -> None:
    note.set(look_around())


SCRIPT = """
import os, sys
print(os.environ.get("MPWORKER_SLOT"), os.environ.get("PORT"), file=sys.stderr)
import support
from mpworker import ProcessPool, current_slot
if __name__ == "__main__":
    with ProcessPool(1, start_method="spawn", slot_env={0: {"PORT": "8000"}}) as pool:
        print(pool.submit(current_slot).result(30), current_slot())
"""


def test_with_spawn_they_are_there_before_the_script_is_imported(tmp_path: Path) -> None:
    ended = support.run_script(SCRIPT, tmp_path)
    assert (ended.code, ended.out) == (0, "0 None\n")
    assert ended.err == "None None\n0 8000\n"


def fork_and_look() -> object:
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, str(current_slot()).encode())
        os._exit(0)
    os.wait()
    return os.read(reader, 100)


def test_a_process_that_a_task_has_forked_is_no_worker() -> None:
    with ProcessPool(1, slot_env={5: {"A": "b"}}) as pool:
        assert pool.submit(fork_and_look).result(PATIENCE) == b"None"
        assert pool.submit(os.getenv, "A").result(PATIENCE) is None
