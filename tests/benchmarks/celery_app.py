"""The app of ``celery_worker.py``: the same for both pools, but for one line."""

import os
import time

from celery import Celery

app = Celery("celery_app", broker=os.environ["BENCH_URL"] + "/0", backend=os.environ["BENCH_URL"] + "/1")
if os.environ.get("BENCH_POOL") == "mpworker":
    import mpworker

    mpworker.install(app)
app.conf.worker_prefetch_multiplier = int(os.environ.get("BENCH_PREFETCH", "4"))


@app.task
def noop():
    pass


@app.task(acks_late=True)
def late():
    pass


@app.task
def nap(seconds):
    time.sleep(seconds)
