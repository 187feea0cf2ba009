"""What commands share: the options that all take, the opened configuration and database, and how results are printed."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from daemon.agents import Agent
    from daemon.settings import Settings

PIPE_WIDTH = 1000

ConfigFile = Annotated[Path, typer.Option("--config", "-c", envvar="RATCHET_CONFIG", help="The configuration file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
CONFIG_FILE = Path("ratchet.toml")
AgentName = Annotated[str | None, typer.Option("--agent", "-a", help="The agent; may be left out where there is only one.")]
AnyAgent = Annotated[str | None, typer.Option("--agent", "-a", help="Only this agent.")]


class AgentNotNamedError(ValueError):
    """The command is about one agent, and there are several."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The configuration and the database that it names."""

    settings: Settings
    engine: Engine

    def reading(self) -> AbstractContextManager[Connection]:
        """One consistent view of the database."""
        from storage import db  # noqa: PLC0415 — `ratchet --help` needs none of it

        return db.reading(self.engine)

    def writing(self) -> AbstractContextManager[Connection]:
        """One transaction that may write."""
        from storage import db  # noqa: PLC0415 — `ratchet --help` needs none of it

        return db.writing(self.engine)

    def pick_agent(self, name: str | None) -> Agent:
        """The agent of that name, or the only one there is. Raises `AgentNotNamedError`, `UnknownAgentError`."""
        if name is None and len(self.settings.agents) != 1:
            raise AgentNotNamedError(f"say which agent with --agent: the configuration has {', '.join(self.settings.agents) or 'none'}")
        return self.settings.agent(name or next(iter(self.settings.agents)))

    def filter_agent(self, name: str | None) -> str | None:
        """The name as it was given, or None for all agents. Raises `UnknownAgentError` unless there is such an agent."""
        return None if name is None else self.settings.agent(name).name


def require_reason(reason: str) -> str:
    """What was given as a reason, unless it says nothing."""
    if not reason.strip():
        raise typer.BadParameter("the reason is empty: say why, an auditor will ask")
    return reason


def read_overrides(settings: Sequence[str] | None, method: str | None = None) -> dict[str, Any]:
    """The training options that `--set` and `--method` ask for, by key."""
    overrides = dict(map(_parse_setting, settings or ()))
    return overrides if method is None else {**overrides, "method": method}


def _parse_setting(setting: str) -> tuple[str, Any]:
    """The key and the value of `epochs=2` or `lora.rank=8`: the value is JSON where it can be read as such, else text."""
    key, is_there, value = setting.partition("=")
    if not is_there:
        raise typer.BadParameter(f"{setting!r} has no value: write KEY=VALUE", param_hint="--set")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def read_clock() -> datetime:
    """The time by the clock of this machine."""
    return datetime.now(UTC)


def read_actor() -> str:
    """Who runs this command, as the ledger names them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return f"uid-{os.getuid()}"


def load_settings(path: Path) -> Settings:
    """The settings in force. Raises `ConfigRefusedError`."""
    from daemon import config  # noqa: PLC0415 — `ratchet --help` needs none of it

    return config.load(path)


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """The configuration and its database, which has the schema of this version; closed afterwards. No more than errors is logged."""
    from daemon import logs  # noqa: PLC0415 — `ratchet --help` needs none of it
    from storage import db, schema  # noqa: PLC0415

    settings = load_settings(path)
    logs.configure("error", settings.log.format)
    engine = db.open_engine(settings.database.url)
    try:
        schema.check(engine)
        yield Opened(settings, engine)
    finally:
        engine.dispose()


def print_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool, nothing: str = "There is none yet.") -> None:
    """Print a listing: a table whose columns are the first row's keys, or a JSON array; `nothing` is said of an empty table."""
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(nothing)
    else:
        _print_table([str(name) for name in rows[0]], [[format_cell(value) for value in row.values()] for row in rows])


def print_item(item: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one thing: a line for each key, or a JSON object."""
    if as_json:
        print_json(item)
    else:
        width = max(map(len, item))
        for name, value in item.items():
            typer.echo(f"{name:<{width}}  {format_cell(value)}")


def print_json(value: Any) -> None:
    """Print `value` as JSON; times as ISO 8601, everything else that JSON lacks as text."""
    typer.echo(json.dumps(value, default=_plain, ensure_ascii=False, indent=2))


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def format_cell(value: Any) -> str:
    """One value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, bool | dict | list | tuple):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    return f"{value:.4g}" if isinstance(value, float) else str(_plain(value))


def _print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box, console, table, text  # noqa: PLC0415 — rich is slow to import

    grid = table.Table(*names, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*map(text.Text, row))  # a Text: brackets in a value are no markup
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console.Console(width=width, highlight=False).print(grid)
