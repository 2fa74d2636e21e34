"""What an initializer's arguments may hold besides plain values: queues, locks and the like of :mod:`multiprocessing`.

Owns how they get to the workers: their descriptors are inherited, under the same numbers, by the dispatcher and all its
children; in forks of the parent whatever cannot be pickled is simply there. Never used for tasks: these come later.
"""

from __future__ import annotations

import itertools
import os
import pickle
from multiprocessing import context, popen_spawn_posix, reduction
from typing import Any

from mpworker.errors import PayloadError

#: By number: what forks of this process find here.
_left: dict[int, Any] = {}
_numbers = itertools.count(1)


class Heirlooms:
    """Descriptors that children shall inherit, as :mod:`multiprocessing` asks for them while it pickles."""

    DupFd = popen_spawn_posix._DupFd

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._left: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        self.fds.append(copy := os.dup(fd))
        return copy

    def pack(self, obj: Any, what: str, *, fork: bool) -> bytes:
        """Pickles ``obj`` for the children of this process.

        Args:
            what: the words that name it in the error.
            fork: the children will be forks of this process.

        Raises:
            PayloadError: it cannot be pickled, nor inherited.
        """
        before = context.get_spawning_popen()
        if not fork:
            context.set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            return bytes(reduction.ForkingPickler.dumps(obj, pickle.HIGHEST_PROTOCOL))
        except Exception as exc:
            error = exc
        finally:
            context.set_spawning_popen(before)
        if not fork:
            raise PayloadError(f"{what} cannot be pickled: {type(error).__name__}: {error}") from error
        _left[number := next(_numbers)] = obj
        self._left.append(number)
        return pickle.dumps(_Left(number))

    def close(self) -> None:
        """No child will be started any more."""
        for fd in self.fds:
            os.close(fd)
        for number in self._left:
            del _left[number]
        self.fds, self._left = [], []


class _Left:
    """Becomes, in a fork, what it stands for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _take, (self.number,)


def _take(number: int) -> Any:
    try:
        return _left[number]
    except KeyError:
        raise PayloadError(
            "the initializer cannot be pickled, and this process is no fork of the one with it"
        ) from None
