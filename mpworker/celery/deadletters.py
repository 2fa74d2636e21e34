"""Dead letters: messages that have cost too many workers their lives, kept whole so that they can be sent again.

Owns where they are: in the result backend's Redis, where every node and every command sees them, or else in files
beside the node's journal. Never decodes a message's body, never decides that a message is dead.

A letter is never changed. Who sends it again first takes a claim, which ends by itself: a sender that is killed before
it has sent leaves the letter behind, so that none is lost.
"""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from celery import Celery
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.json import dumps as _dumps
from kombu.utils.json import loads as _loads

from mpworker.celery.app import settings_of
from mpworker.celery.connection import quick_client
from mpworker.errors import RequeueError

#: So many are kept in one place; then the oldest go.
MAX_LETTERS = 1000
#: Seconds that a sender has before another one may try.
CLAIM_SECONDS = 60
_DAY = 86400
#: Celery's own JSON: text, dates, numbers and bytes, but no objects.
dumps: Callable[[Any], str] = _dumps
loads: Callable[[str | bytes], Any] = _loads
_SUFFIX = ".json"
#: Properties of a message that are its own; the others belong to one delivery, or are set by sending.
_OWN_PROPERTIES = ("correlation_id", "reply_to", "message_id", "user_id", "app_id", "type", "timestamp")


class DeadLetter(NamedTuple):
    """One message, as it came, and why it is dead."""

    id: str
    name: str
    #: seconds since the epoch
    timestamp: float
    deaths: int
    reason: str
    node: str
    exchange: str
    routing_key: str
    priority: int | None
    content_type: str | None
    content_encoding: str | None
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, request: Any, *, deaths: int, reason: str, node: str) -> DeadLetter:
        """The message of one of Celery's requests."""
        message, delivery = request.message, request.delivery_info
        body = message.body
        own = {key: message.properties[key] for key in _OWN_PROPERTIES if message.properties.get(key) is not None}
        return cls(
            id=request.id,
            name=request.name,
            timestamp=time.time(),
            deaths=deaths,
            reason=reason,
            node=node,
            exchange=delivery.get("exchange") or "",
            routing_key=delivery.get("routing_key") or "",
            priority=delivery.get("priority"),
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers={key: value for key, value in message.headers.items() if key != "redelivered"},
            properties=own,
            body=body.encode(message.content_encoding or "utf-8") if isinstance(body, str) else bytes(body),
        )

    def to_json(self) -> str:
        return dumps({"v": 1, **self._asdict(), "body": base64.b64encode(self.body).decode()})

    @classmethod
    def from_json(cls, text: str | bytes) -> DeadLetter:
        """Raises:
        ValueError: that is no letter.
        """
        try:
            data = loads(text)
            values = {name: data[name] for name in cls._fields}
            return cls(**{**values, "body": base64.b64decode(data["body"])})
        except (KeyError, TypeError) as exc:
            raise ValueError(f"no dead letter: {exc!r}") from None

    def summary(self) -> dict[str, Any]:
        """What people and programs are shown."""
        when = datetime.fromtimestamp(self.timestamp, UTC).isoformat(timespec="seconds")
        told = {"id": self.id, "name": self.name, "when": when, "deaths": self.deaths, "reason": self.reason}
        return {**told, "node": self.node, "queue": self.routing_key or self.exchange}

    def unexpired(self) -> DeadLetter:
        """Without an expiry that has passed: whoever sends it again by hand wants it to run."""
        expires = self.headers.get("expires")
        try:
            past = expires and maybe_make_aware(maybe_iso8601(expires)) < datetime.now(UTC)
        except (TypeError, ValueError):
            past = True
        return self._replace(headers={**self.headers, "expires": None}) if past else self


class Letters(Protocol):
    """A place for dead letters."""

    def add(self, letter: DeadLetter) -> None: ...

    def all(self) -> Iterator[DeadLetter]: ...

    def claim(self, task_id: str) -> DeadLetter | None:
        """Takes a letter to send it; to be followed by :meth:`sent` or :meth:`release`.

        Returns:
            ``None``: there is no such letter.

        Raises:
            RequeueError: somebody else has it.
        """

    def sent(self, letter: DeadLetter) -> None:
        """Forgets the letter, unless its message has died once more meanwhile; and the claim."""

    def release(self, letter: DeadLetter) -> None: ...


