"""The classic API as its users write it: one script ``example.py`` with its own model, run as a program."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import support

from mpworker import InfoTask, Model, MultiProcess, ProcessPool
from mpworker.errors import ConfigurationError, PayloadError

EXAMPLE = """
import os
import sys
import time
from pathlib import Path

from mpworker import InfoTask, Model, MultiProcess

HERE = Path(__file__).parent


def write(*words):
    with open(HERE / "log", "a") as log:
        log.write(" ".join(map(str, words)) + "\\n")


class Demo(Model):
    def runnable(self, data, error):
        number = data["test"]
        write("run", number, os.getpid())
        if number == 1:
            time.sleep(20)
        if number == 2:
            raise ValueError(error["error"])
        if number == 3:
            os._exit(4)
        return {"number": number}

    def callback(self, result):
        write("callback", result["number"], os.getpid())
        if result["number"] == 4:
            raise RuntimeError("a bad callback")
        if result["number"] == 5:
            os._exit(1)

    def error_callback(self, error):
        write("error_callback", type(error).__name__, os.getpid())


def main():
    mp = MultiProcess(2)
    mp.start()
    write("parent", 0, os.getpid())
    for i in range(10):
        mp.push(InfoTask("example.Demo", 1, {"test": i}, {"error": i}))
    mp.stop()
    write("stopped", 0, os.getpid())


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[support.Ended, list[list[str]]]:
    folder = tmp_path_factory.mktemp("classic")
    ended = support.run_script(EXAMPLE, folder, name="example.py")
    return ended, [line.split() for line in support.lines(folder / "log")]


Run = tuple[support.Ended, list[list[str]]]


def test_the_script_runs_to_its_end(run: Run) -> None:
    ended, log = run
    assert (ended.code, ended.out) == (0, "")
    assert log[0][0] == "parent"
    assert log[-1][0] == "stopped"


def test_every_task_ran_and_the_timed_out_one_was_killed(run: Run) -> None:
    _, log = run
    assert sorted(int(line[1]) for line in log if line[0] == "run") == list(range(10))
    assert [line[1] for line in log if line[0] == "error_callback"].count("TimeLimitExceeded") == 1


def test_each_task_had_exactly_one_callback(run: Run) -> None:
    _, log = run
    assert sorted(int(line[1]) for line in log if line[0] == "callback") == [0, 4, 5, 6, 7, 8, 9]
    errors = sorted(line[1] for line in log if line[0] == "error_callback")
    assert errors == ["TimeLimitExceeded", "ValueError", "WorkerLost"]


def test_callbacks_run_in_one_process_that_is_neither_parent_nor_worker(run: Run) -> None:
    _, log = run
    parent = {line[2] for line in log if line[0] == "parent"}
    workers = {line[2] for line in log if line[0] == "run"}
    hooks = list(dict.fromkeys(line[2] for line in log if "callback" in line[0]))
    assert not set(hooks) & (parent | workers)
    assert not parent & workers
    # One, and its successor after the callback that ended it.
    assert len(hooks) <= 2
    before = [line[2] for line in log if "callback" in line[0]]
    assert before == sorted(before, key=hooks.index)


def test_bad_callbacks_are_named_in_the_log(run: Run) -> None:
    ended, _ = run
    assert "example.Demo[5] failed: RuntimeError: a bad callback" in ended.err
    assert "example.Demo[6] failed: WorkerLost" in ended.err


BROKEN = '''
import logging
from pathlib import Path
from mpworker import InfoTask, Model, MultiProcess

HERE = Path(__file__).parent

class Deaf:
    """Has no runnable, but hears."""
    def error_callback(self, error):
        with open(HERE / "log", "a") as log:
            log.write(f"{type(error).__name__}: {error}\\n")

class Nothing:
    pass

class Lazy(Model):
    def error_callback(self, error):
        Deaf().error_callback(error)

class Plain:
    """No Model at all, only the methods."""
    def runnable(self):
        return 7
    def callback(self, result):
        with open(HERE / "log", "a") as log:
            log.write(f"plain {result}\\n")

number = 1

if __name__ == "__main__":
    with MultiProcess(1) as mp:
        for name in ("nowhere.Demo", "broken.Nobody", "broken.Deaf", "broken.Nothing", "broken.Lazy", "broken.number"):
            mp.push(InfoTask(name, None))
        mp.push(InfoTask("broken.Plain", None))
'''


