"""`ratchet tokens`: who may send predictions, answer reviews or operate."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from daemon.cli import context

app = typer.Typer(help="Give access, and take it away.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Who it is for; an expert's name is the one on their labels.")]


class Role(enum.StrEnum):
    """What a token allows."""

    producer = "producer"
    reviewer = "reviewer"
    operator = "operator"


@app.command()
def add(
    name: Name,
    role: Annotated[Role, typer.Option("--role", "-r", help="producer sends predictions, reviewer answers cases, operator settles.")],
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Make a token and print its secret, which is shown this once and stored nowhere."""
    from storage import tokens  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        secret = tokens.add(connection, name, role.value, context.read_clock())
    if as_json:
        context.print_json({"name": name, "role": role.value, "token": secret})
    else:
        typer.echo(secret)
        typer.echo(f"This token of {name} ({role.value}) is shown once: keep it. `ratchet tokens revoke {name}` ends it.", err=True)


@app.command("list")
def list_all(config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print names, roles and times; never a secret."""
    from storage import tokens  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        context.print_rows([dict(row) for row in tokens.list_all(connection)], as_json=as_json)


@app.command()
def revoke(name: Name, config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Make a token useless from now on; its name is never given again."""
    from storage import tokens  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        tokens.revoke(connection, name, context.read_clock())
    typer.echo(f"The token of {name} is revoked.")
