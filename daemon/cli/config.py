"""`ratchet config`: what is configured, and by whom."""

from __future__ import annotations

import typer

from daemon.cli import context

app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@app.command()
def show(config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print the effective values and where each came from; passwords are starred."""
    from daemon.config import read  # noqa: PLC0415 — `ratchet --help` needs none of it

    rows = [{"key": value.key, "value": value.value, "source": value.source} for value in read(config).values()]
    context.print_rows(rows, as_json=as_json)
