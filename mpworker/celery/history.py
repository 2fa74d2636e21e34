"""What has ended on all nodes, as Redis remembers it: for who asks about more than one node's journal.

Owns reading that stream. The script that stores a result notes it there; nothing is written here but a private file.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celery import Celery
from redis import exceptions as redis_errors

from mpworker.celery.connection import quick_client
from mpworker.celery.shipping import backend_of
from mpworker.errors import StoreError
from mpworker.results.record import describe

#: Entries that are fetched at once, seconds that one exchange may take, milliseconds to wait for the next entry.
_PAGE, _PATIENCE, _BLOCK = 1000, 10.0, 1000


@contextlib.contextmanager
def history_of(app: Celery, *, follow: bool = False) -> Iterator[Path]:
    """A file of journal lines, gone afterwards: what the nodes of an application have ended last.

    Args:
        follow: the file grows with what ends from now on.

    Raises:
        ConfigurationError: the result backend is none of ours.
        StoreError: its Redis does not answer.
    """
    backend = backend_of(app)
    client, stream = quick_client(backend, _PATIENCE), backend.history_key
    with tempfile.TemporaryDirectory(prefix="mpworker-") as folder:
        path = Path(folder) / "cluster.jsonl"
        over = threading.Event()
        try:
            last = _copy(client, stream, path)
        except redis_errors.RedisError as exc:
            raise StoreError(f"the history cannot be read: {describe(exc)}") from exc
        if follow:
            args = client, stream, path, last, over
            threading.Thread(target=_follow, args=args, name="mpworker-history", daemon=True).start()
        try:
            yield path
        finally:
            over.set()


def _copy(client: Any, stream: bytes, path: Path) -> bytes:
    last = b"0-0"
    with path.open("wb") as file:
        while page := client.xrange(stream, min=b"(" + last, count=_PAGE):
            last = _write(file, page)
    return last


def _follow(client: Any, stream: bytes, path: Path, last: bytes, over: threading.Event) -> None:
    with path.open("ab", buffering=0) as file:
        while not over.is_set():
            try:
                for _, page in client.xread({stream: last}, count=_PAGE, block=_BLOCK):
                    last = _write(file, page)
            except redis_errors.RedisError:
                over.wait(_BLOCK / 1000)  # it may come back


def _write(file: Any, page: list[tuple[bytes, dict[bytes, bytes]]]) -> bytes:
    file.write(b"".join(fields.get(b"r", b"") for _, fields in page))
    return page[-1][0]
