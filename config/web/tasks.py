"""Tasks that the web app enqueues and the worker runs; both import this module."""

import statistics
import time

from mpworker import app


@app.task
def average(numbers: list[float], seconds: float = 0) -> float:
    """Takes ``seconds``; without numbers it fails."""
    time.sleep(seconds)
    return statistics.fmean(numbers)
