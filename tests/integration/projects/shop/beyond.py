"""Tasks of kinds that a project under prefork cannot have."""

import asyncio
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger
from pydantic import BaseModel

import mpworker
from shop.celery import app
from shop.notes import note
from shop.tasks import hold

DEVICE = os.environ.get("SHOP_DEVICE")

# -- coroutines --------------------------------------------------------------------------------------------------------


@app.task
async def add_later(x, y):
    await asyncio.sleep(0)
    return x + y


@shared_task
async def where():
    return os.getpid(), id(asyncio.get_running_loop())


@app.task
async def fail_later(text):
    await asyncio.sleep(0)
    raise LookupError(text)


@app.task(bind=True, max_retries=3)
async def flaky_later(self, failures):
    await asyncio.sleep(0)
    if self.request.retries < failures:
        raise self.retry(exc=OSError("again"), countdown=0)
    return self.request.id, self.request.retries


@app.task(autoretry_for=(OSError,), retry_backoff=False, default_retry_delay=0, max_retries=3, bind=True)
async def auto_later(self, failures):
    await asyncio.sleep(0)
    if self.request.retries < failures:
        raise OSError("again")
    return self.request.retries


@app.task(bind=True)
async def depth(self, n):
    """Awaits other tasks, and itself, as the functions that they are."""
    if n == 0:
        return await add_later(0, 0)
    return 1 + await self(n - 1)


@app.task
async def applies():
    raise add_later.apply((1, 2)).result


@app.task
async def careful_later():
    try:
        await asyncio.sleep(60)
    except SoftTimeLimitExceeded:
        return "cleaned up"


class Order(BaseModel):
    item: str
    count: int


@app.task(pydantic=True, bind=True)
async def double_order(self, order: Order) -> Order:
    await asyncio.sleep(0)
    return Order(item=order.item, count=order.count * 2)


@app.task(ignore_result=True)
async def quiet_later(path):
    await asyncio.sleep(0)
    with open(path, "x"):
        pass


# -- progress ----------------------------------------------------------------------------------------------------------


def tell(gate):
    for n in range(1, 10_001):
        mpworker.progress(n, 10_000, f"part {n}")
    hold.run(gate)
    mpworker.progress(10_000, 10_000, "the end")
    return "done"


@app.task
def tells(gate):
    return tell(gate)


@app.task(ignore_result=True)
def tells_only(gate):
    return tell(gate)


@app.task
async def tells_later(gate):
    return await asyncio.to_thread(tell, gate)


@app.task(bind=True, max_retries=1)
def tells_to_the_end(self):
    """A thread of it goes on telling while the task ends; the first time it is to be retried."""
    over = threading.Event()

    def keep_telling():
        while not over.is_set():
            mpworker.progress(1, 2)

    thread = threading.Thread(target=keep_telling, daemon=True)
    thread.start()
    try:
        mpworker.progress(1, 2)
        if not self.request.retries:
            raise self.retry(countdown=0)
        return "done"
    finally:
        threading.Timer(0.01, over.set).start()


# -- slots -------------------------------------------------------------------------------------------------------------


@app.task
def device(gate):
    note("device", name=gate)
    hold.run(gate)
    return mpworker.current_slot(), DEVICE, os.environ.get("SHOP_DEVICE"), os.environ.get("SHOP_PORT")


# -- the log -----------------------------------------------------------------------------------------------------------

quiet = logging.getLogger("quiet")
quiet.propagate = False
quiet.setLevel(logging.DEBUG)


def say(what):
    print(f"printed {what}")
    sys.stderr.write(f"written {what}\n")
    sys.stderr.writelines([f"lines {what}\n"])
    get_task_logger(__name__).warning("logged %s", what)
    quiet.debug("quietly %s", what)
    try:
        raise KeyError(what)
    except KeyError:
        quiet.exception("caught")


@app.task(bind=True, max_retries=1)
def says(self, what, end=""):
    say(what)
    if end == "fail":
        raise ValueError(what)
    if end == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    if end == "leave":
        sys.exit(3)
    if end == "exit":
        os._exit(3)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "sleep":
        note("says", name=what)
        signal.pause()
    return "said"


@app.task
def says_much(text, times):
    quiet.error("with %d", "no number")
    if hasattr(sys.stdout, "buffer"):  # Celery redirects to something that has none
        sys.stdout.buffer.write(b"bytes \xff\n")
    for n in range(times):
        print(f"{n} {text}")


# -- processes of a task -----------------------------------------------------------------------------------------------


def stay(name, kind):
    note("member", name=name, of=kind)
    time.sleep(600)


@app.task
def uses_processes():
    process = multiprocessing.Process(target=sys.exit, args=(7,))
    process.start()
    process.join()
    with multiprocessing.Pool(2) as pool:
        mapped = pool.map(abs, [-1, -2])
    with mpworker.ProcessPool(1) as pool:
        submitted = pool.submit(pow, 2, 3).result()
    output = subprocess.run(["echo", "done"], capture_output=True, text=True, check=True).stdout
    return process.exitcode, mapped, submitted, output


@app.task
def family(name):
    multiprocessing.Process(target=stay, args=(name, "process")).start()
    pool = multiprocessing.Pool(1)
    pool.apply_async(stay, (name, "pool"))
    inner = mpworker.ProcessPool(1)
    inner.submit(stay, name, "inner")
    shell = subprocess.Popen(["sh", "-c", "sleep 600 & wait"])
    note("member", name=name, of="shell", shell=shell.pid)
    time.sleep(60)
