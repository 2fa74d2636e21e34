"""What a child of a Celery node does: find the app, become a Celery worker process, run the target, call its hooks.

Owns what happens inside worker processes and the callback process on Celery's behalf. Never runs in the main
process, except for :func:`describe_app`, which tells the children where to look.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NamedTuple

import billiard.process
from billiard.common import REMAP_SIGTERM, TERM_SIGNAME
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, signals
from celery._state import _set_task_join_will_block, get_current_task
from celery.app import backends, trace
from celery.app import base as app_base
from celery.utils.imports import cwd_in_path
from celery.utils.log import ColorFormatter, get_logger
from celery.worker import state as worker_state

from mpworker import logs
from mpworker.celery import hooks, progress, task_log, telemetry
from mpworker.celery.app import is_default
from mpworker.celery.async_tasks import run_on_the_loop
from mpworker.celery.models import register_models
from mpworker.celery.queueing import waited
from mpworker.errors import ConfigurationError, PayloadError
from mpworker.pool import worker as pool_worker
from mpworker.pool.jobs import Lane
from mpworker.pool.parcel import pack
from mpworker.results.bell import Bell
from mpworker.results.record import task_begins, task_ends


class AppSpec(NamedTuple):
    """Where a child finds the app."""

    #: ``(module, attribute)``, or ``None``: then the pickled app has to do, as in Celery's own spawned children
    place: tuple[str, str] | None
    pickled: bytes
    #: settings that the command line or the program changed after the app was defined
    changes: dict[str, Any]
    #: task modules beyond the configuration's
    include: tuple[str, ...]
    #: why it is not pickled: then forks of the main process know it, and no others
    problem: str = ""

    @property
    def in_main(self) -> bool:
        """The app is defined in the script itself, which children then import as ``__mp_main__``."""
        return self.place is not None and self.place[0] == "__main__"


def describe_app(app: Celery) -> AppSpec:
    """Tells where ``app`` is defined by looking for the module that holds it."""
    app = app._get_current_object() if hasattr(app, "_get_current_object") else app
    place, pickled, problem = _place_of(app), b"", ""
    if place is None:
        try:
            pickled = pack(app, "the app, which is in no module where a worker process could find it,")
        except PayloadError as exc:
            problem = str(exc)
    # What is pickled of an app is not all that it has been set to.
    changes = app.conf.changes if place else app.conf.table(censored=False)
    changes = {key: value for key, value in changes.items() if _can_travel(value)}
    return AppSpec(place, pickled, changes, tuple(app.conf.include or ()), problem)


def _place_of(app: Celery) -> tuple[str, str] | None:
    if is_default(app):
        return "mpworker", "app"
    for name, module in list(sys.modules.items()):
        if module is None or name.partition(".")[0] in ("celery", "mpworker", "kombu"):
            continue
        try:
            names = [attribute for attribute, value in vars(module).items() if value is app]
        except TypeError:
            continue
        if names:
            return name, names[0]
    return None


def local_tasks(app: Celery) -> list[str]:
    """Names of tasks that were defined inside a function: no import makes those again."""
    mine = {name: task for name, task in app.tasks.items() if not name.startswith("celery.")}
    return sorted(name for name, task in mine.items() if "<locals>" in getattr(task.run, "__qualname__", ""))


def _can_travel(value: object) -> bool:
    """A setting that cannot (it holds a lambda, say) is set again by the module that defines the app."""
    try:
        pack(value, "a setting")
    except PayloadError:
        return False
    return not callable(value)


def load(spec: AppSpec) -> None:
    """Finds the app in this fresh process and imports its task modules."""
    with cwd_in_path():  # as ``celery -A`` does
        app = _find(spec)
        app.set_current()
        app.set_default()
        app.loader.init_worker()
        for name in spec.include:
            app.loader.import_task_module(name)
        register_models(app)
        app.finalize()
        _import_clients(app)
    for fixup in app._fixups or ():  # Django's waits for a signal that only a main process sends
        if hasattr(fixup, "on_worker_init"):
            fixup.on_worker_init(sender=_Prefork(app))
    global _app
    _app = app


class _Prefork(NamedTuple):
    """The worker as Celery's Django fixup knows it: only with this name for the pool it closes those of databases."""

    app: Celery
    pool_cls: str = "prefork"


