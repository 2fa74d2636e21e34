"""A real Django project on the pool: its tasks use the ORM, and leave no connection behind."""

from __future__ import annotations

import os
import sqlite3
from importlib.metadata import version
from pathlib import Path

import pytest
from integration.node import PATIENCE, eventually, running
from support import lines

from mpworker import ResultStore

pytest.importorskip("django")


@pytest.fixture(scope="module", params=["template", "fork"])
def clinic(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clinic")
    with sqlite3.connect(folder / "db.sqlite3") as database:
        database.execute("create table clinic_patient (id integer primary key autoincrement, name varchar(100))")
    database.close()
    env = {"DJANGO_SETTINGS_MODULE": "clinic.settings", "PYTHONWARNINGS": "default"}
    env |= {"BESIDE": "1"} if request.param == "template" else {}
    options = {"app": "clinic", "env": env}
    with running(folder, "-c", "1", **options) as (_, node, client):
        assert node.the_one("mpworker: template")
        assert ("in a template" in node.log()) is (request.param == "template")
        yield node, client


def send(clinic, name, *args):
    return clinic[1].send_task(f"clinic.tasks.{name}", args=args)


def open_files(pid):
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(entry))
        except OSError:
            continue
    return found


def test_a_task_that_uses_the_database(clinic):
    node, _ = clinic
    database = str(node.folder / "db.sqlite3")
    count, pid = send(clinic, "admit", "Ada").get(timeout=PATIENCE)
    assert count == 1
    assert pid in node.pids("mpworker: worker")
    assert send(clinic, "admit", "Bob").get(timeout=PATIENCE) == [2, pid]
    assert ResultStore(node.journal).get_statistics()["completed"] == 2
    with pytest.raises(LookupError, match="no bed for Eve"):
        send(clinic, "admit_none", "Eve").get(timeout=PATIENCE)
    assert send(clinic, "database_is_open").get(timeout=PATIENCE) is False
    assert send(clinic, "admit", "Joe").get(timeout=PATIENCE) == [3, pid]
    eventually(lambda: database not in open_files(pid), what="the connection is closed after the task")
    assert database not in open_files(node.pid)
    assert "Warning" not in "".join(line for line in node.log().splitlines() if "ixup" in line)


@pytest.mark.skipif(version("celery") < "5.6", reason="Celery 5.5 never closes a database's pool")
def test_a_pool_of_connections_is_closed_as_with_prefork(clinic):
    node, _ = clinic
    _, pid = send(clinic, "admit", "Zoe").get(timeout=PATIENCE)
    eventually(lambda: str(pid) in lines(Path(f"{node.notes.path}.pools")))
