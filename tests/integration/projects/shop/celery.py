"""The project's app. The line that adopts mpworker is the last one; without ``SHOP_INSTALL`` nothing here knows it."""

import json
import os

from celery import Celery

if os.environ.get("BESIDE"):
    import beside  # noqa: F401

app = Celery(
    "shop",
    broker=os.environ["SHOP_BROKER"],
    backend=os.environ.get("SHOP_RESULTS") or None,
    include=["shop.tasks", "shop.hooks", "shop.signals"],
)
app.conf.update(json.loads(os.environ.get("SHOP_CONFIG") or "{}"))

if os.environ.get("SHOP_INSTALL"):
    import mpworker

    mpworker.install(app)
