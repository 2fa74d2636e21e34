"""What a worker's main process does at its start, in this order: settings, modules, journal, broker, then Celery.

Everything that can be wrong ends the start with one line and a non-zero exit, before a process or a consumer exists.
Owns the checks. Never looks at a message or a result.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.apps import worker
from celery.utils.imports import symbol_by_name
from kombu.utils.functional import maybe_list

from mpworker import embedded
from mpworker.celery.app import BROKER_VARIABLE, RESULT_VARIABLE, journal_url, put, settings_of, uses_embedded
from mpworker.errors import ConfigurationError
from mpworker.results.journal import Flusher
from mpworker.settings import unknown_variables

logger = logging.getLogger("mpworker")

_CONNECT_SECONDS = 5.0
_CONNECT_RETRIES = 2
#: Seconds between two attempts to start a bundled server that does not start.
_KEEPER_PAUSE = 5.0


class Worker(worker.Worker):  # type: ignore[misc]
    """Celery's worker program, for the default app: every refusal to start is one line."""

    def __init__(self, app: Celery | None = None, hostname: str | None = None, **kwargs: Any) -> None:
        try:
            settings_of(app or self.app)
            super().__init__(app, hostname, **kwargs)
        except ConfigurationError as exc:
            raise SystemExit(f"mpworker: {exc}") from None

    def on_before_init(self, **kwargs: Any) -> None:
        check_broker_url(self.app)
        # Celery would import these only after the server has started.
        for module in maybe_list(kwargs.get("include")) or ():  # type: ignore[no-untyped-call]
            self.app.loader.import_task_module(module)
        prepare_results(self.app, self.hostname)
        self._server = embedded.acquire(settings_of(self.app).data_dir) if uses_embedded(self.app) else None
        check_broker(self.app)
        super().on_before_init(**kwargs)

    def on_consumer_ready(self, consumer: Any) -> None:
        super().on_consumer_ready(consumer)
        if self._server is not None:  # not earlier: beside a thread the main process cannot be forked
            _Keeper(self._server.data_dir).start()


