"""The rooms of DESIGN.md: imports point down only, and only one room knows Celery."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpworker

ROOT = Path(mpworker.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
BASE = {"errors", "states", "settings"}
#: What each room may import when it is loaded, besides itself. What is not listed may be imported by nobody below.
MAY = {
    "__init__": set(),
    "errors": set(),
    "states": set(),
    "settings": {"errors"},
    "logs": BASE,
    "pool": {*BASE, "logs"},
    "model": {*BASE, "pool"},
    "results": {*BASE, "logs"},
    "embedded": BASE,
    "guard": {"embedded"},
    "subprocesses": BASE,
    "celery": {*BASE, "logs", "pool", "model", "results", "embedded"},
    "monitor": {*BASE, "results"},
    "demo": {*BASE, "celery", "embedded", "monitor", "results", "subprocesses"},
    "cli": {*BASE, "__init__", "demo", "embedded", "monitor", "results", "subprocesses"},
    "__main__": {"cli"},
    "pytest_plugin": set(),
}
#: And what it may import later, in a function, where that points up or needs a heavy library.
MAY_LATER = {
    "model": {"celery"},  # only with broker=
    "guard": {"pool"},  # the title
    "cli": {"celery"},
    "results": {"pool"},  # to look through a large journal with more than one processor
    "pytest_plugin": {"__init__", "celery", "embedded"},
}
HEAVY = {"celery", "kombu", "billiard", "vine"}
#: Libraries, besides HEAVY in mpworker/celery, that a room may need.
LIBRARIES = {"celery": {*HEAVY, "redis", "click"}, "monitor": {"rich"}, "cli": {"click", "rich"}, "demo": {"rich"}}
LIBRARIES |= {"results": {"msgspec"}, "pytest_plugin": {"pytest"}}
LATER_LIBRARIES = {"demo": {"celery"}, "cli": {"celery", "redis"}, "embedded": {"redis"}, "results": {"redis"}}
LATER_LIBRARIES["pytest_plugin"] = {"celery", "redis"}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether that happens only inside a function. Not what is only for the type checker."""
    package = ["mpworker", *path.relative_to(ROOT).parts[:-1]]

    def walk(node: ast.AST, later: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # "from mpworker import x" may mean a module or a name that the lobby fetches.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "mpworker" else [module]
            yield from ((name, later) for name in names)
        inside = later or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(path.read_text()), False)


def target_room(name: str) -> str:
    part = name.split(".")[1] if "." in name else "__init__"
    known = part in MAY or (ROOT / part).is_dir() or (ROOT / f"{part}.py").exists()
    return part if known else "__init__"


def test_every_room_is_listed_here() -> None:
    assert {room_of(path) for path in MODULES} <= set(MAY), "a new room: say in MAY what it may import"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    for name, later in imports_of(path):
        top = name.split(".")[0]
        if top == "mpworker":
            allowed = {room, *MAY[room], *(MAY_LATER.get(room, set()) if later else set())}
            assert target_room(name) in allowed, f"{room} imports {name}"
        elif top not in sys.stdlib_module_names:
            libraries = LIBRARIES.get(room, set()) | (LATER_LIBRARIES.get(room, set()) if later else set())
            assert top in libraries, f"{room} imports {name}"


def test_only_the_celery_room_loads_celery() -> None:
    rooms = {
        room_of(path)
        for path in MODULES
        for name, later in imports_of(path)
        if not later and name.split(".")[0] in HEAVY
    }
    assert rooms == {"celery"}


def test_the_engine_is_standard_library_only() -> None:
    found = {
        name.split(".")[0]
        for path in MODULES
        if room_of(path) == "pool"
        for name, _ in imports_of(path)
        if name.split(".")[0] not in sys.stdlib_module_names
    }
    assert found == {"mpworker"}


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import celery.app\nif TYPE_CHECKING:\n import redis\ndef f():\n from kombu import x\nfrom . import frames\n"
    (tmp_path / "pool").mkdir()
    path = tmp_path / "pool" / "x.py"
    path.write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path) if __name__ in sys.modules else None
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert list(imports_of(path)) == [("celery.app", False), ("kombu", True), ("mpworker.pool", False)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_owns(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring[0].isupper() or docstring[0] in "`"
