"""`ratchet import`: the first history."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from daemon.history import Refused

File = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="A .jsonl, .ndjson or .csv file, also with .gz behind.")
]


def import_history(
    file: File,
    agent: context.AgentName = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Import cases decided before, columns as in `agents.NAME.columns`; again adds nothing; exit 1 when a row was refused."""
    from daemon import history, policies  # noqa: PLC0415 — `ratchet --help` needs none of it
    from storage import tokens  # noqa: PLC0415

    began = time.monotonic()
    with context.opened(config) as opened, _progress(file.stat().st_size) as on_progress:
        chosen = opened.pick_agent(agent)
        with opened.writing() as connection:
            handler = policies.read_in_force(connection, {chosen.name: chosen}, context.read_clock())[chosen.name]
        principal = tokens.Principal(context.read_actor(), "operator")
        importer = history.Importer(opened.engine, chosen, handler, principal, context.read_clock, _report, on_progress)
        summary = importer.import_file(file)
    seconds = round(time.monotonic() - began, 2)
    if as_json:
        context.print_json({**asdict(summary), "seconds": seconds})
    else:
        typer.echo(
            f"{summary.rows} rows: {summary.imported} imported, {summary.known} known before, {summary.refused} refused ({seconds} s)."
        )
    if summary.refused:
        raise typer.Exit(1)


def _report(refused: Refused) -> None:
    typer.echo(f"line {refused.line}: {refused.reason}", err=True)


@contextlib.contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar over the file's bytes on standard error, where that is a terminal."""
    from rich import console, progress  # noqa: PLC0415 — rich is slow to import

    terminal = console.Console(stderr=True)
    with progress.Progress(console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        task = bar.add_task("importing", total=size)
        yield lambda position: bar.update(task, completed=position)
