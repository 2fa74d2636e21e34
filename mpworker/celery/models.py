"""``Model`` subclasses as Celery tasks: one task per class, named by its dotted path.

Owns the registration and the app that ``MultiProcess(broker=…)`` sends with. Looks only at modules that the
configuration includes and that are imported already; imports none.
"""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import TypeGuard

from celery import Celery

from mpworker.celery.app import journal_url, kombu_url
from mpworker.model import Model, ModelCall, dotted_name


def register_models(app: Celery) -> None:
    """Makes a task of each concrete ``Model`` subclass that an included module defines. Idempotent."""
    modules = {*(app.conf.include or ()), *(app.conf.imports or ()), *app.loader.task_modules}
    for name in sorted(modules):
        for model in vars(sys.modules.get(name, object)).values():
            if _is_own_model(model, name) and dotted_name(model) not in app.tasks:
                _register(app, model)


def _is_own_model(value: object, module: str) -> TypeGuard[type[Model]]:
    own = isinstance(value, type) and issubclass(value, Model) and value.__module__ == module
    return own and not inspect.isabstract(value)


def _register(app: Celery, model: type[Model]) -> None:
    call = ModelCall(dotted_name(model))

    def runnable(*args: object) -> object:
        return model().runnable(*args)

    app.task(
        name=call.task_name,
        shared=False,
        lazy=False,
        callback=partial(call.call_hook, "callback"),
        error_callback=partial(call.call_hook, "error_callback"),
    )(runnable)


def client(broker: str) -> Celery:
    """An app that sends tasks to ``broker`` and, if that is Redis, reads their results there. Connects to nothing."""
    url = kombu_url(broker)
    readable = str(journal_url(url)).startswith("mpworker+")
    return Celery("mpworker.model", broker=url, backend=url if readable else None, set_as_current=False)
