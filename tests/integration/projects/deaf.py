"""The shop, with a consumer that can be made deaf: it is connected, and nothing is delivered to it.

While the file ``deaf`` lies beside the notes, all consumers are; with ``deaf-once`` only the channel that sees it
first is; with ``hang-once`` that one waits in a system call.
"""

import os
from pathlib import Path
from queue import Empty

from kombu.transport import filesystem, redis
from shop.celery import app
from shop.notes import note
from shop.tasks import hold

HERE = Path(os.environ["SHOP_NOTES"]).parent
victims = {}


def is_struck(channel, how):
    if not (HERE / how).exists():
        return False
    if how not in victims:
        note(how)
    return victims.setdefault(how, channel) is channel or how == "deaf"


class RedisChannel(redis.Channel):
    def _brpop_start(self, timeout=None):
        if is_struck(self, "hang-once"):
            self.client.connection._sock.settimeout(None)
            self.client.connection._sock.recv(1)
            raise ConnectionResetError("no longer")
        if not is_struck(self, "deaf") and not is_struck(self, "deaf-once"):
            super()._brpop_start(timeout)


class FilesystemChannel(filesystem.Channel):
    def _get(self, queue):
        if queue == "celery" and (is_struck(self, "deaf") or is_struck(self, "deaf-once")):
            raise Empty
        return super()._get(queue)


@app.task(acks_late=True)
def late_hold(name):
    return hold(name)


@app.task(rate_limit="1/h")
def limited(name):
    note("limited", name=name)


redis.Transport.Channel, filesystem.Transport.Channel = RedisChannel, FilesystemChannel
