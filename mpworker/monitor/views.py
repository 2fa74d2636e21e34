"""Draws progress and the table at the end: with rich on a terminal, as plain lines into a pipe or a file.

Owns wording and layout. Never counts (``progress.py`` and ``results/query.py`` do), never starts a thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpworker.monitor.progress import Progress, Snapshot

#: Seconds between two redraws of a terminal.
_REDRAW = 0.1


def duration(seconds: float | None) -> str:
    """``-`` (unknown), ``850 us``, ``12 ms``, ``3.4 s``, ``2:05``, ``1:02:05``."""
    if seconds is None:
        return "-"
    for limit, factor, unit in ((0.001, 1e6, "us"), (1.0, 1e3, "ms")):
        if 0 < seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


def _done_of(state: Snapshot) -> str:
    return f"{state.done:,}" if state.total is None else f"{state.done:,}/{state.total:,}"


def plain_line(state: Snapshot, title: str = "progress") -> str:
    """One line without colour or control characters."""
    return (
        f"{title}: {state.percent:.0f} % {_done_of(state)}, succeeded {state.succeeded:,}, failed {state.failed:,}, "
        f"mean {duration(state.mean)}, {_rate(state.rate)}, ETA {duration(state.eta)}"
    )


def progress_lines(state: Snapshot, title: str = "") -> RenderableType:
    """The bar and, below it, the figures; fits 60 columns."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    total = max(state.total or 0, 1)
    completed = state.done if state.total else total if state.finished else 0
    bar.add_row(
        title, ProgressBar(total=total, completed=min(completed, total)), f"{state.percent:3.0f} % {_done_of(state)}"
    )
    figures = Text.assemble(
        ("ok ", "dim"),
        (f"{state.succeeded:,}", "green"),
        ("  failed ", "dim"),
        (f"{state.failed:,}", "red" if state.failed else ""),
        ("  mean ", "dim"),
        duration(state.mean),
        ("  rate ", "dim"),
        _rate(state.rate),
        ("  ETA ", "dim"),
        duration(state.eta),
    )
    return Group(bar, figures)


class ProgressView:
    """Shows a :class:`Progress` while its ``with`` block runs; call :meth:`refresh` whenever it may have changed.

    Args:
        stream: where to write; default standard output as it is when the view is made.
        interval, step: without a terminal a line is written at most every ``interval`` seconds, and when the
            percentage has risen by ``step``.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        title: str = "tasks",
        stream: TextIO | None = None,
        console: Console | None = None,
        interval: float = 2.0,
        step: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._title, self._clock = progress, title, clock
        self._interval, self._step = interval, step
        self._console = console or Console(file=stream or sys.stdout)
        self._live: Live | None = None
        self._shown_at: float | None = None
        self._shown_percent = 0.0

    def __enter__(self) -> Self:
        self._progress.begin(self._clock())
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._draw(), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shows the last state, also when the block was left by an error or Ctrl-C."""
        if self._live is None:
            self._write_line(self._progress.snapshot(self._clock()))
            return
        live, self._live = self._live, None
        live.update(self._draw())
        live.stop()

    def _draw(self) -> RenderableType:
        return progress_lines(self._progress.snapshot(self._clock()), self._title)

    def refresh(self) -> None:
        """Redraws if it is time to; cheap enough to be called for every task."""
        now = self._clock()
        since = None if self._shown_at is None else now - self._shown_at
        if self._live is not None:
            if since is None or since >= _REDRAW:
                self._shown_at = now
                self._live.update(self._draw(), refresh=True)
            return
        if since is not None and since < _REDRAW:
            return
        state = self._progress.snapshot(now)
        if since is None or since >= self._interval or state.percent - self._shown_percent >= self._step:
            self._write_line(state)

    def _write_line(self, state: Snapshot) -> None:
        self._shown_at, self._shown_percent = self._clock(), state.percent
        # Not through rich: it would break the line at the width that it supposes.
        self._console.file.write(plain_line(state, self._title) + "\n")
        self._console.file.flush()


def summary_table(
    stats: Mapping[str, Any],
    slowest: Iterable[tuple[str, float | None]] = (),
    failures: Iterable[tuple[str, str]] = (),
    *,
    title: str = "Summary",
    more_failures: int = 0,
) -> RenderableType:
    """The table at the end.

    Args:
        stats: what ``ResultStore.get_statistics`` returns.
        slowest: names and run times in seconds.
        failures: names and messages.
        more_failures: how many failures are not listed.
    """
    totals = Table(title=title, title_justify="left", show_header=False)
    totals.add_column(no_wrap=True)
    totals.add_column(justify="right")
    rate = f"{stats['success_rate']:.1f} %" if stats["completed"] + stats["failed"] else "-"
    for name, text in (
        ("tasks", f"{stats['total_tasks']:,}"),
        ("succeeded", f"{stats['completed']:,}"),
        ("failed", f"{stats['failed']:,}"),
        ("success rate", rate),
        ("run time p50", duration(stats["p50_runtime"])),
        ("run time p95", duration(stats["p95_runtime"])),
        ("throughput", _rate(stats["throughput"])),
    ):
        totals.add_row(name, text)
    parts: list[RenderableType] = [totals]
    slow = [(name, duration(seconds)) for name, seconds in slowest]
    if slow:
        parts.append(_two_columns("Slowest", "run time", slow))
    failed = list(failures)
    if failed:
        parts.append(_two_columns("Failed", "message", failed))
    if more_failures:
        parts.append(Text(f"... and {more_failures:,} more failures"))
    return Group(*parts)


def _two_columns(title: str, second: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column(second, overflow="fold", justify="right" if second == "run time" else "left")
    for name, text in rows:
        # Text, not str: a name or a message may contain what rich takes for markup.
        table.add_row(Text(name), Text(text))
    return table


def print_rows(
    rows: Sequence[Mapping[str, object]], nothing: str, console: Console | None = None, *, header: bool = True
) -> None:
    """A table of rows that have the same columns, or the text ``nothing``."""
    console = console or Console()
    if not rows:
        console.print(nothing, markup=False)
        return
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False, show_header=header)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table)
