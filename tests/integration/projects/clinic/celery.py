"""The project's app, and the one line that adopts mpworker."""

import os

from celery import Celery

import mpworker

if os.environ.get("BESIDE"):
    import beside  # noqa: F401

app = Celery("clinic")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
mpworker.install(app)
