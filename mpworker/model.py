"""The classic three-class API: ``MultiProcess``, ``InfoTask``, ``Model``, over the local pool or over a broker.

Owns how a dotted class name becomes a call. Locally a task is run by :class:`mpworker.ProcessPool`; with ``broker=``
it is a Celery message, and a ``Model`` subclass in a module that a node includes is the Celery task of that name.
Never imports, on behalf of a message, a module that the configuration does not name.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mpworker.errors import ConfigurationError, UnheardError
from mpworker.pool.coroutines import settle

if TYPE_CHECKING:
    from celery import Celery

    from mpworker.pool.executor import ProcessPool

logger = logging.getLogger("mpworker.model")


class Model(ABC):
    """What a task does, and what follows. A new instance is made for each call, without arguments."""

    @abstractmethod
    def runnable(self, *args: Any) -> Any:
        """The task itself; runs in a worker process."""

    def callback(self, result: Any) -> None:
        """Called with the result, in the callback process. What it raises is logged and affects nothing else."""

    def error_callback(self, error: BaseException) -> None:
        """Called there with the exception when the task failed, timed out or lost its process."""
        logger.error("%s failed: %s: %s", dotted_name(type(self)), type(error).__name__, error)


class InfoTask:
    """One call of a model.

    Args:
        task_module: dotted path of the class, such as ``"package.module.Demo"``.
        timeout: seconds after which the task's process is killed; ``None`` for no limit.
        args: for :meth:`Model.runnable`.
    """

    def __init__(self, task_module: str, timeout: float | None, *args: Any) -> None:
        self.from_pid = os.getpid()
        self.task_module = task_module
        self.timeout = timeout
        self.args = args


class MultiProcess:
    """Runs models: in a local pool of processes, or, with a broker, on any node that includes their modules.

    Args:
        pool_num: worker processes of the local pool.
        broker: instead of a local pool, the URL of a Celery broker, such as ``"redis://host:6379/0"``.
        callback_timeout: seconds that one callback may run (local pool; a node has a setting for it).
    """

    def __init__(self, pool_num: int = 10, *, broker: str | None = None, callback_timeout: float = 10.0) -> None:
        if isinstance(pool_num, bool) or not isinstance(pool_num, int) or pool_num < 1:
            raise ConfigurationError(f"pool_num must be a whole number of at least 1, not {pool_num!r}")
        if broker is not None and "://" not in broker:
            raise ConfigurationError(f"broker must be a URL such as redis://host:6379/0, not {broker!r}")
        self.pool_num, self.broker, self.callback_timeout = pool_num, broker, callback_timeout
        self._pool: ProcessPool | None = None
        self._app: Celery | None = None

    def start(self) -> None:
        """Starts the pool, or prepares the connection to the broker.

        Raises:
            RuntimeError: it is started already.
        """
        if self._pool is not None or self._app is not None:
            raise RuntimeError("this MultiProcess is started already; stop() it first")
        if self.broker is not None:
            from mpworker.celery.models import client

            self._app = client(self.broker)
            return
        from mpworker.pool.executor import ProcessPool

        self._pool = ProcessPool(self.pool_num, callback_timeout=self.callback_timeout)

    def push(self, task: InfoTask) -> Any:
        """Hands a task over and returns at once.

        Returns:
            a ``concurrent.futures.Future``, or, with a broker, a Celery ``AsyncResult``.

        Raises:
            RuntimeError: before :meth:`start` or after :meth:`stop`.
            PayloadError: an argument cannot be pickled.
            ConfigurationError: the task names no class, or its timeout is no positive number.
        """
        name, timeout = _checked(task)
        if self._pool is not None:
            call = ModelCall(name)
            return self._pool.schedule(
                call,
                task.args,
                timeout=timeout,
                callback=partial(call.call_hook, "callback"),
                error_callback=partial(call.call_hook, "error_callback"),
            )
        if self._app is not None:
            return self._app.send_task(name, args=task.args, time_limit=timeout)
        raise RuntimeError("push() needs a started MultiProcess: call start() first")

    def stop(self) -> None:
        """Finishes everything that was pushed, callbacks included, ends every process, and returns.

        With a broker it only closes the connection: the nodes finish what has been pushed.
        """
        pool, self._pool = self._pool, None
        app, self._app = self._app, None
        if pool is not None:
            pool.shutdown(wait=True)
        if app is not None:
            app.close()

    def __enter__(self) -> MultiProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def dotted_name(model: type) -> str:
    """The name by which tasks call a class."""
    return f"{model.__module__}.{model.__qualname__}"


def _checked(task: InfoTask) -> tuple[str, float | None]:
    name, timeout = task.task_module, task.timeout
    if not isinstance(name, str) or "." not in name or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigurationError(f"a task names its class as 'module.Class', not {name!r}")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0
    if timeout is not None and not number:
        raise ConfigurationError(f"the timeout of {name} must be a number of seconds above 0, not {timeout!r}")
    return name, timeout


def find_class(name: str) -> type:
    """The class of a dotted name.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such class.
        TypeError: it is no class.
    """
    module_name, _, class_name = name.rpartition(".")
    main = sys.modules.get("__main__")
    # A script's own classes are in __main__; importing the file again would make them twice.
    module = main if main is not None and module_name == _main_name(main) else importlib.import_module(module_name)
    try:
        found = getattr(module, class_name)
    except AttributeError:
        raise AttributeError(f"module {module_name} has no class {class_name}") from None
    if not isinstance(found, type):
        raise TypeError(f"{name} is no class")
    return found


def _main_name(main: ModuleType) -> str | None:
    path = getattr(main, "__file__", None)
    return Path(path).stem if path else None


class ModelCall:
    """What travels to a worker: the name of a model. Calling it makes an instance and runs that.

    Args:
        task_name: dotted path of the class.
    """

    def __init__(self, task_name: str) -> None:
        self.task_name = task_name

    def __call__(self, *args: Any) -> Any:
        model = find_class(self.task_name)
        runnable = getattr(model, "runnable", None)
        if not callable(runnable) or getattr(runnable, "__isabstractmethod__", False):
            raise TypeError(f"{self.task_name} has no method runnable")
        return model().runnable(*args)

    def call_hook(self, which: str, value: Any) -> None:
        """In the callback process: calls ``callback`` or ``error_callback``.

        Raises:
            UnheardError: the task failed and nobody is there to hear it; the pool logs that by name.
        """
        hook = getattr(self._instance(), which, None)
        if hook is not None:
            settle(hook(value))
        elif isinstance(value, BaseException):
            raise UnheardError(f"{type(value).__name__}: {value}")

    def _instance(self) -> Any:
        try:
            model = find_class(self.task_name)
        except (ImportError, AttributeError, TypeError):
            return None
        runnable = getattr(model, "runnable", None)
        if runnable is None or getattr(runnable, "__isabstractmethod__", False):
            # Not to be instantiated as it is; its error_callback shall hear just that.
            model = type(model.__name__, (model,), {"runnable": _stub})
        return model()


def _stub(self: Any, *args: Any) -> None:
    """Stands in for a missing ``runnable``."""
