"""The room that speaks Celery: the only one that imports celery and kombu. Importing it starts nothing.

Refuses a Celery that it does not know how to speak with, before anything here could break on it.
"""

import re as _re
import sys as _sys
from pathlib import Path as _Path

import celery as _celery

_OLDEST = 5, 5


def _refuse_an_older_celery() -> None:
    found = tuple(int(number) for number in _re.findall(r"\d+", _celery.__version__)[:2])
    if found >= _OLDEST:
        return
    reason = f"this is Celery {_celery.__version__}; {'.'.join(map(str, _OLDEST))} or newer is needed"
    spec = getattr(_sys.modules["__main__"], "__spec__", None)  # of ``python -m celery``
    program = _Path(_sys.argv[0]).stem, spec.name.partition(".")[0] if spec is not None else ""
    if {"celery", "mpworker"} & {*program}:
        raise SystemExit(f"mpworker: {reason}")  # one line, where an ImportError would bring a page of traceback
    raise ImportError(reason)


_refuse_an_older_celery()
