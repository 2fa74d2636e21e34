"""``@app.task async def f(...)``: its coroutine is run on the one event loop of its worker process.

Owns where in a task that happens: inside Celery's retrying and validating, so that those see what the coroutine
returns or raises. The loop itself is the pool's. A task that is called as a function gives its coroutine to its caller.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, CoroutineType
from typing import Any

from celery import Task

from mpworker.pool import coroutines


def run_on_the_loop(task: Task) -> None:
    """Prepares a task, if it is asynchronous, for being traced in this worker process. Others stay untouched."""
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"  # the former where Celery retries by itself
    function = getattr(task, name)
    if not inspect.iscoroutinefunction(inspect.unwrap(function)):
        return
    validated = _validated(function)
    if validated is None:
        setattr(task, name, _settled(task, function))
    else:
        validated.cell_contents = _settled(task, validated.cell_contents)


def _validated(function: Callable[..., Any]) -> CellType | None:
    """With ``pydantic=True``: where Celery's wrapper, which also converts the result, keeps the task's own function."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    known = dict(zip(code.co_freevars, cells, strict=True)) if code is not None and cells else {}
    return known.get("task_fun") if "dump_kwargs" in known else None


def _settled(task: Task, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        request = task.request
        if type(value) is not CoroutineType or request.called_directly:
            return value
        if not coroutines.running():
            return coroutines.settle(value)
        if not request.is_eager:
            return value  # it has called itself
        value.close()
        raise RuntimeError(f"{task.name} is async: inside of a coroutine, await {task.name}(…) instead of apply()")

    return run
