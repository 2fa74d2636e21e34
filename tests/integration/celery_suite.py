"""Celery's own integration suite, with our pool and backend beside prefork and the stock Redis backend.

    python tests/integration/celery_suite.py CHECKOUT [pytest's arguments, such as t/integration/test_canvas.py]

CHECKOUT is a folder with the source of the Celery version that is installed (its ``t/integration`` is not in the
wheel). The suite is copied to a temporary folder and runs twice, on a Redis of its own; what ends differently is
printed, and is the exit code's reason. It needs pytest-timeout, pytest-rerunfailures and pytest-subtests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS)]
import support  # noqa: E402

import mpworker  # noqa: E402

NEEDED = ("pytest_timeout", "pytest_rerunfailures", "pytest_subtests")
#: Seconds that one test may take.
PATIENCE = 120
#: Loaded by the run with our pool: everything else is the suite's own.
PLUGIN = """
from celery import concurrency
from celery.app import backends

concurrency.ALIASES["prefork"] = "mpworker.celery.pool:TaskPool"
backends.BACKEND_ALIASES["redis"] = "mpworker.celery.backend:ResultBackend"
"""


def run(ours: bool, folder: Path, arguments: list[str]) -> dict[str, str]:
    """How each test ended, by its name: passed, failed or skipped."""
    server = support.RedisServer()
    server.start()
    try:
        redis = f"redis://127.0.0.1:{server.port}"
        paths = [str(folder), str(Path(mpworker.__file__).resolve().parents[1]), *filter(None, sys.path)]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("CELERY_", "MPWORKER_"))}
        env |= {
            "TEST_BROKER": f"{redis}/0",
            "TEST_BACKEND": f"{redis}/1",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "REDIS_HOST": "127.0.0.1",
            "REDIS_PORT": str(server.port),
            "PYTHONPATH": os.pathsep.join(paths),
            "MPWORKER_DATA_DIR": str(folder / "data"),
        }
        report = folder / f"{ours}.xml"
        plugins = ["-p", "celery.contrib.pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
        plugins += ["-p", "our_pool"] if ours else []
        options = ["-q", "-c", os.devnull, f"--rootdir={folder}", f"--timeout={PATIENCE}", f"--junitxml={report}"]
        options += ["--tb=short", "-W", "ignore", "-o", "python_classes=test_* Test*"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *plugins, *options, *arguments], cwd=folder, env=env, check=False
        )
        return dict(_ended(report))
    finally:
        server.end()


def _ended(report: Path) -> list[tuple[str, str]]:
    cases = ElementTree.parse(report).iter("testcase")
    return [(f"{case.get('classname')}::{case.get('name')}", _end_of(case)) for case in cases]


def _end_of(case: ElementTree.Element) -> str:
    found = {child.tag for child in case}
    return "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"


def main() -> int:
    if len(sys.argv) < 2 or not (source := Path(sys.argv[1]) / "t").joinpath("integration").is_dir():
        print(f"usage: {sys.argv[0]} CHECKOUT [arguments]: a folder with t/integration", file=sys.stderr)
        return 2
    if missing := [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    arguments = sys.argv[2:] or ["t/integration"]
    found = {}
    for ours in (False, True):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copytree(source, folder / "t")
            (folder / "our_pool.py").write_text(PLUGIN)
            # What the tests define exists in their own process only: prefork's children are its forks as well.
            config = {"mpworker_start_method": "fork"} if ours else {}
            (folder / "integration-tests-config.json").write_text(json.dumps(config))
            found[ours] = run(ours, folder, arguments)
    for ours, name in ((False, "prefork"), (True, "mpworker")):
        print(f"{name}: {', '.join(f'{count} {end}' for end, count in sorted(Counter(found[ours].values()).items()))}")
    differences = [
        f"{name}: {found[False].get(name, 'not run')} with prefork, {found[True].get(name, 'not run')} with mpworker"
        for name in sorted(found[False].keys() | found[True].keys())
        if found[False].get(name) != found[True].get(name)
    ]
    print("\n".join(differences or ["No test ends differently."]))
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