class _Keeper(threading.Thread):
    """Brings the bundled server back when something kills it while this node runs. Waits on a connection to it."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(name="embedded-keeper", daemon=True)
        self.data_dir = data_dir

    def run(self) -> None:
        while True:
            self._await_end()
            logger.warning("mpworker: the bundled server has ended; starting it again")
            try:
                embedded.acquire(self.data_dir).release()
            except ConfigurationError as exc:
                logger.error("mpworker: %s", exc)
                time.sleep(_KEEPER_PAUSE)

    def _await_end(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
            connection.connect(str(embedded.socket_path(self.data_dir)))
            while connection.recv(4096):
                pass


def prepare_results(app: Celery, hostname: str) -> None:
    """Puts the journal before a Redis result backend that was configured late, and opens the node's journal.

    Raises:
        ConfigurationError: the result backend's URL is malformed, or the journal cannot be written.
    """
    app.conf.finalize()  # what install() added comes with the rest of the configuration
    variable = "CELERY_RESULT_BACKEND"  # of the environment, or from --result-backend: Celery reads it before all else
    if os.environ.get(variable):
        os.environ[variable] = journal_url(os.environ[variable])
    elif app.conf.result_backend:
        put(app.conf, "result_backend", journal_url(app.conf.result_backend))
    try:
        app.backend  # noqa: B018 - made here, so that what is wrong with its URL shows
    except ConfigurationError:
        raise
    except Exception as exc:
        origin = _origin(variable, RESULT_VARIABLE, "result_backend")
        raise ConfigurationError(
            f"{origin}: {masked(app.conf.result_backend)} cannot be used: {_one_line(exc)}"
        ) from exc
    if (app.conf.result_backend or "").startswith("mpworker+"):
        from mpworker.celery import shipping
        from mpworker.celery.backend import enable_journal

        settings = settings_of(app)
        journal = enable_journal(settings, hostname)
        flusher = Flusher(journal) if settings.journal_fsync == "batch" else None
        shipping.start_with(app, settings, hostname, flusher)


def check_broker_url(app: Celery) -> None:
    """Reads the broker's URL without connecting.

    Raises:
        ConfigurationError: it is malformed.
    """
    url = app.conf.broker_read_url
    for each in url if isinstance(url, list | tuple) else str(url).split(";"):
        problem = _malformed(each)
        if problem:
            raise ConfigurationError(f"{_broker_origin()}: {masked(each)} is no broker URL: {problem}")


def check_broker(app: Celery) -> None:
    """Connects once. ``broker_connection_retry_on_startup = True`` asks to wait instead, as Celery does.

    Raises:
        ConfigurationError: nobody answers there.
    """
    if app.conf.broker_connection_retry_on_startup:
        return
    try:
        connect_once(app, _CONNECT_SECONDS)
    except Exception as exc:  # whatever a transport raises: nobody can work with this broker
        url = masked(app.conf.broker_read_url)
        raise ConfigurationError(f"{_broker_origin()}: no answer from the broker {url}: {_one_line(exc)}") from exc


def connect_once(app: Celery, patience: float) -> None:
    """Raises what the transport raises if nobody answers at the broker's address.

    Args:
        patience: seconds that one of a few attempts may take.
    """
    with app.connection_for_read(connect_timeout=patience) as connection:
        if connection.transport.driver_type == "redis":
            connection.transport_options.setdefault("socket_connect_timeout", patience)
        connection.ensure_connection(max_retries=_CONNECT_RETRIES, interval_start=0.2, interval_step=0.2)


def warn(app: Celery) -> None:
    """One line for each thing that is likely a mistake but no reason to refuse."""
    for line in unknown_variables():
        logger.warning("mpworker: %s", line)
    ours, celerys = os.environ.get(BROKER_VARIABLE), os.environ.get("CELERY_BROKER_URL")
    if ours and celerys and ours != celerys:
        logger.warning("mpworker: CELERY_BROKER_URL (or -b) is used, %s is not", BROKER_VARIABLE)
    if not app.conf.result_backend:
        logger.warning(
            "mpworker: no result backend is configured, so results are neither stored nor journaled; set %s",
            RESULT_VARIABLE,
        )


def _malformed(url: str) -> str | None:
    """Why ``url`` cannot be a broker's, or ``None``."""
    scheme, separator, _ = url.partition("://")
    if not separator or not scheme:
        return "it has no scheme, such as redis:// or amqp://"
    try:
        _ = urlsplit(url).port
    except ValueError:
        return "its port is no number"
    from kombu.transport import TRANSPORT_ALIASES

    name = scheme.partition("+")[0]
    if name not in TRANSPORT_ALIASES:
        return f"nobody knows {name}://"
    try:
        symbol_by_name(TRANSPORT_ALIASES[name])
    except (ImportError, AttributeError) as exc:
        return f"{name}:// needs another package: {_one_line(exc)}"
    return None


def _broker_origin() -> str:
    return _origin("CELERY_BROKER_URL", BROKER_VARIABLE, "broker_url")


def _origin(*names: str) -> str:
    """Which of these variables is set; the last is the name of Celery's setting."""
    return next((name for name in names[:-1] if os.environ.get(name)), names[-1])


def masked(url: Any) -> str:
    """The URL without its password."""
    if isinstance(url, list | tuple):
        return ", ".join(masked(each) for each in url)
    before, at, after = str(url).rpartition("@")
    head, separator, credentials = before.partition("://")
    user = credentials.partition(":")[0] if separator else ""
    return f"{head}{separator}{user}:**@{after}" if at else str(url)


def _one_line(exc: BaseException) -> str:
    text = " ".join(str(exc).split())
    return text or type(exc).__name__
