"""What a child needs to become useful: where the parent imports from, its ``__main__``, preload and initializer.

Owns the recipe and how it is followed. Never starts a process. Works as :mod:`multiprocessing` does for "spawn", so the
same rule holds: a script guards its entry with ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import process, spawn
from typing import TYPE_CHECKING, Any, NamedTuple

from mpworker.errors import PayloadError, SoftTimeLimitExceeded
from mpworker.pool.heirlooms import Heirlooms
from mpworker.pool.parcel import pack, unpack

if TYPE_CHECKING:
    from mpworker.pool.slots import SlotVariables


class Boot(NamedTuple):
    """Pickled by the parent, opaque to the dispatcher."""

    #: for ``multiprocessing.spawn.prepare``
    preparation: dict[str, Any]
    #: pickled ``(callable, args)`` or empty; run once per template (or once per fresh interpreter)
    preload: bytes
    #: likewise, run in each worker process
    initializer: bytes
    #: likewise, when a worker leaves in peace
    finalizer: bytes
    #: pickled callable: seconds → the exception that the soft limit raises
    soft_error: bytes
    #: appended to process titles
    label: str
    #: environment variables of each slot's worker
    slot_env: SlotVariables
    #: pickled ``(name, callable, args)`` or empty; run in a process of its own; see :mod:`mpworker.pool.service`
    service: bytes = b""


Call = tuple[Callable[..., Any], tuple[Any, ...]]
Service = tuple[str, Callable[..., Any], tuple[Any, ...]]


def describe(
    *,
    preload: Call | None = None,
    initializer: Call | None = None,
    finalizer: Call | None = None,
    soft_error: Callable[[float], BaseException] = SoftTimeLimitExceeded,
    label: str = "",
    import_main: bool = True,
    slot_env: SlotVariables | None = None,
    service: Service | None = None,
    heirlooms: Heirlooms | None = None,
    fork: bool = False,
) -> bytes:
    """Packs what children of this process shall do before their first task.

    Args:
        preload: imports the application; its memory is shared by the workers where they are forked.
        initializer: run in each worker; may open connections.
        finalizer: run in each worker that leaves in peace.
        soft_error: makes the exception that the soft limit raises.
        label: shown in ``ps`` behind the role.
        import_main: whether children import the parent's ``__main__`` (as ``__mp_main__``), so that functions
            defined in a script can be found.
        slot_env: environment variables by slot, set in a worker before anything of the user's runs in it.
        service: what is kept running beside the workers, with a name for its process; called with a descriptor more,
            and to return when that is readable.
        heirlooms: collects what the arguments of initializer and service need besides bytes.
        fork: the children will be forks of this process.

    Raises:
        PayloadError: one of them cannot be pickled.
        RuntimeError: this process is itself a child that is importing its parent's ``__main__``.
    """
    if getattr(process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a pool was started while a worker was importing the main script; put the script's entry under "
            "'if __name__ == \"__main__\":' so that workers can import it without running it"
        )
    heirlooms = heirlooms or Heirlooms()
    boot = Boot(
        _preparation(import_main),
        pack(preload, "the preload") if preload else b"",
        heirlooms.pack(initializer, "the initializer", fork=fork) if initializer else b"",
        pack(finalizer, "the finalizer") if finalizer else b"",
        pack(soft_error, "the soft limit's exception"),
        label,
        slot_env or {},
        heirlooms.pack(service, "the service", fork=fork) if service else b"",
    )
    return pack(tuple(boot), "what children need")


def _preparation(import_main: bool) -> dict[str, Any]:
    path = [os.getcwd() if entry == "" else entry for entry in sys.path]
    data: dict[str, Any] = {"sys_path": path, "sys_argv": list(sys.argv), "dir": os.getcwd(), "orig_dir": os.getcwd()}
    data["authkey"] = bytes(process.current_process().authkey)
    # get_start_method() without allow_none would fix the parent's choice for good.
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        data["start_method"] = method
    if import_main:
        main = sys.modules["__main__"]
        name = getattr(getattr(main, "__spec__", None), "name", None)
        # Once the script has run to its end, and only a thread or an exit hook of it goes on, its loader alone knows.
        path_of_main = getattr(main, "__file__", None) or getattr(getattr(main, "__loader__", None), "path", None)
        if name is not None:
            data["init_main_from_name"] = name
        elif path_of_main is not None and os.path.exists(path_of_main):  # not that of a script read from stdin
            data["init_main_from_path"] = os.path.abspath(path_of_main)
    return data


def load(packed: bytes) -> Boot:
    """Reads what :func:`describe` packed."""
    return Boot(*unpack(packed, "what the parent sent for its children"))


def prepare(boot: Boot) -> None:
    """Makes this process import like the parent, and runs the preload. Raises whatever the application raises."""
    current = process.current_process()
    current._inheriting = True  # type: ignore[attr-defined]
    try:
        spawn.prepare(boot.preparation)
        if boot.preload:
            function, args = unpack(boot.preload, "the preload")
            function(*args)
    finally:
        del current._inheriting  # type: ignore[attr-defined]


def explain(exc: BaseException, doing: str) -> str:
    """One line that says what failed, and the traceback below it."""
    cause = exc.__cause__ if isinstance(exc, PayloadError) and exc.__cause__ else exc
    text = "".join(traceback.format_exception(cause)).rstrip()
    return f"{doing} failed: {type(cause).__name__}: {cause}\n{text}"
