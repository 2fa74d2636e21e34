"""One frozen object that holds every ``mpworker_`` setting, read from Celery's configuration and the environment.

Owns names, types, defaults and the wording of complaints. Never reads the environment at import, never creates a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from mpworker.errors import ConfigurationError

PREFIX = "mpworker_"
ENV_PREFIX = "MPWORKER_"
START_METHODS = ("auto", "fork", "forkserver", "spawn")
FSYNC = ("off", "batch", "always")
_MOST_KIB = 1 << 16
#: Environment names that are ours without being settings of a node.
_OTHER_ENV = {"MPWORKER_BROKER_URL", "MPWORKER_RESULT_BACKEND", "MPWORKER_SLOT"}


def default_data_dir() -> Path:
    """``$XDG_STATE_HOME/mpworker``, or ``~/.local/state/mpworker``: private to the user, the same from every folder."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "mpworker"


def _names(value: Any) -> tuple[str, ...]:
    parts: Iterable[Any] = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, list | tuple | set | frozenset):
        raise ValueError("must be dotted module names, separated by commas")
    names = tuple(str(part).strip() for part in parts)
    for name in names:
        if not all(piece.isidentifier() for piece in name.split(".")):
            raise ValueError("must be dotted module names, separated by commas")
    return names


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be a path")
    return Path(value).expanduser().absolute()


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < 1e9:
        raise ValueError("must be a number of seconds above 0")
    return seconds


def _seconds_or_off(value: Any) -> float:
    try:
        return 0.0 if not isinstance(value, bool) and float(value) == 0 else _seconds(value)
    except (TypeError, ValueError):
        raise ValueError("must be a number of seconds, or 0 for never") from None


def _count_or_off(value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError("must be a whole number, or 0 for never")
    return int(text)


def _kib(value: Any) -> int:
    try:
        size = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else -1
    except ValueError:
        size = -1
    if not 0 <= size <= _MOST_KIB:
        raise ValueError(f"must be a whole number of KiB from 0 to {_MOST_KIB}")
    return size


@dataclass(frozen=True, slots=True)
class SlotFormats:
    """Environment variables by slot: what ``{slot}`` in a format becomes. Travels to worker processes."""

    formats: dict[str, str]

    def __call__(self, slot: int) -> dict[str, str]:
        return {name: text.format(slot=slot) for name, text in self.formats.items()}


def is_variable(name: object, value: object) -> bool:
    """Whether these can be an environment variable; a number will do as its value."""
    if not isinstance(name, str) or not isinstance(value, str | int):
        return False
    try:
        text = os.fsencode(f"{name}{value}")
    except UnicodeEncodeError:
        return False
    return name != "" and "=" not in name and b"\0" not in text


def _variables(value: Any) -> Callable[[int], Mapping[str, str | int]] | None:
    if callable(value):
        return cast("Callable[[int], Mapping[str, str | int]]", value)
    try:
        given = json.loads(value) if isinstance(value, str) else value
        if isinstance(given, Mapping) and all(is_variable(*item) for item in given.items()):
            found = SlotFormats({name: str(text) for name, text in given.items()})
            found(0)
            return found if given else None
    except (ValueError, LookupError, AttributeError):  # no JSON, or no such field
        pass
    raise ValueError('must be variables and their formats, such as {"CUDA_VISIBLE_DEVICES": "{slot}"}')


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return str(value)

    return read


def _setting(read: Callable[[Any], Any], default: Any = None, factory: Callable[[], Any] | None = None) -> Any:
    metadata = {"read": read}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of a node. Field ``x`` is the Celery key ``mpworker_x`` and the variable ``MPWORKER_X``."""

    #: modules whose tasks and Models the worker runs
    include: tuple[str, ...] = _setting(_names, ())
    #: home of the embedded server and, by default, of the journal
    data_dir: Path = _setting(_path, factory=default_data_dir)
    #: folder of the JSONL files; ``None``: ``journal`` inside :attr:`data_dir`
    journal: Path | None = _setting(_path)
    #: ``off``: the kernel writes when it likes (survives any killed process); ``batch``: on disk after at most 100 ms;
    #: ``always``: fsync for each record
    journal_fsync: str = _setting(_one_of(FSYNC), "batch")
    #: days for which journal files are kept, once Redis has all that is in them; 0: for ever
    journal_days: int = _setting(_count_or_off, 30)
    #: MiB that the journal may take, from where on its oldest files go under the same condition; 0: any number
    journal_mib: int = _setting(_count_or_off, 0)
    #: how many ended tasks all nodes together remember in Redis, for ``--cluster``; 0: none
    history: int = _setting(_count_or_off, 10_000)
    #: how worker processes start
    start_method: str = _setting(_one_of(START_METHODS), "auto")
    #: seconds that one ``callback`` or ``error_callback`` may run
    callback_time_limit: float = _setting(_seconds, 60.0)
    #: seconds that a child may take to import the application and to initialize
    ready_timeout: float = _setting(_seconds, 120.0)
    #: a message that has cost so many worker processes is failed instead of run again; 0: never
    max_deaths: int = _setting(_count_or_off, 3)
    #: seconds that messages may wait beside free slots before the consumer is restarted; 0: for ever
    stall_timeout: float = _setting(_seconds_or_off, 60.0)

    #: environment variables of each worker process, by slot
    worker_env: Callable[[int], Mapping[str, str | int]] | None = _setting(_variables)

    #: KiB of what a task prints and logs that are kept with its result record; 0: nothing is
    task_log: int = _setting(_kib, 0)

    @property
    def journal_dir(self) -> Path:
        return self.journal or self.data_dir / "journal"

    @classmethod
    def load(cls, conf: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Reads settings; the environment wins over ``conf``, an empty variable counts as unset.

        Args:
            conf: a mapping such as Celery's ``app.conf``; keys without the prefix are not looked at.
            environ: default ``os.environ``.

        Raises:
            ConfigurationError: for an unknown ``mpworker_`` key or a value that does not fit.
        """
        conf = {} if conf is None else conf
        environ = os.environ if environ is None else environ
        known = {f.name: f.metadata["read"] for f in fields(cls)}
        for key in conf:
            if key.lower().startswith(PREFIX) and key.lower()[len(PREFIX) :] not in known:
                raise ConfigurationError(f"unknown setting {key}{_suggest(key.lower(), (PREFIX + n for n in known))}")
        values: dict[str, Any] = {}
        for name, read in known.items():
            variable, key = ENV_PREFIX + name.upper(), PREFIX + name
            origin, raw = (variable, environ[variable]) if environ.get(variable) else (key, conf.get(key))
            if raw is None or raw == "":
                continue
            try:
                values[name] = read(raw)
            except ValueError as exc:
                raise ConfigurationError(f"{origin} {exc}, not {raw!r}") from None
        settings = cls(**values)
        if settings.worker_env is not None and settings.start_method == "fork":
            why = "a fork of the main process has imported the application before it has a slot"
            raise ConfigurationError(f"mpworker_worker_env and mpworker_start_method = fork exclude each other: {why}")
        return settings


def unknown_variables(environ: Mapping[str, str] | None = None) -> list[str]:
    """One line for each ``MPWORKER_…`` variable that no setting reads: likely a typo, never worth refusing to start."""
    environ = os.environ if environ is None else environ
    known = {ENV_PREFIX + f.name.upper() for f in fields(Settings)} | _OTHER_ENV
    return [
        f"nothing reads the environment variable {name}{_suggest(name, known)}"
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX) and name not in known
    ]


def _suggest(name: str, known: Iterable[str]) -> str:
    import difflib  # only for whoever has made a mistake

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
