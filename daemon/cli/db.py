"""`ratchet db`: the database's schema."""

from __future__ import annotations

import typer

from daemon.cli import context

app = typer.Typer(help="Look after the database.", no_args_is_help=True)


@app.command()
def upgrade(config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Bring the database to this version of Ratchet; doing so twice changes nothing. Take a backup first."""
    from storage import db, schema  # noqa: PLC0415 — `ratchet --help` needs none of it

    engine = db.open_engine(context.load_settings(config).database.url)
    try:
        is_new = schema.upgrade(engine)
    finally:
        engine.dispose()
    if is_new:
        place = db.name_place(engine.url)
        typer.echo(f"Made a new, empty database: {place}. If there was one before, restore that from a backup (docs/operations.md).")
    else:
        typer.echo("The database is up to date.")


@app.command()
def check(config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Say whether the database can be reached and has the schema of this version of Ratchet; exits 1 if not. Changes nothing."""
    from storage import db  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened:
        url = db.mask_passwords(opened.settings.database.url)
    typer.echo(f"{url} has the schema of this version.")
