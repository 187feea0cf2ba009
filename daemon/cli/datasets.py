"""`ratchet datasets`: the immutable snapshots that versions were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

app = typer.Typer(help="Look at dataset versions, compare them, and prove that they are whole.", no_args_is_help=True)
Number = Annotated[int, typer.Argument(help="The dataset version's number.")]


@app.command("list")
def list_all(agent: context.AnyAgent = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print every dataset version with its rows for each split."""
    from storage import datasets  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        rows = datasets.list_all(connection, opened.filter_agent(agent))
    shown = ("agent", "number", "parent", "rows")
    counted = [{split: sum(answers.values()) for split, answers in row["manifest"]["splits"].items()} for row in rows]
    context.print_rows(
        [
            {**{name: row[name] for name in shown}, **counts, "created_at": row["created_at"], "root": row["root"]}
            for row, counts in zip(rows, counted, strict=True)
        ],
        as_json=as_json,
    )


@app.command()
def show(
    number: Number, agent: context.AgentName = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False
) -> None:
    """Print one dataset version's manifest and folder."""
    from storage import datasets  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        row = datasets.read(connection, opened.pick_agent(agent).name, number)
    context.print_item({"number": number, "folder": row["folder"], "created_at": row["created_at"], **row["manifest"]}, as_json=as_json)


@app.command()
def diff(
    old: Annotated[int, typer.Argument(metavar="A", help="The earlier number.")],
    new: Annotated[int, typer.Argument(metavar="B", help="The later number.")],
    agent: context.AgentName = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print which rows were added, removed or changed from A to B."""
    from storage import datasets, snapshots  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        name = opened.pick_agent(agent).name
        folders = [Path(datasets.read(connection, name, number)["folder"]) for number in (old, new)]
    changes = snapshots.diff(*folders)
    if as_json:
        context.print_json(changes)
        return
    typer.echo(", ".join(f"{len(rows)} {kind}" for kind, rows in changes.items()))
    for kind, rows in changes.items():
        for row in rows:
            typer.echo(f"{kind:<8} {row}")


@app.command()
def verify(
    number: Annotated[int | None, typer.Argument(help="Only this number; all by default.")] = None,
    agent: context.AnyAgent = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Recompute every digest and name each row that changed; exit 1 when something did."""
    from storage import datasets  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        if number is not None:
            rows = [datasets.read(connection, opened.pick_agent(agent).name, number)]
        else:
            rows = datasets.list_all(connection, opened.filter_agent(agent))
    results = [{"agent": row["agent"], "number": row["number"], "problems": _find_problems(row)} for row in rows]
    if as_json:
        context.print_json(results)
    else:
        for result in results:
            typer.echo(f"{result['agent']} {result['number']}: {'DAMAGED' if result['problems'] else 'whole'}")
            for problem in result["problems"]:
                typer.echo(f"  {problem}")
        if not results:
            typer.echo("There is none yet.")
    if any(result["problems"] for result in results):
        raise typer.Exit(1)


def _find_problems(row: RowMapping) -> list[str]:
    from storage import snapshots  # noqa: PLC0415 — `ratchet --help` needs none of it

    folder = Path(row["folder"])
    try:
        found = snapshots.verify(folder)
        is_written = snapshots.read_manifest(folder) == row["manifest"]
    except snapshots.SnapshotDamagedError as error:
        return [str(error)]
    return [*found, *([] if is_written else ["manifest.json is not the one that the database knows: restore it from a backup"])]
