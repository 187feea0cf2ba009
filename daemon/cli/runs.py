"""`ratchet runs`: training and scoring runs, as they go and as they ended."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import RowMapping

app = typer.Typer(help="Look at training and scoring runs.", no_args_is_help=True)
RunId = Annotated[str | None, typer.Argument(metavar="RUN", help="The run's id; the newest one by default.")]
LISTED = ("id", "agent", "kind", "state", "trigger", "version", "attempt", "created_at", "finished_at", "error")
POLL_SECONDS = 0.5


class NoRunError(LookupError):
    """There is no run yet."""


class RunEndedError(RuntimeError):
    """The run has ended and can't be cancelled any more."""


@app.command("list")
def list_all(
    agent: context.AnyAgent = None,
    limit: Annotated[int, typer.Option(min=1, help="So many of the newest.")] = 20,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print the newest runs, newest first."""
    from storage import runs  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened, opened.reading() as connection:
        rows = runs.list_all(connection, opened.filter_agent(agent), limit)
    context.print_rows([{name: row[name] for name in LISTED} for row in rows], as_json=as_json)


@app.command()
def show(run: RunId = None, config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print everything about one run."""
    with context.opened(config) as opened:
        row = dict(_read(opened, run))
    context.print_item(row if as_json else row | describe_memory(row), as_json=as_json)


def describe_memory(row: Mapping[str, Any]) -> dict[str, str]:
    """What a run was expected to take of its device and what it took, side by side; nothing where that is not known."""
    told = (row["result"] or {}).get("memory") or {}
    if not told.get("peak_bytes"):
        return {}
    took = f"{told['peak_bytes'] / 10**9:.2f} GB at the peak, passes of {told['max_tokens']:,} tokens"
    if told.get("calibrated_bytes"):
        took += f", {told['calibrated_bytes'] / 10**9:.2f} GB with the heaviest of them before the first step"
    halved = f", halved {told['halved']} times for want of memory" if told["halved"] else ""
    planned = told.get("plan")
    if planned is None:
        return {"memory": took + halved}
    card, counted = planned["card"], planned["total"] - (planned["parts"]["overhead"] if planned["card"]["kind"] == "cuda" else 0)
    return {"memory": f"planned {counted / 10**9:.2f} GB on {card['name']} ({card['memory'] / 10**9:.0f} GB), took {took}{halved}"}


@app.command()
def logs(run: RunId = None, config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Print what the trainer wrote, all attempts in order."""
    from daemon.launchers import choice  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened:
        row = _read(opened, run)
        launcher = choice.make_launcher(opened.settings)
    for attempt in _list_attempts(row):
        typer.echo(f"── attempt {attempt} ──")
        typer.echo(launcher.logs(Path(row["folder"]), attempt).rstrip())


@app.command()
def follow(run: RunId = None, config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Watch a run until it ends, with a live bar in a terminal; exit 1 unless it ends well."""
    with context.opened(config) as opened:
        chosen = _read(opened, run)["id"]
        row = _show_progress(_poll(opened, chosen))
    typer.echo(f"{row['kind']} run {row['id']} is {row['state']}{': ' + row['error'] if row['error'] else ''}")
    if row["state"] != "done":
        raise typer.Exit(1)


@app.command()
def cancel(
    run: RunId = None,
    reason: Annotated[
        str, typer.Option("--reason", "-r", callback=context.require_reason, help="Why; it is kept with the run.")
    ] = "cancelled by hand",
    config: context.ConfigFile = context.CONFIG_FILE,
) -> None:
    """End a run that has not ended; the daemon stops its process."""
    from storage import runs  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened:
        row = _read(opened, run)
        with opened.writing() as connection:
            if not runs.cancel(connection, row, f"{reason} ({context.read_actor()})", context.read_clock()):
                raise RunEndedError(
                    f"run {row['id']} is {runs.read(connection, row['id'])['state']}: only a run that goes on can be cancelled"
                )
    typer.echo(f"Run {row['id']} is cancelled.")


def _read(opened: context.Opened, run: str | None) -> RowMapping:
    from storage import runs  # noqa: PLC0415 — `ratchet --help` needs none of it

    with opened.reading() as connection:
        if run is not None:
            return runs.read(connection, run)
        newest = runs.list_all(connection, limit=1)
    if not newest:
        raise NoRunError('there is no run yet: `ratchet train --reason "…"` asks for one')
    return newest[0]


def _list_attempts(row: RowMapping) -> list[int]:
    found = Path(row["folder"]).glob("attempts/*") if row["folder"] else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def _poll(opened: context.Opened, run: str) -> Iterator[RowMapping]:
    """The run's row, again and again until it has ended."""
    from storage import runs  # noqa: PLC0415 — `ratchet --help` needs none of it

    while (row := _read(opened, run))["state"] not in runs.ENDED:
        yield row
        time.sleep(POLL_SECONDS)
    yield row


def _show_progress(rows: Iterator[RowMapping]) -> RowMapping:
    """Draw a bar on standard error while the rows come; returns the last one."""
    from rich import console, progress  # noqa: PLC0415 — rich is slow to import

    terminal = console.Console(stderr=True)
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TextColumn("{task.fields[figures]}"))
    with progress.Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as bar:
        task = bar.add_task("waiting", total=None, figures="")
        for row in rows:
            bar.update(task, **_describe(row))
    return row


def _describe(row: RowMapping) -> dict[str, Any]:
    """What the bar shows of a row."""
    told = row["progress"] or {}
    done, whole = told.get("step", told.get("rows")), told.get("steps", told.get("of"))
    figures = [f"{done}/{whole}" if whole else "", f"loss {told['loss']:.3f}" if told.get("loss") is not None else ""]
    figures.append(f"{told['tokens_per_second']:,.0f} tokens/s" if told.get("tokens_per_second") else "")
    figures.append(f"{told['eta_seconds']:.0f} s left" if told.get("eta_seconds") is not None else "")
    phase = told.get("phase") or row["state"]
    return {"description": phase, "completed": done or 0, "total": whole, "figures": "  ".join(filter(None, figures))}
