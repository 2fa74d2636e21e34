"""A thread of the main process: ``auto`` then has the workers come from a template."""

from threading import Event, Thread

from celery.signals import worker_init


@worker_init.connect(weak=False)
def start(**kwargs):
    Thread(target=Event().wait, daemon=True).start()
