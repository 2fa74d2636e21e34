"""The default app that ``celery -A mpworker`` finds, and :func:`install` for the app of an existing project.

Owns how configuration is completed: which broker, which result backend, which pool. Starts and connects to nothing;
what a worker does at its start is in :mod:`mpworker.celery.steps`.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Mapping
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from celery import Celery, signals
from celery.loaders.app import AppLoader
from kombu.exceptions import OperationalError

from mpworker import embedded
from mpworker.celery.queueing import mark_what_is_sent
from mpworker.errors import ConfigurationError
from mpworker.settings import PREFIX, Settings

if TYPE_CHECKING:
    app: Celery

POOL = "mpworker.celery.pool:TaskPool"
#: Also known through the package's entry point; named here so that a checkout works before it is installed.
BACKENDS = {"mpworker": "mpworker.celery.backend:ResultBackend"}
BROKER_VARIABLE, RESULT_VARIABLE = "MPWORKER_BROKER_URL", "MPWORKER_RESULT_BACKEND"

#: How a URL's scheme reads for kombu, and for Celery's result backends (``redis+`` is cut off by Celery there).
_BROKER_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "valkey+socket": "redis+socket"}
_RESULT_SCHEMES = {"valkey": "redis", "valkeys": "rediss", "valkey+socket": "socket", "redis+socket": "socket"}
_JOURNALED = ("redis", "rediss", "socket", "sentinel")

_QUICK_RETRY = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}

_installed: WeakSet[Celery] = WeakSet()
_default: list[Celery] = []
_mutex = threading.Lock()


def __getattr__(name: str) -> Any:
    """``app`` is made when first asked for, so that importing :func:`install` does not make a second current app."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _mutex:
        if not _default:
            _default.append(DefaultApp("mpworker"))
        return _default[0]


def is_default(app: Celery) -> bool:
    """Whether this is the app of this module. Makes none: a second app would be the current one from there on."""
    return app in _default


def install(app: Celery) -> Celery:
    """Gives a project's Celery app mpworker's pool, and the journal before its Redis results.

    May be called before or after the app is configured, and more than once.

    Args:
        app: any Celery app.

    Returns:
        the same app.
    """
    if app not in _installed:
        _installed.add(app)
        app.on_after_configure.connect(_complete_installed, weak=False, dispatch_uid="mpworker.install")
        signals.import_modules.connect(_check_installed, weak=False, dispatch_uid="mpworker.check")
        _connect_worker_signals()
        mark_what_is_sent()
    if app.configured:
        _complete_installed(sender=app)
    return app


def settings_of(app: Celery) -> Settings:
    """The ``mpworker_`` settings of an app, also of one configured with a namespace such as Django's ``CELERY_``.

    Raises:
        ConfigurationError: see :meth:`Settings.load`, or when no home for the data can be found.
    """
    conf = app.conf.finalize()  # before that it does not know its own prefix
    prefix = (conf.prefix or "").lower()
    found: dict[str, Any] = {}
    for key in conf:
        name = key.lower().removeprefix(prefix)
        if name.startswith(PREFIX):
            found[name] = conf[key]
    return _load(found)


