import os

from celery import shared_task
from django.db import connection, transaction

from clinic.models import Patient


@shared_task
def admit(name):
    Patient.objects.create(name=name)
    return Patient.objects.count(), os.getpid()


@shared_task
def admit_none(name):
    """Fails within a transaction, and leaves its connection open."""
    with transaction.atomic():
        Patient.objects.create(name=name)
        raise LookupError(f"no bed for {name}")


@shared_task
def database_is_open():
    return connection.connection is not None
