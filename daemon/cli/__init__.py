"""The command `ratchet`: one module for each group of commands."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli import (
    alarms,
    config,
    datasets,
    db,
    deadletters,
    doctor,
    importing,
    init,
    labels,
    ledger,
    model,
    plan,
    runs,
    simulate,
    status,
    tokens,
    topics,
    train,
    up,
    versions,
    why,
)

OURS = frozenset({"consumers", "daemon", "storage", "trainers"})

app = typer.Typer(
    name="ratchet",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ratchet {metadata.version('ratchet-daemon')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def ratchet(version: Version = False) -> None:
    """Improve a self-hosted claims model from the answers of experts, and take back a version that does harm."""


app.command("init")(init.init)
app.command("up")(up.up)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.add_typer(model.app, name="model")
app.add_typer(config.app, name="config")
app.add_typer(db.app, name="db")
app.command("import")(importing.import_history)
app.add_typer(datasets.app, name="datasets")
app.add_typer(labels.app, name="labels")
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.add_typer(runs.app, name="runs")
app.add_typer(versions.app, name="versions")
app.command("promote")(versions.promote)
app.command("rollback")(versions.rollback)
app.command("why")(why.why)
app.add_typer(ledger.app, name="ledger")
app.add_typer(alarms.app, name="alarms")
app.add_typer(deadletters.app, name="dead-letters")
app.add_typer(topics.app, name="topics")
app.add_typer(tokens.app, name="tokens")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 when it failed, 2 when it was called wrongly."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="ratchet")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:  # noqa: BLE001 — the outermost boundary: every failure ends as one line for a person
        if os.environ.get("RATCHET_LOG__LEVEL") == "debug":
            traceback.print_exc()
        sys.stderr.write(f"ratchet: {_sentence(error)}{_hint()}\n")
        return 1
    return 0


def _sentence(error: Exception) -> str:
    """Our own errors and the system's say what happened; any other is named by its type.

    Of those only the first line is kept: SQLAlchemy's next ones hold the values of the statement.
    """
    if type(error).__module__.partition(".")[0] in OURS or isinstance(error, OSError):
        return str(error)
    from storage import db as database  # noqa: PLC0415 — `ratchet --help` needs none of it

    if database.is_damage(error):
        return f"the database is damaged ({database.explain(error)}): check database.url, or restore it from a backup (docs/operations.md)"
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first} (RATCHET_LOG__LEVEL=debug shows where)"


def _hint() -> str:
    """What is behind failures that name a file which can't be, or none."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return " (the current folder was deleted: change into one that exists)"
    return ""
