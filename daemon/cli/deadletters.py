"""`ratchet dead-letters`: what could not be handled, until somebody replays or discards it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from storage.dead_letters import Record

app = typer.Typer(help="Look at events that could not be handled; replay or discard them.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="The dead letter's id.")]


class UnknownTopicError(LookupError):
    """Nothing says which type of event a record holds."""


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
        found = dead_letters.show(connection, letter)
    if not as_json:  # what it does not have would only hide what it has: a record's value, or an event's data
        found = {name: value for name, value in found.items() if value is not None}
    context.print_item(found, as_json=as_json)


@app.command()
def replay(letter: Id, config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Handle a dead letter's event or record once more; exit 1 when it is parked again."""
    from storage import dead_letters  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        record = dead_letters.find_record(connection, letter)
        is_done = _replay_event(opened, connection, letter) if record is None else _replay_record(opened, connection, letter, record)
    if not is_done:
        raise typer.Exit(1)


def _replay_event(opened: context.Opened, connection: Connection, letter: str) -> bool:
    from consumers import handlers  # noqa: PLC0415 — `ratchet --help` needs none of it
    from daemon import policies  # noqa: PLC0415
    from storage import dead_letters, events  # noqa: PLC0415

    now = context.read_clock()
    dead_letters.replay(connection, letter, context.read_actor(), now)
    ulid = dead_letters.show(connection, letter)["event"]
    agents = policies.read_in_force(connection, opened.settings.agents, now)
    handlers.handle_batch(connection, events.read_unhandled(connection, [ulid]), agents, now)
    event = events.read(connection, ulid)
    state = event.state if event else "gone"
    typer.echo(f"The event {ulid} is {state}{f': {event.reason}' if event and event.reason else ''}.")
    return state != "dead"


def _replay_record(opened: context.Opened, connection: Connection, letter: str, record: Record) -> bool:
    from consumers import records  # noqa: PLC0415 — `ratchet --help` needs none of it
    from daemon import policies  # noqa: PLC0415
    from storage import dead_letters  # noqa: PLC0415

    now, kinds = context.read_clock(), opened.settings.kafka.topics.kinds()
    if record.topic not in kinds:
        raise UnknownTopicError(f"it came from the topic {record.topic}, and [kafka.topics] reads {' and '.join(kinds)}: name it there")
    agents = policies.read_in_force(connection, opened.settings.agents, now)
    outcome, refused = records.take(connection, records.read([record], kinds, agents, now), agents, now)
    for _, refusal in refused:
        typer.echo(f"It stays parked: {refusal}.")
    if refused:
        return False
    dead_letters.close_replayed(connection, letter, context.read_actor(), now)
    if outcome["conflict"]:
        typer.echo("Its id was used for other content meanwhile: it is parked anew, as a dead letter that says so.")
        return False
    typer.echo(f"The record is an event now: {', '.join(state for state, count in outcome.items() if count) or 'received'}.")
    return True


@app.command()
def discard(
    letter: Id,
    reason: Annotated[str, typer.Option("--reason", callback=context.require_reason, help="Why nobody needs it.")],
    config: context.ConfigFile = context.CONFIG_FILE,
) -> None:
    """Close a dead letter for good; its event stays in the log."""
    from storage import dead_letters  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.writing() as connection:
        dead_letters.discard(connection, letter, context.read_actor(), reason, context.read_clock())
    typer.echo(f"The dead letter {letter} is discarded.")
