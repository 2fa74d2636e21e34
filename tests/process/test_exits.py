"""However an interpreter ends that has a pool: its exit code, what still runs, what it says, and that nothing stays."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import support
from support import PATIENCE, Signpost, wait_until


class Way(NamedTuple):
    """A way to end: the script's body, and what is to be seen then."""

    body: str
    code: int
    ran: str = ""
    out: str = ""
    err: str = ""


HEAD = """
import atexit, os, sys, threading, warnings
from pathlib import Path
import support
from mpworker import ProcessPool

here = Path(__file__).parent
meet = support.Signpost(here / "here"), support.Signpost(here / "never")

def run(number):
    support.append(here / "ran", number)
    return number

def submit(pool, count=3):
    return [pool.submit(run, number) for number in range(count)]

def try_to_submit():
    try:
        print(pool.submit(abs, -1).result(20))
    except RuntimeError as exc:
        print(type(exc).__name__, exc)

if __name__ == "__main__":
"""

WAYS = {
    "sys.exit in a with block": Way("with ProcessPool(1) as pool:\n submit(pool)\n sys.exit(3)", 3, "012"),
    "an exception": Way(
        "pool = ProcessPool(1)\nsubmit(pool)\nraise ValueError('mine')", 1, "012", err="ValueError: mine"
    ),
    "an exception in a with block": Way(
        "with ProcessPool(1) as pool:\n submit(pool)\n raise ValueError('mine')", 1, "012", err="ValueError: mine"
    ),
    "os._exit": Way("pool = ProcessPool(1)\npool.submit(support.meet, *meet)\nmeet[0].wait()\nos._exit(5)", 5),
    "os._exit while it starts": Way("pool = ProcessPool(1)\npool.submit(support.sleep)\nos._exit(5)", 5),
    "shutdown that does not wait": Way("pool = ProcessPool(1)\nsubmit(pool)\npool.shutdown(wait=False)", 0, "012"),
    "a pool that nobody knows any more": Way("submit(ProcessPool(1))", 0, "012"),
    "a pool of a thread that goes on": Way(
        "def work():\n"
        " threading.main_thread().join()\n"
        " pool = ProcessPool(1)\n"
        " print(sum(future.result(20) for future in submit(pool)))\n"
        " pool.submit(run, 3)\n"
        "threading.Thread(target=work).start()",
        0,
        "0123",
        "3",
    ),
    "exit hooks that submit": Way(
        "atexit.register(try_to_submit)\npool = ProcessPool(1)\nsubmit(pool)\natexit.register(try_to_submit)",
        0,
        "012",
        "1\nRuntimeError cannot schedule new futures: the pool has been shut down",
    ),
    "an exit hook with a pool of its own": Way(
        "def late():\n with ProcessPool(1) as pool:\n  print(sum(pool.map(run, range(3))))\natexit.register(late)",
        0,
        "012",
        "3",
    ),
    "a fork that ends first": Way(
        "pool = ProcessPool(1)\n"
        "submit(pool)\n"
        "warnings.simplefilter('ignore')  # Python 3.12 and later: there is a thread\n"
        "child = os.fork()\n"
        "if not child:\n"
        " sys.exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
        0,
        "012",
        "7",
    ),
}


NEED_A_THREAD = ("a pool of a thread that goes on", "an exit hook with a pool of its own")


