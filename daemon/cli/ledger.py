"""`ratchet ledger`: the hash chain of everything that was decided."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from daemon.cli import context

HASH = re.compile("[0-9a-f]{64}")

app = typer.Typer(help="Read the ledger, and prove that nobody changed it.", no_args_is_help=True)


@app.command()
def show(
    agent: context.AnyAgent = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many entries at most, the newest.")] = 50,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print the newest entries, newest first. Claims stand in it under a keyed digest, never by their id."""
    from storage import ledger  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        entries = ledger.show(connection, opened.filter_agent(agent), limit)
    rows = [{**{name: entry[name] for name in ("seq", "at", "agent", "kind")}, "body": json.loads(entry["body"])} for entry in entries]
    if as_json:
        rows = [{**row, "previous": entry["previous"], "hash": entry["hash"]} for row, entry in zip(rows, entries, strict=True)]
    context.print_rows(rows, as_json=as_json)


@app.command()
def verify(
    head: Annotated[str | None, typer.Option("--head", help="A hash noted earlier: the chain must still hold it.")] = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Walk the whole chain; exit 1 when a link does not hold. Note the head elsewhere: a cut end shows only against it."""
    from storage import ledger  # noqa: PLC0415 — `ratchet --help` needs none of it

    if head is not None and HASH.fullmatch(head) is None:
        remedy = "copy the 64 digits (0-9, a-f) that `ratchet ledger verify` printed then"
        raise typer.BadParameter(f"{head!r} is no hash: {remedy}", param_hint="--head")
    with context.opened(config) as opened, opened.reading() as connection:
        problems = ledger.verify(connection)
        if head is not None and not ledger.holds(connection, head):
            problems.append(f"no entry has the hash {head}: the chain was cut or replaced")
        entries, newest = ledger.head(connection)
    if as_json:
        context.print_json({"entries": entries, "head": newest, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{entries} entries, head {newest}: {'DAMAGED' if problems else 'whole'}.")
    if problems:
        raise typer.Exit(1)
