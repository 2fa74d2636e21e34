"""What can be known of the files in ``config/`` and of the compose file without starting a container."""

from __future__ import annotations

import configparser
import json
import re
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery.app.defaults import DEFAULTS

from mpworker.settings import PREFIX, Settings, unknown_variables

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
DOCKERFILE = (CONFIG / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def celeryconfig() -> dict[str, Any]:
    names = runpy.run_path(str(CONFIG / "celeryconfig.py"))
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, ModuleType)}


def default_of(text: str) -> str:
    """``${NAME:-value}`` as it reads when nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def seconds(text: str) -> int:
    amount = re.fullmatch(r"(\d+)s?", default_of(text))
    assert amount, text
    return int(amount[1])


# --- docker-compose.yml ----------------------------------------------------------------------------------------------


def test_the_services(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"valkey", "worker", "web", "flower"}
    assert not {"version", "name"} & set(compose), "one is obsolete, the other unknown to older composes"
    assert all(service["restart"] == "unless-stopped" for service in compose["services"].values())


def test_the_worker_can_be_scaled(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    assert not {"ports", "container_name", "hostname", "network_mode"} & set(worker)


def test_the_worker_is_reaped_and_may_finish_its_tasks(compose: dict[str, Any], celeryconfig: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    assert worker["init"] is True
    assert seconds(worker["stop_grace_period"]) > celeryconfig["task_time_limit"] + 10


def test_ports_are_open_to_this_machine_only_unless_asked(compose: dict[str, Any]) -> None:
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert {name: [default_of(port) for port in ports] for name, ports in published.items()} == {
        "web": ["127.0.0.1:8000:8000"],
        "flower": ["127.0.0.1:5555:5555"],
    }


def test_everybody_waits_for_a_healthy_server(compose: dict[str, Any]) -> None:
    services = dict(compose["services"])
    assert "valkey-cli ping" in services.pop("valkey")["healthcheck"]["test"][1]
    assert all(s["depends_on"] == {"valkey": {"condition": "service_healthy"}} for s in services.values())


def test_what_must_survive_lies_in_named_volumes(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(compose["volumes"]) == {"valkey-data", "journal"}
    assert "valkey-data:/data" in services["valkey"]["volumes"]
    assert services["worker"]["volumes"] == ["journal:/var/lib/mpworker/journal"]
    journal = Settings.load(environ={"MPWORKER_DATA_DIR": image_environment()["MPWORKER_DATA_DIR"]}).journal_dir
    assert str(journal) == "/var/lib/mpworker/journal"
    conf = (CONFIG / "valkey.conf").read_text(encoding="utf-8").splitlines()
    assert {"appendonly yes", "dir /data", "maxmemory-policy noeviction"} <= set(conf)


def test_the_environment_is_one_that_somebody_reads(compose: dict[str, Any]) -> None:
    for service in ("worker", "web", "flower"):
        environment = compose["services"][service]["environment"]
        assert unknown_variables(environment) == []
        assert environment["MPWORKER_BROKER_URL"].startswith("redis://valkey:")
        assert environment["MPWORKER_RESULT_BACKEND"].startswith("mpworker+redis://valkey:")
        assert (CONFIG / "web" / f"{environment['MPWORKER_INCLUDE']}.py").is_file()


def test_the_files_it_names_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        if "build" in service:
            assert (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (ROOT / source).is_file()


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in joined.splitlines() if line.startswith(name + " ")]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for line in instructions("ENV") for pair in line.split())


def test_the_image_runs_as_a_user_and_takes_signals() -> None:
    assert instructions("USER") == ["mpworker"]
    assert json.loads(instructions("CMD")[-1])[0] == "celery", "the exec form: no shell keeps SIGTERM to itself"
    assert all(
        "PYTHON" in n or "CELERY" in n or "PIP" in n or not unknown_variables({n: ""}) for n in image_environment()
    )


def test_the_build_context_holds_what_is_copied() -> None:
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    for copy in instructions("COPY"):
        for source in [word for word in copy.split() if not word.startswith("--")][:-1]:
            assert source.removeprefix("./").split("/")[0] in allowed
            assert (ROOT / source).exists(), source


def test_dependencies_come_before_sources() -> None:
    assert DOCKERFILE.index("pip install -r requirements.txt") < DOCKERFILE.index("COPY mpworker")


# --- celeryconfig.py and the systemd unit ----------------------------------------------------------------------------


def test_celeryconfig_holds_settings_that_exist(celeryconfig: dict[str, Any]) -> None:
    ours = {key for key in celeryconfig if key.startswith(PREFIX)}
    assert ours, "it shows at least one setting of mpworker"
    Settings.load(celeryconfig, environ={})
    assert set(celeryconfig) - ours <= set(DEFAULTS), "a misspelt setting would be ignored by Celery"
    assert celeryconfig["task_soft_time_limit"] < celeryconfig["task_time_limit"]
    assert celeryconfig["task_time_limit"] < celeryconfig["broker_transport_options"]["visibility_timeout"]
    assert celeryconfig["accept_content"] == ["json"]


def test_the_settings_that_it_only_mentions_exist_too() -> None:
    text = (CONFIG / "celeryconfig.py").read_text(encoding="utf-8")
    mentioned = dict(re.findall(r"^# (mpworker_\w+|[a-z]+_\w+) = (.+)$", text, flags=re.MULTILINE))
    assert "mpworker_include" in mentioned
    Settings.load({k: json.loads(v) for k, v in mentioned.items() if k.startswith(PREFIX)}, environ={})
    assert {key for key in mentioned if not key.startswith(PREFIX)} <= set(DEFAULTS)


def test_the_unit_stops_warm_and_is_confined(celeryconfig: dict[str, Any]) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(CONFIG / "mpworker.service", encoding="utf-8")
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert seconds(service["TimeoutStopSec"]) > celeryconfig["task_time_limit"] + 10
    assert service["User"] != "root"
    assert service["Restart"] == "always"
    assert service["OOMPolicy"] == "continue", "one task out of memory must not stop the node"
    assert (service["ProtectSystem"], service["NoNewPrivileges"]) == ("strict", "yes")
