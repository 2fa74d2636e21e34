"""The result backend ``mpworker+sentinel://host:26379;sentinel://other:26379``: behind Sentinel, with the same journal.

Owns nothing of its own: whom to ask for the master is Celery's, all else is :mod:`mpworker.celery.backend`'s.
"""

from __future__ import annotations

from typing import Any

from celery.backends.redis import SentinelBackend

from mpworker.celery.backend import ResultBackend
from mpworker.errors import ConfigurationError


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
