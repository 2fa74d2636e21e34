"""Only monotonic time counts: a clock that is set decides nothing in the pool."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpworker.pool

FILES = sorted(Path(mpworker.pool.__file__).parent.glob("*.py"))
#: All that the pool may take from ``time``, and modules that know only the wall clock.
ALLOWED, WALL = {"monotonic", "sleep"}, {"datetime", "calendar", "sched"}
#: The kernel dates processes by this one, which nobody can set.
BOOT = "time.clock_gettime(time.CLOCK_BOOTTIME)"
#: Attributes of anything that tell what the wall clock said.
STAMPS = {"st_mtime", "st_atime", "st_ctime", "st_mtime_ns", "st_atime_ns", "st_ctime_ns", "getmtime", "getctime"}


def wall_clocks(text: str) -> Iterator[str]:
    """Every use of a clock that can be set, and of ``time`` in a way that hides which clock is meant."""
    tree = ast.parse(text.replace(BOOT, "0.0"))
    names = {"time"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "time"}
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in WALL)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "time":
                yield from (f"time.{alias.name}" for alias in node.names if alias.name not in ALLOWED)
            elif (node.module or "").split(".")[0] in WALL:
                yield str(node.module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id in names and node.attr not in ALLOWED:
                yield f"time.{node.attr}"
            elif node.attr in STAMPS:
                yield node.attr
        elif isinstance(node, ast.Constant) and node.value == "time":
            yield "time, by name"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_clock_that_can_be_set_is_read(path: Path) -> None:
    assert not list(wall_clocks(path.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.time()",
        "import time as t\nt.time_ns()",
        "import time\ntime.localtime()",
        "import time\ntime.clock_gettime(0)",
        "from time import time",
        "from time import monotonic, time as now",
        "from datetime import datetime\ndatetime.now()",
        "import datetime",
        "import os\nos.stat('x').st_mtime",
        "import os\nos.path.getmtime('x')",
        "__import__('time').time()",
    ],
)
def test_the_check_sees_them(text: str) -> None:
    assert list(wall_clocks(text))


def test_the_check_lets_the_others_pass() -> None:
    assert not list(
        wall_clocks(f"import time\n{BOOT}\nfrom time import monotonic\ntime.monotonic() - monotonic()\ntime.sleep(1)")
    )
