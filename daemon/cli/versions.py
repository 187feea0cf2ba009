"""`ratchet versions`, `ratchet promote`, `ratchet rollback`: which versions there are, and which one is in service."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from daemon.agents import Agent

app = typer.Typer(help="Look at model versions, their exams and their deployments.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="V", help="The version, such as v1.2.")]
WITHOUT_DETAIL = {
    "requested": "its server was not heard, another process had the right to speak to it",
    "superseded": "a newer change of the champion came before its server confirmed",
}
GOES_ON = {
    "unconfirmed": "`ratchet up` goes on trying, and an alarm is open",
    "requested": "`ratchet up` goes on trying, and `ratchet versions history` shows what comes of it",
}
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept in the ledger.")]


@app.command("list")
def list_all(agent: context.AnyAgent = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print every version with its verdict, and which one is the champion."""
    from storage import registry  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        versions = registry.list_all(connection, opened.filter_agent(agent))
        champions = {name: registry.champion(connection, name) for name in {row["agent"] for row in versions}}
    rows = [
        {
            **{name: row[name] for name in ("agent", "name")},
            "is_champion": champions[row["agent"]] == row["name"],
            **{name: row[name] for name in ("verdict", "is_forced", "parent", "dataset", "created_at")},
            "serving_name": registry.serving_name(row),
        }
        for row in versions
    ]
    context.print_rows(rows, as_json=as_json)


@app.command()
def show(
    version: Name, agent: context.AgentName = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False
) -> None:
    """Print what a version is made of, its exams and watches with every number, and its deployments."""
    from storage import exams, registry, runs  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        chosen = opened.pick_agent(agent)
        name = chosen.name
        row = registry.read(connection, name, version)
        try:
            made = (runs.read(connection, row["run"] or "")["result"] or {}).get("training") or {}
        except runs.UnknownRunError:  # It was not trained here.
            made = {}
        item = {
            **dict(row),
            "serving_name": registry.serving_name(row),
            "is_champion": registry.champion(connection, name) == version,
            "method": made.get("method"),
            "examined_on": name_base(made.get("examined_in_4bit"), chosen.training.serve_in_4bit),
            "exams": [dict(exam) for exam in exams.of_version(connection, name, version)],
            "deployments": [dict(change) for change in registry.history(connection, name) if change["version"] == version],
        }
    if as_json:
        context.print_json(item)
    else:
        for line in outline(item):
            typer.echo(line)


@app.command()
def history(agent: context.AnyAgent = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print every change of the champion: when, what, who, why, and whether the server confirmed it."""
    from storage import registry  # noqa: PLC0415 — `ratchet --help` needs none of it

    shown = ("requested_at", "agent", "kind", "version", "previous", "state", "is_forced", "actor", "reason", "confirmed_at", "detail")
    with context.opened(config) as opened, opened.reading() as connection:
        rows = [{name: change[name] for name in shown} for change in registry.history(connection, opened.filter_agent(agent))]
    context.print_rows(rows, as_json=as_json)


def promote(
    version: Name,
    agent: context.AgentName = None,
    force: Annotated[bool, typer.Option("--force", help="Promote past a failed or missing verdict; marked for ever.")] = False,
    reason: Reason = "",
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Make a version the champion, publish it, and watch it against its predecessor; unconfirmed, it is taken back."""
    from daemon import deployments  # noqa: PLC0415 — `ratchet --help` needs none of it

    def change(connection: Connection, name: str) -> str:
        why = reason or ("" if force else "promoted by hand")
        return deployments.promote(connection, name, version, context.read_actor(), why, context.read_clock(), force=force)

    _change_champion(config, agent, change, as_json=as_json)


def rollback(
    reason: Annotated[str, typer.Option("--reason", callback=context.require_reason, help="Why; it is kept in the ledger.")],
    to: Annotated[str | None, typer.Option("--to", metavar="V", help="The version to go back to; the one before by default.")] = None,
    agent: context.AgentName = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Go back to an earlier version and publish it at once, whether or not the daemon is up; never taken back, only retried."""
    from daemon import deployments  # noqa: PLC0415 — `ratchet --help` needs none of it

    def change(connection: Connection, name: str) -> str:
        return deployments.rollback(connection, name, context.read_actor(), reason, context.read_clock(), to=to)

    _change_champion(config, agent, change, as_json=as_json)


def _change_champion(config: Any, agent: str | None, change: Callable[[Connection, str], str], *, as_json: bool) -> None:
    """Change the alias, publish, and say how long it took until the server confirmed; exit 1 when it did not."""
    from daemon import deployments  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened:
        chosen: Agent = opened.pick_agent(agent)
        with opened.writing() as connection:
            deployment = change(connection, chosen.name)
        began = time.monotonic()
        row = deployments.await_settled(opened.engine, chosen, deployment, context.read_clock)
        seconds = round(time.monotonic() - began, 3)
    shown = ("agent", "kind", "version", "previous", "state", "detail")
    if as_json:
        context.print_json({**{name: row[name] for name in shown}, "deployment": deployment, "seconds": seconds})
    else:
        why = row["detail"] or WITHOUT_DETAIL.get(row["state"], "nothing more is known")
        typer.echo(f"{row['agent']}: {row['previous'] or 'nothing'} → {row['version']}, {row['state']} after {seconds} s: {why}.")
    if row["state"] in GOES_ON:
        typer.echo(f"{row['version']} is the champion all the same: {GOES_ON[row['state']]}.", err=True)
    if row["state"] not in {"confirmed", "unverified"}:
        raise typer.Exit(1)


def name_base(examined: bool | None, served: bool) -> str | None:
    """What a version's scores were measured on, and whether servers are told to hold it otherwise now."""
    if examined is None:
        return None
    names = {True: "the base in 4 bits", False: "the whole base"}
    change = "" if examined == served else f": servers are told to use {names[served]} now, which answers a few claims otherwise"
    return names[examined] + change


def outline(value: Any, depth: int = 0) -> Iterator[str]:
    """A nested value as indented lines, for reading."""
    indent = "  " * depth
    for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value, start=1):
        if isinstance(inner, Mapping | list | tuple) and inner and not _is_flat(inner):
            yield f"{indent}{name}"
            yield from outline(inner, depth + 1)
        else:
            yield f"{indent}{name}: {context.format_cell(inner)}"


def _is_flat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str | int | float) for one in value) and len(value) <= 8  # noqa: PLR2004
