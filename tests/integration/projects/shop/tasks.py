"""Tasks of every kind that a project may have."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from celery import Task, shared_task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger
from celery.worker.request import Request

from shop.celery import app
from shop.notes import note

logger = get_task_logger(__name__)


class OutOfStock(Exception):
    """Pickles, but does not unpickle: its ``__init__`` wants two arguments."""

    def __init__(self, item, wanted):
        super().__init__(f"{wanted} of {item}")
        self.item = item


class Counted(Task):
    """A task class with Celery's own hooks."""

    def before_start(self, task_id, args, kwargs):
        note("before_start", id=task_id)

    def on_success(self, retval, task_id, args, kwargs):
        note("on_success", id=task_id, retval=retval)

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note("on_failure", id=task_id, exc=type(exc).__name__, trace=str(einfo.traceback)[-200:])

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        note("on_retry", id=task_id, exc=type(exc).__name__)

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        note("after_return", id=task_id, status=status)


@app.task
def add(x, y):
    return x + y


@app.task
def give_back(values):
    return values


@app.task(acks_late=True)
def late_add(x, y):
    return x + y


@shared_task
def total(numbers):
    return sum(numbers)


@app.task
def fail(text):
    raise ValueError(text)


@app.task
def out_of_stock():
    raise OutOfStock("tea", 3)


@app.task(bind=True, max_retries=5)
def flaky(self, failures):
    if self.request.retries < failures:
        raise self.retry(exc=OSError(f"try {self.request.retries}"), countdown=0)
    return self.request.retries


@app.task(bind=True, max_retries=1)
def hopeless(self):
    raise self.retry(exc=LookupError("never"), countdown=0)


@app.task(autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0, max_retries=3, bind=True)
def auto(self):
    if self.request.retries < 2:
        raise OSError("again")
    return self.request.retries


@app.task(bind=True)
def describe(self, *args, **kwargs):
    request = self.request
    return {
        "id": request.id,
        "hostname": request.hostname,
        "delivery_info": request.delivery_info,
        "retries": request.retries,
        "task": request.task,
        "args": request.args,
        "kwargs": request.kwargs,
        "timelimit": request.timelimit,
        "origin": request.origin,
        "root_id": request.root_id,
        "is_eager": request.is_eager,
        "called_directly": request.called_directly,
        "header": request.get("x_color"),
        "pid": os.getpid(),
        "title": Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode().strip(),
    }


@app.task(ignore_result=True)
def quiet(name):
    note("quiet", name=name)
    return "not to be stored"


@app.task(base=Counted, bind=True)
def counted(self, action):
    if action == "fail":
        raise KeyError("gone")
    if action == "retry" and not self.request.retries:
        raise self.retry(exc=OSError("once"), countdown=0)
    if action == "sleep":
        time.sleep(60)
    return action


def told_of_end(error):
    note("error_callback", of=str(error), exc=type(error).__name__)


class Doomed(Counted):
    """Says in its hooks which process they run in, and that they know their request."""

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note("on_failure", id=task_id, exc=type(exc).__name__, args=args, request=self.request.id, text=str(einfo))
        if args[0] == "hooks raise":
            raise RuntimeError("from on_failure")

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        note("on_retry", id=task_id, exc=type(exc).__name__)


def end(task, how):
    note("doomed", id=task.request.id)
    if task.request.retries or task.request.delivery_info.get("redelivered"):
        return "second"
    if how == "limit":
        time.sleep(60)
    if how == "sysexit":
        sys.exit(3)
    os._exit(7)


@app.task(base=Doomed, bind=True, error_callback=told_of_end)
def doomed(self, how):
    return end(self, how)


@app.task(base=Doomed, bind=True, error_callback=told_of_end, acks_late=True)
def late_doomed(self, how):
    return end(self, how)


@app.task(base=Doomed, bind=True, error_callback=told_of_end, acks_late=True, reject_on_worker_lost=True)
def requeued(self, how):
    return end(self, how)


@app.task(base=Doomed, bind=True, error_callback=told_of_end, acks_late=True, default_retry_delay=0, max_retries=1)
def retried(self, how):
    return end(self, how)


retried.retry_on_worker_lost = True  # an option since Celery 5.7


@app.task(bind=True)
def spread(self, numbers):
    """Puts a chord in its own place."""
    from celery import chord

    raise self.replace(chord([add.s(n, 1) for n in numbers], total.s()))


@app.task
def parent(n):
    """Starts a task from inside a task."""
    return add.delay(n, n).id


@app.task
def ignored():
    raise Ignore


@app.task(acks_late=True)
def rejected():
    raise Reject("not wanted", requeue=False)


@app.task
def unprintable():
    return object()


@app.task
def big(size):
    return "x" * size


@app.task
def big_then_small(size):
    data = b"x" * size
    return str(len(data))[:2]


@app.task
def echo_size(text):
    return len(text)


# -- time --------------------------------------------------------------------------------------------------------------


@app.task
def nap(seconds, name=""):
    note("nap", name=name)
    time.sleep(seconds)
    note("awake", name=name)
    return name


@app.task(acks_late=True)
def late_nap(seconds, name=""):
    note("nap", name=name)
    time.sleep(seconds)
    note("awake", name=name)
    return name


@app.task(acks_late=True, reject_on_worker_lost=True, bind=True)
def once_more(self, name):
    """Dies the first time it is delivered and not the second."""
    note("once_more", name=name, redelivered=self.request.delivery_info.get("redelivered"))
    if not self.request.delivery_info.get("redelivered"):
        os._exit(9)
    return "second"


@app.task
def hold(name):
    """Runs until the file ``name`` exists beside the notes."""
    note("hold", name=name)
    gate = Path(os.environ["SHOP_NOTES"]).parent / name
    deadline = time.monotonic() + 60
    while not gate.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.005)
    note("released", name=name)
    return name


class AcceptedUnderSigquit(Request):
    """The signal comes while the node hears that the task has started."""

    def on_accepted(self, pid, time_accepted):
        os.kill(os.getpid(), signal.SIGQUIT)
        end = time.monotonic() + 0.2
        while time.monotonic() < end:  # any thread may be given it; its handler runs in this one
            time.sleep(0.001)
        super().on_accepted(pid, time_accepted)


@app.task(Request="shop.tasks:AcceptedUnderSigquit")
def interrupts_its_start():
    time.sleep(60)


@app.task
def careful(seconds):
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        return "cleaned up"
    return "in time"


@app.task(soft_time_limit=0.4)
def soft_by_option():
    time.sleep(60)


@app.task(time_limit=0.6)
def hard_by_option():
    time.sleep(60)


@app.task(time_limit=0.6, soft_time_limit=0.2)
def swallows():
    """Swallows its soft limit."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            note("swallowed")


@app.task(time_limit=0.6)
def holds_the_gil():
    ctypes.PyDLL(None).sleep(60)


# -- deaths ------------------------------------------------------------------------------------------------------------


@app.task
def die(how):
    note("die", how=how)
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        ctypes.string_at(0)
    if how == "sysexit":
        sys.exit(3)
    return how


@app.task
def say(text, times):
    for n in range(times):
        logger.info("%s %d", text, n)


@app.task
def prints(text):
    print(text)


@app.task
def known(ids):
    return [[result.state, str(result.result)] for result in map(app.AsyncResult, ids)]


@app.task
def forget(task_id):
    app.AsyncResult(task_id).forget()
    return app.AsyncResult(task_id).state
