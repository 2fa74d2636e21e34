"""A pytest plugin: the fixture ``mpworker_worker`` gives a test a real worker, with a server of its own.

Owns the lives of that server and that worker, and the settings that an app has meanwhile. Loaded by pytest wherever
mpworker is installed, so it imports nothing until a fixture is asked for. Never touches a broker that a project uses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from celery import Celery

    from mpworker.embedded import EmbeddedServer


@pytest.fixture(scope="session")
def mpworker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server for the whole session, in a temporary folder; ``broker_url`` and ``result_url`` say where."""
    from mpworker import embedded

    with embedded.acquire(Path(tmp_path_factory.mktemp("mpworker", numbered=True))) as server:
        yield server


@pytest.fixture
def mpworker_app() -> Celery:
    """The app of :func:`mpworker_worker`; a project's ``conftest.py`` overrides this to return its own."""
    from mpworker import app

    return app


@pytest.fixture
def mpworker_worker_options() -> dict[str, Any]:
    """Options of the worker, such as ``concurrency`` (2), ``queues``, ``loglevel``; override this to change them."""
    return {}


@pytest.fixture
def mpworker_worker(
    mpworker_app: Celery, mpworker_server: EmbeddedServer, mpworker_worker_options: dict[str, Any]
) -> Iterator[Any]:
    """A worker for one test: what the test sends is run by real processes, with real limits, acks and results.

    The processes are forks of the one that tests, taken when the fixture is set up: they know tasks that the test
    module defines, and what has been patched before.

    Yields:
        the ``celery.worker.WorkController``.
    """
    import mpworker
    from mpworker.celery.pool import TaskPool

    options = {"concurrency": 2, "pool": TaskPool, "perform_ping_check": False, **mpworker_worker_options}
    settings = {
        "broker_url": mpworker_server.broker_url,
        "broker_read_url": None,
        "broker_write_url": None,
        "result_backend": mpworker_server.result_url,
        "task_always_eager": False,
        "mpworker_data_dir": str(mpworker_server.data_dir),
        "mpworker_start_method": "fork",
    }
    mpworker.install(mpworker_app)
    with _settings(mpworker_app, settings):
        from celery.contrib.testing.worker import start_worker

        try:
            with start_worker(mpworker_app, **options) as worker:
                yield worker
        finally:
            _empty(mpworker_server)


@contextlib.contextmanager
def _settings(app: Celery, settings: dict[str, Any]) -> Iterator[None]:
    """Other settings for an app for a while, whatever it is connected to."""
    from mpworker.celery.app import put

    before = {key: app.conf.get(key) for key in settings}
    _disconnect(app)
    for key, value in settings.items():
        put(app.conf, key, value)
    try:
        yield
    finally:
        _disconnect(app)
        for key, value in before.items():
            put(app.conf, key, value)


def _disconnect(app: Any) -> None:
    """Forgets the connections and the backend that an app has made by its settings."""
    app._after_fork()
    app._backend_cache, app._local = None, threading.local()


def _empty(server: EmbeddedServer) -> None:
    """What one test has sent is not the next one's."""
    from redis import Redis

    from mpworker.embedded import socket_path

    with Redis(unix_socket_path=str(socket_path(server.data_dir))) as client:
        client.flushall()
