"""What a user can get wrong: one clear line, a non-zero exit, nothing half-started."""

import os
import socket
import subprocess
import sys

import pytest

from mpworker import embedded


def environment(tmp_path, **changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MPWORKER_", "CELERY_"))}
    return {**kept, "MPWORKER_DATA_DIR": str(tmp_path / "data"), "PYTHONWARNINGS": "ignore", **changes}


def run(tmp_path, *words, **changes):
    return subprocess.run(
        [sys.executable, *(["-c", *words[1:]] if words[0] == "code" else ["-m", *words])],
        cwd=tmp_path,
        env=environment(tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=100,
    )


def refused(tmp_path, *options, app="mpworker", **changes):
    """Starts a worker that must refuse; returns its one line."""
    done = run(tmp_path, "celery", "-A", app, "worker", "-c", "1", "-l", "INFO", *options, **changes)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    assert done.returncode == 1, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("mpworker: ")
    assert not embedded.socket_path(tmp_path / "data").exists()
    return lines[0]


@pytest.fixture
def free_port():
    """A port on which nobody listens: bound, so that nobody else takes it, but not listening."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_an_include_that_cannot_be_imported(tmp_path, source, says):
    if source is not None:
        (tmp_path / "wrong.py").write_text(source)
    line = refused(tmp_path, MPWORKER_INCLUDE="wrong")
    assert "cannot import wrong, named by MPWORKER_INCLUDE" in line
    assert says in line


def test_an_include_option_that_cannot_be_imported(tmp_path):
    assert "cannot import nothere" in refused(tmp_path, "-I", "nothere")


def test_a_broker_that_refuses(tmp_path, free_port):
    line = refused(tmp_path, MPWORKER_BROKER_URL=f"redis://:s3cret@127.0.0.1:{free_port}/0")
    assert f"MPWORKER_BROKER_URL: no answer from the broker redis://:**@127.0.0.1:{free_port}/0" in line
    assert "s3cret" not in line


def test_an_amqp_broker_that_refuses(tmp_path, free_port):
    line = refused(tmp_path, MPWORKER_BROKER_URL=f"amqp://me:s3cret@127.0.0.1:{free_port}//")
    assert "no answer from the broker amqp://me:**@127.0.0.1" in line


def test_celerys_own_option_is_named(tmp_path, free_port):
    line = refused(tmp_path, CELERY_BROKER_URL=f"redis://127.0.0.1:{free_port}/0")
    assert "CELERY_BROKER_URL" in line


@pytest.mark.parametrize("url", ["localhost:6379", "redis://h:port/0"])
def test_a_malformed_broker_url(tmp_path, url):
    assert "MPWORKER_BROKER_URL" in refused(tmp_path, MPWORKER_BROKER_URL=url)


def test_a_malformed_result_backend(tmp_path):
    assert "MPWORKER_RESULT_BACKEND" in refused(tmp_path, MPWORKER_RESULT_BACKEND="nonsense")


def test_an_unknown_setting(tmp_path):
    (tmp_path / "settings_of_mine.py").write_text("mpworker_journl = 'x'\n")
    line = refused(tmp_path, CELERY_CONFIG_MODULE="settings_of_mine")
    assert "unknown setting mpworker_journl; did you mean mpworker_journal?" in line


def test_an_unknown_setting_of_an_installed_app(tmp_path):
    source = "from celery import Celery\nimport mpworker\napp = mpworker.install(Celery('proj'))\n"
    (tmp_path / "proj.py").write_text(source + "app.conf.mpworker_journl = 'x'\n")
    assert "did you mean mpworker_journal?" in refused(tmp_path, app="proj")


def test_a_wrong_value(tmp_path):
    assert "MPWORKER_START_METHOD must be one of" in refused(tmp_path, MPWORKER_START_METHOD="spoon")


def test_a_data_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    line = refused(tmp_path, MPWORKER_DATA_DIR=str(tmp_path / "file" / "data"), MPWORKER_JOURNAL=str(tmp_path / "j"))
    assert "MPWORKER_DATA_DIR" in line


def test_a_journal_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    line = refused(tmp_path, MPWORKER_JOURNAL=str(tmp_path / "file" / "journal"))
    assert str(tmp_path / "file" / "journal") in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", "0"], "--workers must be 1 or more"),
        (["--dir", "not/there"], "is no folder"),
        (["--dir", "."], "no .py file"),
    ],
)
def test_options_of_the_demo(tmp_path, options, says):
    (tmp_path / "empty").mkdir()
    done = run(tmp_path, "mpworker", "demo", *options)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "data").exists()


def test_the_demo_says_why_its_worker_ended(tmp_path):
    (tmp_path / "one.py").touch()
    data = tmp_path / "data"
    code = (
        "import sys, mpworker.demo as d; from pathlib import Path\n"
        "p = d.NodeProcess.__init__\n"
        "d.NodeProcess.__init__ = lambda self, log, include, n: p(self, log, 'not_there', n)\n"
        f"sys.argv[1:] = ['demo', '--dir', '.', '--data-dir', {str(data)!r}]; from mpworker.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "exit code 1" in done.stderr
    assert "cannot import not_there" in done.stderr
    assert "worker.log" in done.stderr


OLD_CELERY = """
import sys, celery
celery.__version__ = "5.4.0"
from celery.__main__ import main
sys.argv[0] = "celery"
main()
"""
PROJECT = """
import mpworker
from celery import Celery

app = mpworker.install(Celery("proj", broker="memory://"))
"""


@pytest.mark.parametrize("how", ["default app", "installed", "environment only"])
def test_a_celery_that_is_too_old(tmp_path, how):
    (tmp_path / "proj.py").write_text(PROJECT if how == "installed" else PROJECT.replace("mpworker.install", ""))
    (tmp_path / "old.py").write_text(OLD_CELERY)
    app = "mpworker" if how == "default app" else "proj"
    options, changes = ["-P", "threads"], {}
    if how == "environment only":
        options, changes = ["-P", "custom"], {"CELERY_CUSTOM_WORKER_POOL": "mpworker.celery.pool:TaskPool"}
    done = run(tmp_path, "old", "-A", app, "worker", *options, **changes)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "mpworker: this is Celery 5.4.0; 5.5 or newer is needed\n"


def test_a_celery_that_is_too_old_in_another_program(tmp_path):
    (tmp_path / "proj.py").write_text(PROJECT)
    done = run(tmp_path, "code", "import celery; celery.__version__ = '5.4.0'; import proj")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: this is Celery 5.4.0; 5.5 or newer is needed"