class RedisLetters:
    """Letters, and counts of deaths, that all nodes share.

    Args:
        backend: Celery's Redis result backend, or one derived from it.
        patience: seconds that one exchange may take.
    """

    def __init__(self, backend: Any, patience: float) -> None:
        self._client = quick_client(backend, patience)
        options = backend.app.conf.get("result_backend_transport_options") or {}
        prefix = options.get("global_keyprefix") or ""
        self._prefix = f"{prefix}{'' if not prefix or prefix[-1] in ':_-.' else '_'}mpworker-"
        self._letters, self._index = f"{self._prefix}dead", f"{self._prefix}dead-index"
        self._expires = int(backend.expires or 0)

    def count(self, task_id: str, deaths: int) -> int:
        """Adds to the deaths of a message; returns all of them, on whatever nodes."""
        key = self._deaths(task_id)
        with self._client.pipeline() as pipe:
            pipe.incrby(key, deaths).expire(key, max(self._expires, _DAY))
            return int(pipe.execute()[0])

    def forget_deaths(self, task_id: str) -> None:
        self._client.delete(self._deaths(task_id))

    def _deaths(self, task_id: str) -> str:
        return f"{self._prefix}deaths-{task_id}"

    def _claim(self, task_id: str) -> str:
        return f"{self._prefix}claim-{task_id}"

    def add(self, letter: DeadLetter) -> None:
        with self._client.pipeline() as pipe:
            pipe.hset(self._letters, letter.id, letter.to_json()).zadd(self._index, {letter.id: letter.timestamp})
            for key in (self._letters, self._index) if self._expires else ():
                pipe.expire(key, self._expires)
            pipe.zrange(self._index, 0, -MAX_LETTERS - 1)
            pipe.zrangebyscore(self._index, "-inf", letter.timestamp - self._expires if self._expires else "-inf")
            *_, surplus, stale = pipe.execute()
        if gone := {*surplus, *stale}:
            with self._client.pipeline() as pipe:
                pipe.hdel(self._letters, *gone).zrem(self._index, *gone).execute()

    def all(self) -> Iterator[DeadLetter]:
        since = time.time() - self._expires if self._expires else float("-inf")
        for _, text in self._client.hscan_iter(self._letters, count=20):
            with suppress(ValueError):
                letter = DeadLetter.from_json(text)
                if letter.timestamp > since:
                    yield letter

    def claim(self, task_id: str) -> DeadLetter | None:
        if not self._client.set(self._claim(task_id), 1, nx=True, ex=CLAIM_SECONDS):
            raise RequeueError(f"{task_id} is being sent by somebody else")
        text = self._client.hget(self._letters, task_id)
        with suppress(ValueError):
            if text is not None:
                return DeadLetter.from_json(text)
        self._client.delete(self._claim(task_id))
        return None

    def sent(self, letter: DeadLetter) -> None:
        def forget(pipe: Any) -> None:
            text = pipe.hget(self._letters, letter.id)
            pipe.multi()
            if text is not None and DeadLetter.from_json(text).timestamp == letter.timestamp:
                pipe.hdel(self._letters, letter.id).zrem(self._index, letter.id)
            pipe.delete(self._claim(letter.id))

        self._client.transaction(forget, self._letters)

    def release(self, letter: DeadLetter) -> None:
        self._client.delete(self._claim(letter.id))


class FileLetters:
    """Letters of one node: a file each, readable by its user only.

    Args:
        folder: made with the first letter.
        expires: seconds; 0: for ever.
    """

    def __init__(self, folder: Path, expires: float) -> None:
        self._folder, self._expires = folder, expires

    def _path(self, task_id: str, suffix: str = _SUFFIX) -> Path:
        # Whoever sends a message chooses its id: that must not become a path.
        return self._folder / f"{hashlib.sha256(task_id.encode()).hexdigest()[:40]}{suffix}"

    def add(self, letter: DeadLetter) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(letter.id)
        part = path.with_suffix(f".{os.getpid()}")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                file.write(letter.to_json())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        found = sorted(self._folder.glob(f"*{_SUFFIX}"), key=_age)
        fresh = [each for each in found if not self._expires or _age(each) < self._expires]
        for each in {*found} - {*fresh[:MAX_LETTERS]}:
            each.unlink(missing_ok=True)

    def all(self) -> Iterator[DeadLetter]:
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if (letter := self._read(path)) is not None:
                yield letter

    def _read(self, path: Path) -> DeadLetter | None:
        with suppress(FileNotFoundError, ValueError):
            letter = DeadLetter.from_json(path.read_text(encoding="utf-8"))
            return letter if not self._expires or letter.timestamp > time.time() - self._expires else None
        return None

    def claim(self, task_id: str) -> DeadLetter | None:
        path, claim = self._path(task_id), self._path(task_id, ".claim")
        if not path.exists():
            return None
        with suppress(FileNotFoundError):
            if _age(claim) > CLAIM_SECONDS:  # its owner was killed; one of those who see that removes it
                mine = claim.with_suffix(f".{os.getpid()}")
                claim.rename(mine)
                mine.unlink()
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            raise RequeueError(f"{task_id} is being sent by somebody else") from None
        letter = self._read(path)
        if letter is None:
            claim.unlink(missing_ok=True)
        return letter

    def sent(self, letter: DeadLetter) -> None:
        path = self._path(letter.id)
        if (found := self._read(path)) is not None and found.timestamp == letter.timestamp:
            path.unlink(missing_ok=True)
        self.release(letter)

    def release(self, letter: DeadLetter) -> None:
        self._path(letter.id, ".claim").unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf") if path.suffix == _SUFFIX else 0.0


def shared_letters(app: Celery, patience: float) -> RedisLetters | None:
    """The place in the app's result backend; ``None`` where that is no Redis. Connects to nothing.

    Args:
        patience: seconds that one exchange may take.
    """
    backend, module = app.backend, sys.modules.get("celery.backends.redis")
    if module is None or not isinstance(backend, module.RedisBackend):
        return None
    return RedisLetters(backend, patience)


def local_letters(app: Celery) -> FileLetters:
    """The place beside this node's journal.

    Raises:
        ConfigurationError: an ``mpworker_`` setting is wrong.
    """
    expires = app.conf.result_expires
    seconds = getattr(expires, "total_seconds", lambda: float(expires or 0))()
    return FileLetters(settings_of(app).journal_dir / "dead", seconds)