def test_what_cannot_run_reaches_error_callback_or_the_log(tmp_path: Path) -> None:
    ended = support.run_script(BROKEN, tmp_path, name="broken.py")
    assert (ended.code, ended.out) == (0, "")
    assert sorted(support.lines(tmp_path / "log")) == [
        "TypeError: broken.Deaf has no method runnable",
        "TypeError: broken.Lazy has no method runnable",
        "plain 7",
    ]
    errors = [line for line in ended.err.splitlines() if "has no error_callback" in line]
    assert [line.partition("[")[0] for line in errors] == [
        "nowhere.Demo",
        "broken.Nobody",
        "broken.Nothing",
        "broken.number",
    ]
    for line, word in zip(
        errors, ["No module named 'nowhere'", "no class Nobody", "no method", "no class"], strict=True
    ):
        assert word in line


class Sum(Model):
    def runnable(self, *numbers: int) -> int:
        return sum(numbers)


def test_push_returns_a_future() -> None:
    with MultiProcess(1) as mp:
        future = mp.push(InfoTask(f"{__name__}.Sum", 10, 1, 2, 3))
        assert future.result(support.PATIENCE) == 6


class Hanging(Model):
    def runnable(self) -> None:
        pass

    def callback(self, result: object) -> None:
        support.sleep()


def test_stop_waits_for_a_hanging_callback_only_so_long(caplog: pytest.LogCaptureFixture) -> None:
    mp = MultiProcess(1, callback_timeout=0.2)
    mp.start()
    for _ in range(2):
        mp.push(InfoTask(f"{__name__}.Hanging", None))
    begun = time.monotonic()
    mp.stop()
    assert time.monotonic() - begun < 2 * 0.2 + support.SLACK
    assert len([record for record in caplog.records if "Hanging[" in record.getMessage()]) == 2


def test_push_wants_a_started_pool() -> None:
    mp = MultiProcess(1)
    with pytest.raises(RuntimeError, match="start"):
        mp.push(InfoTask("a.B", None))
    mp.start()
    with pytest.raises(RuntimeError, match="started already"):
        mp.start()
    mp.stop()
    mp.stop()
    with pytest.raises(RuntimeError, match="start"):
        mp.push(InfoTask("a.B", None))


def test_it_can_be_started_again() -> None:
    mp = MultiProcess(1)
    for _ in range(2):
        mp.start()
        assert mp.push(InfoTask(f"{__name__}.Sum", None, 1)).result(support.PATIENCE) == 1
        mp.stop()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "2", None])
def test_a_bad_number_of_processes_is_refused(number: object) -> None:
    with pytest.raises(ConfigurationError, match="pool_num"):
        MultiProcess(number)  # type: ignore[arg-type]


def test_a_malformed_broker_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="broker"):
        MultiProcess(broker="localhost")


@pytest.mark.parametrize(
    ("name", "timeout", "words"),
    [
        ("Demo", None, "module.Class"),
        ("", None, "module.Class"),
        ("a b.C", None, "module.Class"),
        (None, None, "module.Class"),
        ("a.B", 0, "timeout"),
        ("a.B", -1, "timeout"),
        ("a.B", "1", "timeout"),
        ("a.B", True, "timeout"),
        ("a.B", float("nan"), "timeout"),
        ("a.B", float("inf"), "timeout"),
    ],
)
def test_a_bad_task_is_refused_at_push(name: object, timeout: object, words: str) -> None:
    with MultiProcess(1) as mp, pytest.raises(ConfigurationError, match=words):
        mp.push(InfoTask(name, timeout))  # type: ignore[arg-type]


def test_an_argument_that_cannot_travel_is_refused_at_push() -> None:
    with MultiProcess(1) as mp, pytest.raises(PayloadError, match="cannot be pickled"):
        mp.push(InfoTask(f"{__name__}.Sum", None, lambda: 1))


def test_a_task_knows_who_made_it() -> None:
    with ProcessPool(1) as pool:
        task = pool.submit(InfoTask, "a.B", 1.5, "x", 2).result(support.PATIENCE)
        worker = pool.submit(support.getpid).result(support.PATIENCE)
    assert (task.task_module, task.timeout, task.args, task.from_pid) == ("a.B", 1.5, ("x", 2), worker)
