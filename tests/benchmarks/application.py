"""As :mod:`measure`, but an application with a real one's weight: its main script imports celery, numpy and pandas.

So they are there before anything is forked from it, and are preloaded where a pool loads the main script beforehand.
"""

from __future__ import annotations

import celery  # noqa: F401
import measure
import numpy  # noqa: F401
import pandas  # noqa: F401

if __name__ == "__main__":
    measure.main()
