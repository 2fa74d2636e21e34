"""The result backend ``mpworker+sentinel://host:26379;sentinel://other:26379``: behind Sentinel, with the same journal.

Owns how long it waits for a Sentinel that does not answer. Whom to ask for the master is Celery's, all else is
:mod:`mpworker.celery.backend`'s.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery.backends.redis import SentinelBackend
from redis.backoff import NoBackoff
from redis.retry import Retry

from mpworker.celery.backend import ResultBackend
from mpworker.errors import ConfigurationError
from mpworker.results.record import store_name

#: Seconds that one Sentinel gets: the next one may know it, too.
_PATIENCE = 1.0


class SentinelResultBackend(ResultBackend, SentinelBackend):  # type: ignore[misc]
    """What :class:`~mpworker.celery.backend.ResultBackend` is for such a URL.

    Raises:
        ConfigurationError: nobody says which master is meant; else as there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self._transport_options.get("master_name"):
            raise ConfigurationError(
                "a result backend behind Sentinel needs to know its master: set "
                'result_backend_transport_options = {"master_name": "..."}'
            )

    @cached_property
    def store_name(self) -> str:
        """As there; the same Sentinels may watch other masters as well."""
        master = self._transport_options["master_name"]
        return store_name(f"{self.as_uri()} {self.get_key_for_task('-')!r} {master}")

    @cached_property
    def _transport_options(self) -> dict[str, Any]:
        """As configured; where nothing is, a Sentinel would have for ever."""
        options = dict(self.app.conf.get("result_backend_transport_options") or {})
        asking = {
            "socket_timeout": _PATIENCE,
            "socket_connect_timeout": _PATIENCE,
            "retry": Retry(NoBackoff(), 0),
        }
        return options | {"sentinel_kwargs": asking | options.get("sentinel_kwargs", {})}
