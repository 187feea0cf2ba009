"""`ratchet alarms`: what a person should know."""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.cli import context

app = typer.Typer(help="Look at open alarms, and close those that are dealt with.", no_args_is_help=True)


class NoSuchAlarmError(LookupError):
    """There is no open alarm of this kind."""


@app.command("list")
def list_open(agent: context.AnyAgent = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print the open alarms, oldest first."""
    from storage import alarms  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        shown = ("raised_at", "agent", "kind", "message")
        found = alarms.list_open(connection, opened.filter_agent(agent))
    rows = [{name: row[name] for name in (*shown, *(["detail"] if as_json else []))} for row in found]
    context.print_rows(rows, as_json=as_json, nothing="No alarm is open.")


@app.command()
def clear(
    kind: Annotated[str, typer.Argument(help="The alarm's kind, as `ratchet alarms list` shows it.")],
    agent: context.AgentName = None,
    config: context.ConfigFile = context.CONFIG_FILE,
) -> None:
    """Close an alarm; it opens again when its cause comes again."""
    from storage import alarms, ledger  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        name, now = opened.pick_agent(agent).name, context.read_clock()
        if not alarms.clear(connection, name, kind, now):
            raise NoSuchAlarmError(f"{name} has no open alarm {kind!r}: `ratchet alarms list` shows them")
        ledger.append(connection, "alarm cleared", name, {"kind": kind, "actor": context.read_actor()}, now)
    typer.echo(f"The alarm {kind} of {name} is closed.")