def _import_clients(app: Celery) -> None:
    """The modules for results and broker, once for all workers: imported by each, they cost 0.2 s and 20 MB apiece."""
    import_module("encodings.idna")  # needed for each name of a host
    with suppress(Exception):  # what is wrong with a URL has been said in the main process
        cls, _ = backends.by_url(app.backend_cls or app.conf.result_backend, app.loader)
        if hasattr(cls, "prepare_line"):
            app.backend.prepare_line()
    with suppress(Exception):
        app.connection_for_write().get_transport_cls()


def _find(spec: AppSpec) -> Celery:
    if spec.place is None:
        os.environ["FORKED_BY_MULTIPROCESSING"] = "1"  # what Celery looks at when tasks bind to an app that was pickled
        app_base.USING_EXECV = True
        if spec.problem:
            raise PayloadError(spec.problem)
        return _change(pickle.loads(spec.pickled), spec)
    module, attribute = spec.place
    try:
        app = getattr(import_module(module), attribute)
    except AttributeError:
        raise ConfigurationError(
            f"importing {module} does not make the app {attribute!r} there: define it at the top level of a module, "
            "not under 'if __name__', or set mpworker_start_method to fork"
        ) from None
    return _change(app._get_current_object() if hasattr(app, "_get_current_object") else app, spec)


def _change(app: Celery, spec: AppSpec) -> Celery:
    for key, value in spec.changes.items():
        if app.conf.get(key) != value:
            app.conf[key] = value
    return app


_adopting = threading.RLock()
#: forks that are made now leave alone what the parent may read; and what was replaced for that
_spares = False
_spared: list[Callable[..., Any]] = []
_app: Celery | None = None
#: this process is a fork of the main process, or is that itself
_inherited = False
_hostname: str | None = None


def adopt(app: Celery) -> None:
    """For children that are forks of the main process: the app is there already, and so are its fixups."""
    for fixup in app._fixups or ():
        if hasattr(fixup, "worker_fixup"):
            fixup.worker_fixup.worker = _Prefork(app)
    _import_clients(app)


@contextmanager
def adopted(app: Celery) -> Iterator[None]:
    """What is forked inside, in any thread, is a child of this app's node: there may be others in this process."""
    global _app, _inherited, _spares
    with _adopting:
        before = _app, _inherited, _spares
        _app, _inherited, _spares = app, True, True
        try:
            yield
        finally:
            _app, _inherited, _spares = before


def _spare_the_parent() -> None:
    """In a fork: kombu closes the connections that it has inherited, and if another thread of the parent waits for a
    message just then, it reads that from the line which both have."""
    if _spares and (redis := sys.modules.get("kombu.transport.redis")) is not None and not _spared:
        _spared.append(redis.Channel._brpop_read)
        redis.Channel._brpop_read = lambda self, **options: None


os.register_at_fork(after_in_child=_spare_the_parent)


def _stand_alone() -> None:
    """What this process inherited is closed: from here on all it has is its own."""
    global _adopting, _spares
    _adopting, _spares = threading.RLock(), False  # in a fork that is held, and a task may be a test with a worker
    if _spared:
        sys.modules["kombu.transport.redis"].Channel._brpop_read = _spared.pop()


