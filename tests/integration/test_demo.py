"""``mpworker demo``: the whole way on real files, and that it leaves nothing behind however it ends."""

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from mpworker.subprocesses import Interrupts

GOOD = "import os\n\nclass A:\n    def f(self):\n        for x in []:\n            if x:\n                pass\n"
WORKING = rb"succeeded [1-9]"
NODE = "from mpworker.cli import main; main()"


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def processes_of(folder):
    """Command lines of every living process that names this folder in its environment or its arguments."""
    mark, found = os.fsencode(folder), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path / "cmdline").read_bytes()
            if state != "Z" and mark in words + (path / "environ").read_bytes():
                found.append(words.replace(b"\0", b" ").decode(errors="replace").strip())
        except OSError:
            continue  # it ended meanwhile
    return found


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    (folder / "deep").mkdir(parents=True)
    for number in range(20):
        (folder / f"good{number}.py").write_text(GOOD + "#" * number)
    (folder / "deep" / "broken.py").write_text("def f(:\n")
    (folder / "deep" / "zero.py").write_bytes(b"x = '\0'\n")
    (folder / "readme.txt").write_text("no Python")
    return folder


@pytest.fixture
def data(tmp_path):
    data = tmp_path / "data"
    yield data
    if sys.platform.startswith("linux"):
        assert until(lambda: not processes_of(data)), processes_of(data)


def start(data, *options, code=NODE, **streams):
    """The command in a new process. Only its worker and its server have the data folder in their environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MPWORKER_", "CELERY_"))}
    script = f"import sys; sys.argv[1:] = {['demo', '--data-dir', str(data), '--workers', '2', *options]!r}\n{code}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen([sys.executable, "-u", "-c", script], env=environment, **streams)


def run(data, *options, code=NODE):
    process = start(data, *options, code=code)
    out, err = process.communicate(timeout=110)
    return process.returncode, out.decode(), err.decode()


def test_every_file_is_a_task_and_every_result_is_in_both_places(data, sources):
    code, out, err = run(data, "--dir", str(sources))
    assert code == 0, out + err
    assert "\x1b" not in out
    assert "files: 100 % 22/22, succeeded 20, failed 2" in out
    assert "checked: all 22 results are in Redis and in the journal" in out
    assert "SyntaxError" in out
    assert "deep/broken.py" in out
    [home] = (data / "demo").iterdir()
    assert f"journal: {home / 'journal'}" in out
    lines = [json.loads(line) for path in (home / "journal").glob("*.jsonl") for line in path.open()]
    results = [line["result"] for line in lines if line["status"] == "SUCCESS"]
    assert len(results) == 20
    assert {result["sha256"] for result in results} == {
        hashlib.sha256((sources / f"good{number}.py").read_bytes()).hexdigest() for number in range(20)
    }
    assert all((r["lines"] >= 7, r["functions"], r["classes"], r["depth"]) == (True, 1, 1, 4) for r in results)
    assert sorted(path.name for path in home.iterdir()) == ["journal", "valkey.log", "worker.log"]


LOSES_ONE = (
    "import mpworker.demo as d\n"
    "report = d.Demo._report\n"
    "def lose_one(self, elapsed):\n"
    "    d.app.backend.client.delete(d.app.backend.get_key_for_task(next(iter(self.paths))))\n"
    "    return report(self, elapsed)\n"
    "d.Demo._report = lose_one\n" + NODE
)


def test_a_terminal_gets_a_live_view_and_a_missing_result_fails_the_check(data, sources):
    ours, theirs = pty.openpty()
    process = start(data, "--dir", str(sources), code=LOSES_ONE, stdout=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how Linux says that the last writer has closed a terminal
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert process.wait(30) == 1, shown + process.stderr.read()
    process.stderr.close()
    assert b"\x1b[" in shown
    assert b"22/22" in shown
    assert b"the check FAILED for 1 of 22 tasks" in shown
    assert b"nothing in Redis" in shown


def interrupted(data, pattern, signals, pause=0.0):
    """Sends the signals once the pattern has been shown; returns the exit code and what was shown."""
    process = start(data, "--dir", sysconfig.get_paths()["stdlib"])
    shown = b""
    while not re.search(pattern, shown):
        part = os.read(process.stdout.fileno(), 65536)
        assert part, shown + process.stderr.read()
        shown += part
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in out + err, out + err
    return process.returncode, shown + out


@pytest.mark.parametrize(
    ("pattern", "signals"),
    [
        (b"starting 2 worker processes", [signal.SIGINT]),
        (b"files: 0 %", [signal.SIGINT]),
        (WORKING, [signal.SIGTERM]),
    ],
)
def test_ctrl_c_stops_everything(data, pattern, signals):
    code, _ = interrupted(data, pattern, signals)
    assert code == 130
    if sys.platform.startswith("linux"):
        assert processes_of(data) == []


def test_ctrl_c_twice_stops_everything_too(data):
    code, _ = interrupted(data, WORKING, [signal.SIGINT, signal.SIGINT, signal.SIGINT], pause=0.1)
    assert code == 130
    if sys.platform.startswith("linux"):
        assert processes_of(data) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_a_killed_demo_leaves_nothing_either(data):
    code, _ = interrupted(data, WORKING, [signal.SIGKILL])
    assert code == -signal.SIGKILL
    assert until(lambda: not processes_of(data), 20.0), processes_of(data)


def test_signals_that_the_shell_has_ignored_stay_ignored():
    """``nohup`` says so for SIGHUP, ``&`` in a script for SIGINT."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pytest.fail("SIGHUP came through")
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_the_standard_library_is_found_without_installed_packages():
    code = "from mpworker.demo import python_files; print(*python_files(None), sep='\\n')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(found) > 300
    assert any(path.endswith("json/decoder.py") for path in found)
    assert not any("site-packages" in path or "__pycache__" in path for path in found)
