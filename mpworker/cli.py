"""The ``mpworker`` command. Owns options and exit codes; the work is done elsewhere and imported when it is asked for.

Exit codes: 0 done, 1 failed, 2 wrong options, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from mpworker import __version__
from mpworker.errors import ConfigurationError, MPWorkerError

if TYPE_CHECKING:
    from celery import Celery

    from mpworker.celery.requeue import DeadLetters
    from mpworker.results.query import ResultStore


class WrongOption(click.ClickException):
    """One line, without the usage text."""

    exit_code = 2


@click.group("mpworker", invoke_without_command=True)
@click.version_option(__version__, prog_name="mpworker")
@click.option(
    "-A", "--app", metavar="APP", help="The project's Celery app, as with celery -A; default: mpworker's own."
)
@click.pass_context
def cli(context: click.Context, app: str | None) -> None:
    """A Celery worker that loses no task and no result. Start a node with: celery -A mpworker worker"""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Any folder; default: Python's standard library."
)
@click.option("--workers", type=int, default=None, help="Worker processes; default: one for each processor.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where the run's folder is made.")
@click.pass_context
def demo(context: click.Context, folder: Path | None, workers: int | None, data_dir: Path | None) -> None:
    """Start a server and a worker, analyse every .py file of a folder, check the results, stop."""
    if workers is not None and workers < 1:
        raise WrongOption(f"--workers must be 1 or more, not {workers}")
    from mpworker.demo import Demo, python_files

    try:
        python_files(folder)
    except MPWorkerError as exc:
        raise WrongOption(str(exc)) from None
    try:
        context.exit(Demo(folder, workers or _processors(), data_dir).run())
    except BrokenPipeError:
        raise
    except (MPWorkerError, OSError) as exc:
        raise click.ClickException(str(exc)) from None


_since = click.option("--since", metavar="WHEN", help="30m, 2h, 1d ago, or ISO 8601.")
_until = click.option("--until", metavar="WHEN", help="The same.")
_path = click.option("--path", type=click.Path(path_type=Path), help="A journal folder or file; default: this node's.")
_cluster = click.option("--cluster", is_flag=True, help="Of all nodes: what Redis remembers of what has ended.")
_as_json = click.option("--json", "as_json", is_flag=True, help="One JSON object per line, as in a pipe.")


@cli.group(invoke_without_command=True)
@click.option("--status", help="A state, or a word for it: failed, completed, running, revoked, ...")
@click.option("--name", help="Of the task; a pattern such as 'proj.tasks.*'.")
@click.option("--id", "task_id", help="Of one task, or a pattern.")
@click.option("--worker", help="A node's name, or a pattern.")
@_since
@_until
@click.option("--limit", type=click.IntRange(0), default=20, show_default=True, help="The latest so many.")
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--dead", is_flag=True, help="Messages that killed too many workers, instead; see requeue.")
@_path
@_cluster
@_as_json
@click.option("--csv", "as_csv", is_flag=True, help="With a line of names.")
@click.pass_context
def results(context: click.Context, /, dead: bool, as_json: bool, as_csv: bool, **options: Any) -> None:
    """List what has become of tasks: the latest record of each."""
    if context.invoked_subcommand is not None:
        return
    if as_json and as_csv:
        raise WrongOption("--json and --csv exclude each other")
    form = "csv" if as_csv else "json" if as_json or not sys.stdout.isatty() else "table"
    if dead:
        given = [name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if given:
            raise WrongOption("--dead lists all dead messages: only --json and --csv go with it")
        _list_dead(context, form)
        return
    from mpworker.monitor.listing import list_results

    follow = options.pop("follow")
    with _store(context, options.pop("path"), options.pop("cluster"), follow) as store:
        list_results(store, form, follow, options)


def _list_dead(context: click.Context, form: str) -> None:
    from mpworker.monitor.listing import print_rows

    letters = _dead_letters(context)
    found: list[dict[str, Any]] = []
    try:
        found.extend(letter.summary() for letter in letters.all())
    except MPWorkerError as exc:
        raise click.ClickException(str(exc)) from None
    finally:  # also what was found before a place that cannot be read
        print_rows(found, form, "no dead messages")


@cli.command()
@click.option("--by", type=click.Choice(["name", "worker", "hour"]), help="One row for each of them.")
@_since
@_until
@_path
@_cluster
@_as_json
@click.pass_context
def stats(
    context: click.Context,
    by: str | None,
    since: str | None,
    until: str | None,
    path: Path | None,
    cluster: bool,
    as_json: bool,
) -> None:
    """Count what has become of tasks, each by its latest record."""
    from mpworker.monitor.listing import print_statistics

    with _store(context, path, cluster) as store:
        print_statistics(store, by, since, until, as_json or not sys.stdout.isatty())


@contextmanager
def _store(context: click.Context, path: Path | None, cluster: bool, follow: bool = False) -> Iterator[ResultStore]:
    """What is asked: a journal, or what Redis remembers. What is wrong with the question is one line."""
    from mpworker.celery.app import settings_of
    from mpworker.results.query import ResultStore

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was made for this goes
    try:
        if cluster:
            if path is not None:
                raise WrongOption("--path and --cluster exclude each other")
            from mpworker.celery.history import history_of

            with history_of(_app(context), follow=follow) as copy:
                yield ResultStore(copy)
        elif path is None:
            yield ResultStore(settings_of(_app(context)).journal_dir)
        elif path.exists():
            yield ResultStore(path)
        else:
            raise WrongOption(f"--path: there is no {path}")
    except (ConfigurationError, ValueError) as exc:
        raise WrongOption(str(exc)) from None
    except MPWorkerError as exc:
        raise click.ClickException(str(exc)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@results.command()
@_path
@click.option("--all", "again", is_flag=True, help="Also what it has brought before: Redis has lost it.")
@click.option("--any-backend", is_flag=True, help="Also what was meant for another result backend.")
@click.pass_context
def ship(context: click.Context, path: Path | None, again: bool, any_backend: bool) -> None:
    """Bring to Redis what a node has left in its journal. Running it again does no harm."""
    from mpworker.celery.app import settings_of

    try:
        app = _app(context)
        folder = path or settings_of(app).journal_dir
        from mpworker.celery import shipping

        found = shipping.ship(app, folder, again, any_backend)
    except ConfigurationError as exc:
        raise WrongOption(str(exc)) from None
    except MPWorkerError as exc:
        raise click.ClickException(str(exc)) from None
    if found is None:
        raise click.ClickException(f"{folder} is being shipped by its node")
    number = found.delivered
    click.echo(
        f"{number:,} record{'s' * (number != 1)} delivered from {folder}"
        if number
        else f"nothing to deliver in {folder}"
    )
    if found.others:
        click.echo(f"{found.others:,} more are meant for another result backend: see --any-backend", err=True)
    if found.young:
        click.echo(f"{found.young:,} more are too new: their writer may deliver them, run this again later", err=True)


@cli.command()
@_path
@click.option("--timeout", type=float, default=3.0, show_default=True, help="Seconds that each answer may take.")
@click.pass_context
def health(context: click.Context, path: Path | None, timeout: float) -> None:
    """Whether broker, results, journal, disk and nodes are well; exit code 1 if one of them is not."""
    if not timeout > 0:
        raise WrongOption(f"--timeout must be more than 0, not {timeout:g}")
    from mpworker.celery.app import settings_of

    try:
        app = _app(context)
        folder = path or settings_of(app).journal_dir
        from mpworker.celery.health import look

        findings = []
        for finding in look(app, folder, timeout):
            findings.append(finding)
            click.echo(f"{'ok' if finding.well else 'BAD':<4}{finding.about:<8} {finding.text}")
    except ConfigurationError as exc:
        raise WrongOption(str(exc)) from None
    context.exit(0 if all(finding.well for finding in findings) else 1)


@cli.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@click.pass_context
def requeue(context: click.Context, ids: tuple[str, ...]) -> None:
    """Send dead messages again, with their ids, to the queues that they came from."""
    letters, failed = _dead_letters(context), False
    for task_id in dict.fromkeys(ids):
        try:
            click.echo(letters.requeue(task_id))
        except MPWorkerError as exc:
            failed = True
            click.echo(f"Error: {exc}", err=True)
    context.exit(1 if failed else 0)


def _dead_letters(context: click.Context) -> DeadLetters:
    from mpworker.celery.requeue import DeadLetters

    try:
        return DeadLetters(_app(context))
    except ConfigurationError as exc:
        raise WrongOption(str(exc)) from None


def _app(context: click.Context) -> Celery:
    """The app of the nearest ``-A``: ours, or that of ``celery -A proj mpworker``.

    Raises:
        ConfigurationError: there is no such app, or importing it fails.
    """
    from mpworker.celery.requeue import app_of

    given: Any = None
    place: click.Context | None = context
    while place is not None and given is None:
        given, place = place.params.get("app"), place.parent
    return app_of(given) if given is None or isinstance(given, str) else cast("Celery", given)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """The entry point."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        code = exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:  # the reader of our output has left, as in `mpworker demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
