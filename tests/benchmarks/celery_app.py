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


def trace(count):
    """Seconds that Celery's own tracing takes for so many naps of 10 ms in this process."""
    from celery.app.trace import build_tracer

    app.conf.result_backend = "disabled://"
    run = build_tracer(nap.name, nap, app=app)
    request = {"hostname": "here", "ignore_result": True, "is_eager": False, "delivery_info": {}}
    run("0", (0.01,), {}, request)
    begun = time.monotonic()
    for number in range(count):
        run(str(number), (0.01,), {}, request)
    return time.monotonic() - begun
