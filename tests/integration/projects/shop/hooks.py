"""Tasks with ``callback`` and ``error_callback``."""

import asyncio
import os
import signal
import sys
import time
from dataclasses import dataclass

from celery import Task

from shop.celery import app
from shop.notes import note


@dataclass
class Receipt:
    """A result that JSON cannot hold."""

    number: int


def told(result):
    note("callback", of=result if not isinstance(result, Receipt) else result.number, type=type(result).__name__)


def told_error(error):
    note("error_callback", type=type(error).__name__, text=str(error), is_exception=isinstance(error, BaseException))


@app.task(callback=told, error_callback=told_error, bind=True, max_retries=3)
def hooked(self, action, value=None):
    note("run", action=action)
    if action == "return":
        return value
    if action == "raise":
        raise ValueError(value)
    if action == "retry" and self.request.retries < 2:
        raise self.retry(exc=OSError("later"), countdown=0)
    if action == "exhaust":
        raise self.retry(exc=OSError("for ever"), countdown=0, max_retries=1)
    if action == "sleep":
        time.sleep(60)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(5)
    if action == "sysexit":
        sys.exit(4)
    return value


@app.task(callback=told, error_callback=told_error, ignore_result=True)
def receipt(number):
    return Receipt(number)


class ShortLived(Task):
    def on_success(self, retval, task_id, args, kwargs):
        os.kill(os.getpid(), signal.SIGKILL)  # the result is stored, and nobody has been told


@app.task(base=ShortLived, callback=told, error_callback=told_error)
def last_words(value):
    return value


async def told_later(result):
    await asyncio.sleep(0)
    told(result)


@app.task(callback=told_later)
def hooked_later(value):
    return value


def bad_callback(result):
    note("bad", how=result)
    if result == "raise":
        raise RuntimeError("the callback's own error")
    if result == "hang":
        time.sleep(60)
    if result == "exit":
        os._exit(3)
    if result == "sysexit":
        sys.exit(3)


@app.task(callback=bad_callback)
def badly_hooked(how):
    return how


@app.task(error_callback=told_error, name="shop.only_errors")
def only_errors(fail):
    if fail:
        raise ValueError("only this one")
