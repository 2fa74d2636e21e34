"""Tasks that kill every worker that runs them, until an antidote lies beside the notes."""

import os
import signal
import sys
from pathlib import Path

from shop.celery import app
from shop.hooks import told, told_error
from shop.notes import note

HERE = Path(os.environ["SHOP_NOTES"]).parent


def die_without_antidote(name):
    note("poison", name=name)
    if not (HERE / f"antidote-{name}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name} healed"


@app.task(acks_late=True, reject_on_worker_lost=True, callback=told, error_callback=told_error)
def poison(name):
    return die_without_antidote(name)


@app.task(acks_late=True, retry_on_worker_lost=True, default_retry_delay=0, max_retries=None)
def poison_retried(name):
    return die_without_antidote(name)


@app.task(acks_late=True, reject_on_worker_lost=True, retry_on_worker_lost=True, default_retry_delay=0, max_retries=2)
def poison_retried_twice(name):
    return die_without_antidote(name)


@app.task(acks_late=True, reject_on_worker_lost=True)
def leaves(name):
    note("poison", name=name)
    sys.exit(3)


@app.task
def errback(request, exc, traceback):
    note("errback", of=request.id, type=type(exc).__name__)
