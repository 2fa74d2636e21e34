"""The project's app, and the one line that adopts mpworker."""

from celery import Celery

import mpworker

app = Celery("clinic")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
mpworker.install(app)