def initialize(hostname: str, journal: bool, bell: Bell | None = None) -> None:
    """Makes this process a Celery worker process, step by step as prefork's own initializer.

    Args:
        hostname: the node's name.
        journal: results go to the node's journal first.
        bell: of the node's shipper.
    """
    global _hostname
    app, _hostname = _app, hostname
    assert app is not None
    _stand_alone()
    worker = pool_worker.this_worker
    _set_task_join_will_block(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if REMAP_SIGTERM:
        signal.signal(getattr(signal, TERM_SIGNAME), signal.SIG_IGN)
    process = billiard.process.current_process()
    process._name = pool_worker.process_name()
    # Celery counts from 1 for log files named by %i, where 0 is the main process.
    process.index = worker.slot if worker is not None and worker.lane is Lane.TASKS else -2
    app.loader.init_worker()
    app.loader.init_worker_process()
    _set_up_logging(app, hostname)
    trace.setup_worker_optimizations(app, hostname)
    if journal:
        from mpworker.celery.app import settings_of
        from mpworker.celery.backend import enable_journal

        enable_journal(settings_of(app), hostname, bell)
    hooks.listen_in_worker()
    progress.listen_in_worker(app)
    task_log.listen_in_worker()
    for name, task in app.tasks.items():
        run_on_the_loop(task)
        task.__trace__ = trace.build_tracer(name, task, app.loader, hostname, app=app)
    worker_state.reset_state()
    signals.worker_process_init.send(sender=hostname)


def enter_service(hostname: str) -> Celery:
    """Makes this process one that works for the node and runs no tasks; returns the app."""
    app = _app
    assert app is not None
    _stand_alone()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _set_up_logging(app, hostname)
    return app


def finish(exitcode: int) -> None:
    """The last thing a worker process does when it leaves in peace."""
    signals.worker_process_shutdown.send(sender=_hostname, pid=os.getpid(), exitcode=exitcode)
    telemetry.flush()


def _set_up_logging(app: Celery, hostname: str) -> None:
    logfile = os.environ.get("CELERY_LOG_FILE") or None
    if logfile and "%i" in logfile.lower():
        app.log.already_setup = False
    if not (_inherited and app.log.already_setup):
        app.log.setup(
            int(os.environ.get("CELERY_LOG_LEVEL") or 0),
            logfile,
            bool(os.environ.get("CELERY_LOG_REDIRECT")),
            os.environ.get("CELERY_LOG_REDIRECT_LEVEL") or "WARNING",
            hostname=hostname,
        )
    keep_logs_whole()
    for logger in (logging.getLogger(), get_logger("celery")):
        for handler in logger.handlers:
            formatter = handler.formatter
            if isinstance(formatter, ColorFormatter) and "task_id" not in (formatter._fmt or ""):
                handler.setFormatter(_TaskFormatter(formatter))


def keep_logs_whole() -> None:
    """Celery's log handlers, of this process, write each record in one piece from here on."""
    names = ("celery", "celery.task", "celery.redirected")
    logs.make_whole([logging.getLogger(), *(get_logger(name) for name in names)])


class _TaskFormatter(ColorFormatter):  # type: ignore[misc]
    """Celery's format for a worker's lines, with the task's name and id before each message of a running task."""

    def __init__(self, like: ColorFormatter) -> None:
        super().__init__(like._fmt, use_color=like.use_color)
        self.datefmt, self.default_msec_format = like.datefmt, like.default_msec_format

    def formatMessage(self, record: logging.LogRecord) -> str:
        task = get_current_task()
        task_id = task.request.id if task is not None and task.request else None
        if task_id and task_id not in record.message:
            record.message = f"{task.name}[{task_id}]: {record.message}"
        return str(super().formatMessage(record))


# -- one task ----------------------------------------------------------------------------------------------------------


def run(target: Callable[..., Any], *args: Any, alone: bool = False) -> Any:
    """Runs Celery's trace function for one message; ``args`` are the task's name, its id, and what else Celery gave.

    Args:
        alone: the node has nothing else to do.
    """
    task_id = args[1] if len(args) > 1 else None
    if task_id is None:
        return target(*args)
    hooks.follow(task_id)
    progress.follow(*args[:3])
    task_log.follow(task_id)
    task_begins(task_id, queued=waited(args[2]), alone=alone)
    try:
        return target(*args)
    except BaseException as exc:
        task_log.attach(exc)
        if isinstance(exc, SystemExit | KeyboardInterrupt) and pool_worker.this_worker is not None:
            pool_worker.this_worker.ask_to_leave()  # as prefork's process would have gone: tasks count on that
        raise
    finally:
        task_ends()
        task_log.follow()
        progress.follow()
        hooks.follow(None)


def soft_limit_error(limit: float | None) -> BaseException:
    """What the soft limit raises in a Celery task."""
    error: BaseException = SoftTimeLimitExceeded(*([limit] if limit else []))
    return error


def without_arguments(request: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a request without the decoded arguments: the child decodes the message's body itself."""
    return {key: value for key, value in request.items() if key not in ("args", "kwargs")}
