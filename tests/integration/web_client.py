"""One web process: imports an app of ``config/web``, enqueues over its test client and polls until the task is done.

    python web_client.py fastapi '[[1, 2, 3], []]'

Prints what every request answered, as one JSON list. A process of its own, because each web process has one
configuration, and so that nothing of it leaks into the tests.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

DEADLINE = 30.0
#: (method, path, JSON body) -> (HTTP status, JSON answer)
Request = Callable[[str, str, Any], tuple[int, Any]]


def fastapi_client() -> Request:
    from fastapi.testclient import TestClient
    from fastapi_app import web

    client = TestClient(web)

    def request(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = client.request(method, path, json=body)
        return answer.status_code, answer.json()

    return request


def flask_client() -> Request:
    from flask_app import web

    client = web.test_client()

    def request(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = client.open(path, method=method, json=body)
        return answer.status_code, answer.get_json()

    return request


def django_client() -> Request:
    import django
    from django.conf import settings

    settings.configure(ROOT_URLCONF="django_app", ALLOWED_HOSTS=["testserver"], SECRET_KEY="only for this test")
    django.setup()
    from django.test import Client

    client = Client()

    def request(method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = client.generic(method, path, json.dumps(body), content_type="application/json")
        return answer.status_code, json.loads(answer.content)

    return request


def follow(request: Request, numbers: list[float]) -> dict[str, Any]:
    """Enqueues one task and returns its answers: the first, the last, and every state in between."""
    code, enqueued = request("POST", "/average", numbers)
    states: list[str] = []
    deadline = time.monotonic() + DEADLINE
    while True:
        polled, answer = request("GET", f"/result/{enqueued['task_id']}", None)
        states.append(answer["state"])
        if answer["state"] in ("SUCCESS", "FAILURE") or time.monotonic() > deadline:
            return {"enqueue": code, "poll": polled, "states": states, "answer": answer}
        time.sleep(0.05)  # the pace of the poll, as a browser has one; nothing relies on it


def main() -> None:
    framework, batches = sys.argv[1:]
    request = {"fastapi": fastapi_client, "flask": flask_client, "django": django_client}[framework]()
    print(json.dumps([follow(request, numbers) for numbers in json.loads(batches)]))


if __name__ == "__main__":
    main()