def _load(conf: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    try:
        return Settings.load(conf, environ)
    except RuntimeError:  # pathlib's word for a user without a home
        raise ConfigurationError("this user has no home folder: set MPWORKER_DATA_DIR to a folder of its own") from None


def kombu_url(url: Any) -> Any:
    """A broker URL as kombu knows it: ``valkey://`` becomes ``redis://``; anything else stays."""
    if isinstance(url, list | tuple):
        return [kombu_url(each) for each in url]
    if not isinstance(url, str):
        return url
    return ";".join(_replace_scheme(each, _BROKER_SCHEMES) for each in url.split(";"))


def journal_url(url: Any) -> Any:
    """A result backend's URL with the journal before it where that is possible: Redis and Valkey, TCP or socket."""
    if not isinstance(url, str):
        return url
    plain = _replace_scheme(url.removeprefix("mpworker+"), _RESULT_SCHEMES)
    return f"mpworker+{plain}" if plain.partition("://")[0] in _JOURNALED else url


def _replace_scheme(url: str, schemes: Mapping[str, str]) -> str:
    scheme, sep, rest = url.partition("://")
    return schemes.get(scheme, scheme) + sep + rest


def uses_embedded(app: Celery) -> bool:
    """Whether the app's broker is the bundled server of its data folder."""
    return bool(app.conf.broker_url == embedded.broker_url(settings_of(app).data_dir))


class Loader(AppLoader):  # type: ignore[misc]
    """Imports the modules of tasks; a module that cannot be imported is named in one line."""

    override_backends = BACKENDS

    def import_task_module(self, module: str) -> ModuleType:
        try:
            imported: ModuleType = super().import_task_module(module)
            return imported
        except (Exception, SystemExit) as exc:
            where = traceback.extract_tb(exc.__traceback__)[-1]
            place = "" if isinstance(exc, ModuleNotFoundError | SyntaxError) else f" ({where.filename}:{where.lineno})"
            reason = f"{type(exc).__name__}: {exc}".splitlines()[0]
            raise ConfigurationError(
                f"cannot import {module}, named by {self._origin(module)}: {reason}{place}"
            ) from exc

    def _origin(self, module: str) -> str:
        if module in os.environ.get("MPWORKER_INCLUDE", "").replace(",", " ").split():
            return "MPWORKER_INCLUDE"
        return "the configuration" if module in (self.app.conf.include or ()) else "--include or imports"


class DefaultApp(Celery):  # type: ignore[misc]
    """Runs without any configuration, on the bundled server; with some, it uses that instead."""

    loader_cls = "mpworker.celery.app:Loader"

    def on_init(self) -> None:
        self.on_after_configure.connect(_complete_default, weak=False, dispatch_uid="mpworker.default")
        _connect_worker_signals()
        mark_what_is_sent()

    @cached_property
    def Worker(self) -> Any:
        return self.subclass_with_self("mpworker.celery.steps:Worker")

    def send_task(self, *args: Any, **kwargs: Any) -> Any:
        """As Celery's.

        Raises:
            OperationalError: the message cannot be sent; without a node there is no bundled server to take it.
        """
        try:
            return super().send_task(*args, **kwargs)
        except (RuntimeError, OperationalError) as exc:  # the first is the result backend's word for it
            if not uses_embedded(self) or (path := embedded.socket_path(settings_of(self).data_dir)).exists():
                raise
            raise OperationalError(
                f"no node is running here (there is no {path}): start `celery -A mpworker worker`"
            ) from exc


def _complete_default(sender: Celery, **_: Any) -> None:
    """Fills what nobody configured. The last map of a configuration holds Celery's own defaults, for this app alone."""
    conf = sender.conf
    defaults = conf.maps[-1]
    defaults["worker_pool"] = POOL
    if os.environ.get(BROKER_VARIABLE):
        conf.broker_url = kombu_url(os.environ[BROKER_VARIABLE])
    elif conf.broker_url is None:
        defaults["broker_url"] = _embedded_url(sender)
        # The socket is there or it is not: a client without a node shall hear that soon.
        defaults["result_backend_transport_options"] = {"retry_policy": dict(_QUICK_RETRY)}
    else:
        conf.broker_url = kombu_url(conf.broker_url)
    if os.environ.get(RESULT_VARIABLE):
        conf.result_backend = journal_url(os.environ[RESULT_VARIABLE])
    elif conf.result_backend is None:
        defaults["result_backend"] = _results_beside(conf.broker_url)
    else:
        conf.result_backend = journal_url(conf.result_backend)
    try:
        include = settings_of(sender).include
    except ConfigurationError:
        return  # a worker says so in one line when it starts; a client has no use for these settings
    known = [conf.include] if isinstance(conf.include, str) else [*(conf.include or ())]
    conf.include = [*known, *(name for name in include if name not in known)]


def _embedded_url(app: Celery) -> str:
    """Looks at the data folder only: some other wrong setting must not send a client to another server."""
    key, variable = f"{PREFIX}data_dir", "MPWORKER_DATA_DIR"
    try:
        settings = _load({key: app.conf.get(key)}, {variable: os.environ.get(variable, "")})
        return embedded.broker_url(settings.data_dir)
    except ConfigurationError:  # a worker says so when it starts; a client will find this in its error
        return f"redis+socket:///{variable}-is-not-usable/valkey.sock"


def _results_beside(broker: Any) -> str | None:
    """Results go where the messages are, if that is a Redis that its URL leads to. RabbitMQ stores none: then there is
    no result backend."""
    first = (list(broker) or [""])[0] if isinstance(broker, list | tuple) else str(broker or "")
    url = journal_url(first.split(";")[0])
    is_known = isinstance(url, str) and url.startswith("mpworker+") and not url.startswith("mpworker+sentinel")
    return url if is_known else None


def _complete_installed(sender: Celery, **_: Any) -> None:
    conf = sender.conf
    put(conf, "worker_pool", POOL)
    sender.loader.override_backends = {**BACKENDS, **sender.loader.override_backends}
    if conf.result_backend:
        put(conf, "result_backend", journal_url(conf.result_backend))


def put(conf: Any, key: str, value: Any) -> None:
    """Sets a key of an app's configuration. Before Celery 5.7 a namespace's own, longer name for it wins."""
    conf[key] = value
    if conf[key] != value:
        name = f"{conf.prefix}{key}"
        conf[name.upper() if conf.prefix.isupper() else name.lower()] = value


def _check_installed(sender: Celery, **_: Any) -> None:
    """Celery swallows errors of signal receivers; only an exit ends the start of a worker."""
    if sender in _installed:
        try:
            settings_of(sender)
        except ConfigurationError as exc:
            raise SystemExit(f"mpworker: {exc}") from None


def _connect_worker_signals() -> None:
    signals.celeryd_init.connect(_on_worker_init, weak=False, dispatch_uid="mpworker.init")
    signals.celeryd_after_setup.connect(_on_worker_setup, weak=False, dispatch_uid="mpworker.setup")


def _on_worker_init(instance: Any, **_: Any) -> None:
    if instance.app in _installed:
        from mpworker.celery import steps  # only in a process that becomes a worker

        try:
            steps.prepare_results(instance.app, instance.hostname)
        except ConfigurationError as exc:
            raise SystemExit(f"mpworker: {exc}") from None


def _on_worker_setup(instance: Any, **_: Any) -> None:
    if instance.app in _installed or isinstance(instance.app, DefaultApp):
        from mpworker.celery import steps

        steps.warn(instance.app)