def living(folder: Path) -> list[str]:
    """Processes whose current folder is this one. Only that finds them all: a title wipes out the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder and support.alive(int(process.name)):
                found.append(process.name)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_interpreter_ends(way: str, tmp_path: Path) -> None:
    if sys.version_info[:2] == (3, 12) and way in NEED_A_THREAD:
        pytest.skip("this Python starts no thread any more when the script has ended")
    body, code, ran, out, err = WAYS[way]
    script = HEAD + "".join(f"    {line}\n" for line in body.splitlines())
    ended = support.run_script(script, tmp_path)
    assert (ended.code, ended.out.strip(), "".join(support.lines(tmp_path / "ran"))) == (code, out, ran), ended.err
    assert ended.err.strip().splitlines()[-1:] == ([err] if err else [])
    assert ended.err.count("Traceback") == (1 if err else 0)
    wait_until(lambda: not living(tmp_path), 2.0 + support.SLACK, "nothing stays")


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------

IN_RESULT = "pool = ProcessPool(1)\nsubmit(pool)\npool.submit(support.meet, *meet).result()"
IN_WITH = "with ProcessPool(1) as pool:\n list(pool.map(support.meet, meet[:1] * 3, meet[1:] * 3))"
AFTER_WITH = "with ProcessPool(1) as pool:\n pool.submit(support.meet, *meet)\n submit(pool)"
AT_EXIT = "pool = ProcessPool(1)\npool.submit(support.sleep)\nsubmit(pool)\natexit.register(meet[0].set)"


def waits(pid: int, what: str = "futex") -> bool:
    """Its main thread waits for another thread, or for something else."""
    return bool(re.search(what, getattr(support.look(pid), "wchan", "")))


@pytest.mark.parametrize(
    ("body", "code"),
    [(IN_RESULT, -signal.SIGINT), (IN_WITH, -signal.SIGINT), (AFTER_WITH, -signal.SIGINT), (AT_EXIT, 0)],
)
def test_one_ctrl_c_ends_a_script(body: str, code: int, tmp_path: Path) -> None:
    script = HEAD + "".join(f"    {line}\n" for line in body.splitlines())
    process = support.start_script(script, tmp_path)
    try:
        Signpost(tmp_path / "here").wait()
        wait_until(lambda: waits(process.pid), what="the main thread waits")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE / 2)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (code, "")
    assert err.count("Traceback") == (1 if code else 0), err
    assert err.strip().splitlines()[-1:] == (["KeyboardInterrupt"] if code else [])
    wait_until(lambda: not living(tmp_path), 2.0 + support.SLACK, "nothing stays")


class Terminal:
    """An interactive interpreter, and the terminal that it has."""

    def __init__(self, folder: Path) -> None:
        self._fd, theirs = pty.openpty()
        paths = os.pathsep.join(entry for entry in sys.path if entry)
        env = {**os.environ, "PYTHONPATH": paths, "PYTHON_BASIC_REPL": "1", "TERM": "dumb"}
        # The leader of a new session that opens a terminal gets it as its own, with Ctrl-C.
        self.process = subprocess.Popen(
            ["sh", "-c", 'exec "$1" -q <"$0" >"$0" 2>&1', os.ttyname(theirs), sys.executable],
            cwd=folder,
            env=env,
            start_new_session=True,
        )
        self._theirs = theirs
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def read(self, until: str) -> str:
        """What comes up to, and with, what matches."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(until, self.seen)):
            if not select.select([self._fd], [], [], max(0.0, end - time.monotonic()))[0]:
                pytest.fail(f"no {until!r} came, but {self.seen!r}")
            self.seen += os.read(self._fd, 4096).decode().replace("\r", "")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def rest(self) -> str:
        while select.select([self._fd], [], [], 0)[0]:
            self.seen += os.read(self._fd, 4096).decode().replace("\r", "")
        return self.seen

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._fd)
        os.close(self._theirs)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_ctrl_c_at_a_prompt(terminal: Terminal, tmp_path: Path) -> None:
    """It ends what was typed, and no task: neither one that is waited for nor others. At the end it ends them all."""
    terminal.read(">>> ")
    for line in (
        "import support, pathlib; from mpworker import ProcessPool; pool = ProcessPool(2)",
        f"here, go = (support.Signpost(pathlib.Path({str(tmp_path)!r}) / name) for name in ('here', 'go'))",
        "future = pool.submit(support.meet, here, go)",
        "here.wait() > ''",
    ):
        terminal.type(line + "\n")
        terminal.read(">>> ")
    assert len(living(tmp_path)) >= 4
    # Between the prompt and the read, a signal would only be noticed with the next line.
    wait_until(lambda: waits(terminal.process.pid, "poll|wait_woken|tty"), what="the interpreter waits for a line")
    terminal.type("\x03")
    text = terminal.read("KeyboardInterrupt\n>>> ")
    terminal.type("print('wait' + 'ing'); future.result()\n")
    text += terminal.read("waiting\n")
    terminal.type("\x03")
    text += terminal.read("KeyboardInterrupt\n>>> ")
    assert text.count("Traceback") <= 1, text
    assert "RemoteTraceback" not in text
    terminal.type("pool.submit(abs, -6).result(20), future.running()\n")
    terminal.read(r"\(6, True\)\n>>> ")
    terminal.type("\x04")
    wait_until(lambda: waits(terminal.process.pid), what="the interpreter waits for the task")
    terminal.type("\x03")
    assert terminal.process.wait(PATIENCE / 2) == 0
    assert "Traceback" not in terminal.rest()
    assert not Signpost(tmp_path / "go").is_set
    wait_until(lambda: not living(tmp_path), 2.0 + support.SLACK, "nothing stays")
