"""Tasks that go to the edges: results and errors that do not travel, children that cannot start."""

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from celery import signals

from shop.celery import app
from shop.hooks import told, told_error
from shop.notes import note

HERE = Path(os.environ["SHOP_NOTES"]).parent
if (HERE / "slow-children").exists() and getattr(multiprocessing.current_process(), "_inheriting", False):
    note("loading")
    time.sleep(60)


@app.task(callback=told, error_callback=told_error, ignore_result=True)
def gives_lambda():
    return lambda: None


@app.task(callback=told, error_callback=told_error)
def late_class():
    """Raises an exception of a class that only this process can import."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "known_only_here.py").write_text("class Odd(Exception): pass\n")
        sys.path.insert(0, folder)
        error = importlib.import_module("known_only_here").Odd("who knows me?")
        sys.path.remove(folder)
    raise error


@signals.worker_process_init.connect
def refuse(**_):
    if (HERE / "no-more-workers").exists():
        os._exit(1)
