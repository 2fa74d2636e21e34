"""Receivers of Celery's signals: they note where they ran."""

from celery import signals

from shop.notes import note


@signals.task_prerun.connect
def prerun(sender=None, task_id=None, **_):
    note("prerun", id=task_id, name=sender.name)


@signals.task_postrun.connect
def postrun(sender=None, task_id=None, state=None, **_):
    note("postrun", id=task_id, state=state)


@signals.task_success.connect
def success(sender=None, result=None, **_):
    note("success", id=sender.request.id, result=result)


@signals.task_failure.connect
def failure(sender=None, task_id=None, exception=None, einfo=None, **_):
    note("failure", id=task_id, exc=type(exception).__name__, text=str(exception), einfo=type(einfo).__name__)


@signals.task_retry.connect
def retry(sender=None, request=None, reason=None, **_):
    note("retry", id=request.id, reason=str(reason))


@signals.task_revoked.connect
def revoked(sender=None, request=None, terminated=None, expired=None, **_):
    note("revoked", id=request.id, terminated=terminated, expired=expired)


@signals.worker_process_init.connect
def process_init(sender=None, **_):
    note("process_init", sender=sender)


@signals.worker_process_shutdown.connect
def process_shutdown(sender=None, pid=None, exitcode=None, **_):
    note("process_shutdown", sender=sender, of=pid, exitcode=exitcode)
