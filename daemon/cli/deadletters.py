"""`ratchet dead-letters`: what could not be handled, until somebody replays or discards it."""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.cli import context

app = typer.Typer(help="Look at events that could not be handled; replay or discard them.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="The dead letter's id.")]


@app.command("list")
def list_parked(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="So many at most, the newest.")] = 100,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print what is parked, with the reason of each, newest first."""
    from storage import dead_letters  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        context.print_rows(
            [dict(row) for row in dead_letters.list_parked(connection, limit)], as_json=as_json, nothing="Nothing is parked."
        )


@app.command()
def show(letter: Id, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print one dead letter with its event's content, which may be a claim's."""
    from storage import dead_letters  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        context.print_item(dead_letters.show(connection, letter), as_json=as_json)


@app.command()
def replay(letter: Id, config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Handle a dead letter's event once more; exit 1 when it is parked again."""
    from consumers import handlers  # noqa: PLC0415 — `ratchet --help` needs none of it
    from daemon import policies  # noqa: PLC0415
    from storage import dead_letters, events  # noqa: PLC0415

    with context.opened(config) as opened, opened.writing() as connection:
        now = context.read_clock()
        dead_letters.replay(connection, letter, context.read_actor(), now)
        ulid = dead_letters.show(connection, letter)["event"]
        agents = policies.read_in_force(connection, opened.settings.agents, now)
        handlers.handle_batch(connection, events.read_unhandled(connection, [ulid]), agents, now)
        event = events.read(connection, ulid)
    state = event.state if event else "gone"
    typer.echo(f"The event {ulid} is {state}{f': {event.reason}' if event and event.reason else ''}.")
    if state == "dead":
        raise typer.Exit(1)


@app.command()
def discard(
    letter: Id,
    reason: Annotated[str, typer.Option("--reason", help="Why nobody needs it.")],
    config: context.ConfigFile = context.CONFIG_FILE,
) -> None:
    """Close a dead letter for good; its event stays in the log."""
    from storage import dead_letters  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        dead_letters.discard(connection, letter, context.read_actor(), reason, context.read_clock())
    typer.echo(f"The dead letter {letter} is discarded.")
