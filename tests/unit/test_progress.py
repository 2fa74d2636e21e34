"""Progress is numbers in, numbers out; the views are drawn into strings."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mpworker.monitor.progress import Progress, Snapshot
from mpworker.monitor.views import ProgressView, duration, plain_line, summary_table
from mpworker.results.query import ResultStore


def test_nothing_is_claimed_before_anything_is_known() -> None:
    state = Progress(10).snapshot(5.0)
    assert (state.done, state.percent, state.rate, state.elapsed) == (0, 0.0, 0.0, 0.0)
    assert state.eta is state.mean is state.success_rate is None
    assert not state.finished


def test_counts_mean_rate_and_eta() -> None:
    progress = Progress(40)
    progress.begin(100.0)
    for n in range(1, 11):
        progress.note("FAILURE" if n == 10 else "SUCCESS", 0.5, 100.0 + n * 0.5)
    state = progress.snapshot(105.0)
    assert (state.done, state.succeeded, state.failed, state.percent) == (10, 9, 1, 25.0)
    assert state.mean == 0.5
    assert state.rate == pytest.approx(2.0)
    assert state.eta == pytest.approx(15.0)
    assert state.success_rate == 90.0


def test_the_rate_is_that_of_the_last_seconds() -> None:
    progress = Progress(10_000, window=10)
    progress.begin(0.0)
    for second in range(1, 101):
        progress.update(second * 10, 0, float(second))
    assert progress.snapshot(100.0).rate == pytest.approx(10.0)
    for second in range(101, 121):
        progress.update(1000 + (second - 100) * 50, 0, float(second))
    assert progress.snapshot(120.0).rate == pytest.approx(50.0)


def test_the_rate_falls_while_nothing_finishes() -> None:
    progress = Progress(100)
    progress.begin(0.0)
    progress.update(50, 0, 5.0)
    rates = [progress.snapshot(now).rate for now in (5.0, 10.0, 14.0, 40.0)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(10.0)
    assert rates[-1] == 0.0
    assert progress.snapshot(40.0).eta is None


def test_memory_stays_small() -> None:
    progress = Progress(10**6)
    for n in range(20_000):
        progress.note("SUCCESS", None, n * 0.0005)
    assert len(progress._samples) < 120
    assert progress.snapshot(10.0).rate == pytest.approx(2000, rel=0.05)
    assert progress.snapshot(10.0).mean is None


def test_the_end() -> None:
    progress = Progress(2)
    progress.update(1, 1, 1.0, mean=0.25)
    state = progress.snapshot(2.0)
    assert state.finished
    assert (state.percent, state.eta, state.mean) == (100.0, 0.0, 0.25)
    assert Progress(0).snapshot(0.0).percent == 100.0
    unknown = Progress()
    unknown.note("success", 1.0, 0.0)
    assert (unknown.snapshot(1.0).percent, unknown.snapshot(1.0).eta) == (0.0, None)


@pytest.mark.parametrize("arguments", [(-1, 1.0), (1, 0.0)])
def test_nonsense_is_refused(arguments: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Progress(*arguments)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.0, "0.0 s"),
        (0.00042, "420 us"),
        (0.012, "12 ms"),
        (3.44, "3.4 s"),
        (125, "2:05"),
        (3725, "1:02:05"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def halfway() -> Snapshot:
    return Snapshot(total=2000, succeeded=990, failed=10, elapsed=5.0, mean=0.0021, rate=450.04, eta=2.2)


def test_plain_line() -> None:
    expected = "demo: 50 % 1,000/2,000, succeeded 990, failed 10, mean 2.1 ms, 450/s, ETA 2.2 s"
    assert plain_line(halfway(), "demo") == expected


def test_a_pipe_gets_few_plain_lines() -> None:
    now, out = [0.0], io.StringIO()
    progress = Progress(1000)
    with ProgressView(progress, stream=out, clock=lambda: now[0], title="demo") as view:
        for n in range(1, 1001):
            now[0] = n * 0.01  # 10 s, 100 tasks a second
            progress.note("SUCCESS", 0.01, now[0])
            view.refresh()
    lines = out.getvalue().splitlines()
    assert 10 <= len(lines) <= 25
    assert "\x1b" not in out.getvalue()
    assert lines[-1].startswith("demo: 100 % 1,000/1,000, succeeded 1,000, failed 0")


def test_slow_progress_still_says_something() -> None:
    now, out = [0.0], io.StringIO()
    with ProgressView(Progress(1000), stream=out, clock=lambda: now[0]) as view:
        for second in range(60):
            now[0] = float(second)
            view.refresh()
    assert 29 <= len(out.getvalue().splitlines()) <= 32


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_terminal_shows_bar_and_figures_within_its_width(width: int) -> None:
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=True, width=width, no_color=True, legacy_windows=False)
    progress = Progress(123_456)
    with ProgressView(progress, console=console, clock=lambda: now[0]) as view:
        now[0] = 100.0
        progress.update(60_000, 1728, now[0], mean=0.0123)
        view.refresh()
    text = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", out.getvalue())
    assert max(len(line) for line in text.replace("\r", "\n").splitlines()) <= width
    for part in ("50 % 61,728/123,456", "ok 60,000", "failed 1,728", "mean 12.3 ms", "rate 617/s", "ETA 1:40"):
        assert part in text, part


def test_an_error_in_the_block_leaves_the_terminal_usable() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt):
        with ProgressView(Progress(1), console=console):
            raise KeyboardInterrupt
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


@pytest.mark.parametrize("width", [60, 120])
def test_the_summary_fits_and_takes_no_markup_from_messages(tmp_path: Path, width: int) -> None:
    store = ResultStore(tmp_path)
    store.add_result("1", "completed", "")
    store.add_result("2", "failed", "no")
    out = io.StringIO()
    console = Console(file=out, width=width)
    failures = [("/usr/lib/" + "deep/" * 20 + "bad.py", "SyntaxError: [/red] invalid [bold]syntax")]
    slow = [("x.py", 0.5), ("y.py", None)]
    console.print(summary_table(store.get_statistics(), slow, failures, title="Demo", more_failures=1234))
    text = out.getvalue()
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for part in ("50.0 %", "500 ms", "[bold]syntax", "and 1,234 more", "Slowest", "Failed"):
        assert part in text, part


def test_an_empty_summary() -> None:
    out = io.StringIO()
    Console(file=out, width=60).print(summary_table(ResultStore("/nonexistent").get_statistics()))
    assert "Slowest" not in out.getvalue()
    assert "success rate" in out.getvalue()
