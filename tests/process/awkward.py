"""Exceptions that find it hard to travel, one function each that raises one. Children import this."""

from __future__ import annotations

import functools
import os
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import support


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class Reducing(Exception):
    """Does in its ``__reduce__`` what it was told."""

    def __init__(self, reduce: Callable[[], Any]) -> None:
        super().__init__("as told")
        self.reduce = reduce

    def __reduce__(self) -> Any:
        return self.reduce()


class Speechless(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class Homesick(Exception):
    """Comes back only in the process it was raised in."""

    def __reduce__(self) -> Any:
        return _come_back, (os.getpid(),)


def _come_back(home: int) -> Homesick:
    if os.getpid() != home:
        raise OSError("not at home")
    return Homesick("well travelled")


def two_arguments() -> NoReturn:
    raise support.TwoArguments(1, 2)


def keyword_only() -> NoReturn:
    raise KeywordOnly(code=7)


def frozen() -> NoReturn:
    raise support.Frozen(3)


def refusing() -> NoReturn:
    raise support.Refusing("no")


def speechless() -> NoReturn:
    raise Speechless


def reduce_raises() -> NoReturn:
    raise Reducing(lambda: 1 / 0)


def reduce_exits() -> NoReturn:
    raise Reducing(sys.exit)


def reduce_becomes_another() -> NoReturn:
    raise Reducing(lambda: (ValueError, ("another",)))


def attribute() -> NoReturn:
    error = RuntimeError("carries a lock")
    error.cargo = threading.Lock()  # type: ignore[attr-defined]
    raise error


def argument() -> NoReturn:
    raise ValueError("carries a lock", threading.Lock())


def homesick() -> NoReturn:
    raise Homesick("well travelled")


def only_in_the_child() -> NoReturn:
    module = types.ModuleType("only_in_the_child")
    exec("class Hidden(Exception): pass", module.__dict__)
    sys.modules[module.__name__] = module
    raise module.Hidden("you cannot import me")


def local() -> NoReturn:
    class Local(Exception):
        pass

    raise Local("you cannot even name me")


def _caught(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as exc:
        return exc
    raise AssertionError("it raised nothing")


def group() -> NoReturn:
    members = [_caught(functools.partial(int, "x")), ExceptionGroup("inner", [KeyError("k")])]
    raise ExceptionGroup("outer", members)


def base_group() -> NoReturn:
    raise BaseExceptionGroup("outer", [KeyboardInterrupt(), ValueError("v")])


def group_with_an_awkward_member() -> NoReturn:
    raise ExceptionGroup("outer", [ValueError("v"), _caught(two_arguments), _caught(attribute)])


def chain() -> NoReturn:
    try:
        attribute()
    except RuntimeError as exc:
        error = ValueError("the last straw")
        error.add_note("a note")
        raise error from exc


def describe(log: Path, error: BaseException) -> None:
    """An error callback: what has arrived."""
    support.append(log, f"{type(error).__name__} {type(error.__cause__).__name__} {getattr(error, 'type_name', '')}")
