"""Models of a small project: no Celery here."""

import json
import os
import time

import billiard.process

from mpworker import Model


def write(kind, **fields):
    role = billiard.process.current_process()._name
    line = json.dumps({"kind": kind, "pid": os.getpid(), "role": role, **fields}, default=repr)
    descriptor = os.open(os.environ["SHOP_NOTES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


class Count(Model):
    def runnable(self, *items):
        write("runnable", items=list(items))
        return {"counted": len(items)}

    def callback(self, result):
        write("callback", result=result)

    def error_callback(self, error):
        write("error_callback", type=type(error).__name__, text=str(error))


class Broken(Count):
    def runnable(self, text):
        raise ValueError(text)


class Slow(Count):
    def runnable(self, seconds):
        time.sleep(seconds)


class OnlyRunnable(Model):
    def runnable(self, x):
        return x * 2
