"""How far a known number of tasks has come: counts, mean run time, the recent rate and the time that is left.

Pure: owns numbers only. Never reads a clock (every call is given the monotonic time), never draws anything.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

#: Seconds that the rate looks back.
WINDOW = 10.0
#: The window is kept as at most so many samples.
_SAMPLES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The state at one instant."""

    #: ``None``: not known
    total: int | None
    succeeded: int
    failed: int
    #: seconds since the first call
    elapsed: float
    #: mean run time of a task in seconds; ``None`` until one is known
    mean: float | None
    #: finished tasks per second, lately
    rate: float
    #: seconds until all are finished; ``None`` when that cannot be told
    eta: float | None

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    @property
    def percent(self) -> float:
        """0 to 100; of an unknown total 0, of an empty one 100."""
        if self.total is None:
            return 0.0
        return 100.0 if self.total <= 0 else min(100.0, 100.0 * self.done / self.total)

    @property
    def success_rate(self) -> float | None:
        """Percent of what is done; ``None`` before anything is."""
        return 100.0 * self.succeeded / self.done if self.done else None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total


class Progress:
    """Counts finished tasks, one by one (:meth:`note`) or by totals (:meth:`update`).

    Args:
        total: how many there are; ``None`` if not known (yet): :attr:`total` may be set later.
        window: seconds that the rate looks back.
    """

    def __init__(self, total: int | None = None, window: float = WINDOW) -> None:
        if total is not None and total < 0:
            raise ValueError(f"total must be 0 or more, not {total}")
        if window <= 0:
            raise ValueError(f"window must be above 0 seconds, not {window}")
        self.total = total
        self._window = window
        self._succeeded = self._failed = 0
        self._runtimes, self._timed = 0.0, 0
        self._began: float | None = None
        self._samples: deque[tuple[float, int]] = deque()

    def begin(self, now: float) -> None:
        """Starts the clock; else the first :meth:`note`, :meth:`update` or :meth:`snapshot` does."""
        if self._began is None:
            self._began = now
            self._samples.append((now, self._succeeded + self._failed))

    def note(self, status: str, runtime: float | None, now: float) -> None:
        """One task has ended.

        Args:
            status: ``SUCCESS`` counts as succeeded, any other state as failed.
            runtime: seconds, or ``None``.
            now: seconds of the monotonic clock.
        """
        self.begin(now)
        if status.upper() == "SUCCESS":
            self._succeeded += 1
        else:
            self._failed += 1
        if runtime is not None:
            self._runtimes += runtime
            self._timed += 1
        self._sample(now)

    def update(self, succeeded: int, failed: int, now: float, mean: float | None = None) -> None:
        """Sets the counts as they are by now.

        Args:
            mean: mean run time in seconds of all that are counted, if known.
        """
        self.begin(now)
        self._succeeded, self._failed = succeeded, failed
        if mean is not None:
            self._timed = max(succeeded + failed, 1)
            self._runtimes = mean * self._timed
        self._sample(now)

    def _sample(self, now: float) -> None:
        done = self._succeeded + self._failed
        newest = self._samples[-1]
        if len(self._samples) > 1 and now - self._samples[-2][0] < self._window / _SAMPLES:
            self._samples[-1] = (max(now, newest[0]), done)
        else:
            self._samples.append((max(now, newest[0]), done))
        self._forget(now)

    def _forget(self, now: float) -> None:
        # The last sample before the window stays: the rate is counted from there.
        while len(self._samples) > 1 and self._samples[1][0] <= now - self._window:
            self._samples.popleft()

    def snapshot(self, now: float) -> Snapshot:
        """The state at this time; the rate falls by itself while nothing finishes."""
        self.begin(now)
        assert self._began is not None
        self._forget(now)
        done = self._succeeded + self._failed
        since, before = self._samples[0]
        span = now - since
        rate = max(done - before, 0) / span if span > 0 else 0.0
        eta: float | None = None
        if self.total is not None:
            left = self.total - done
            eta = 0.0 if left <= 0 else left / rate if rate > 0 else None
        return Snapshot(
            total=self.total,
            succeeded=self._succeeded,
            failed=self._failed,
            elapsed=now - self._began,
            mean=self._runtimes / self._timed if self._timed else None,
            rate=rate,
            eta=eta,
        )
