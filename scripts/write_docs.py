"""Write the pages of `docs/` that follow from the code: `make docs`. tests/test_docs.py fails when one is out of date."""

from __future__ import annotations

import enum
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer.cli
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from consumers import schemas
from daemon import agents, cli, config

DOCS = Path(__file__).parents[1] / "docs"

CONFIGURATION = """\
# Configuration

`ratchet init DIR` writes a commented `ratchet.toml`; every command finds it in the current folder, by `--config FILE` or by
`RATCHET_CONFIG`. It is read once, at start. An unknown key, a wrong type or a value out of range is refused with the key, the
value and what would be right. `ratchet config show` prints the values in force and where each came from.

Any key can be overridden by a variable: `RATCHET_`, then the key in capitals with `__` for each dot. So `server.port` is
`RATCHET_SERVER__PORT`, and the threshold of the agent `medical-analysis` is `RATCHET_AGENTS__MEDICAL_ANALYSIS__THRESHOLD`. Lists
are written as in TOML: `RATCHET_TRAINING__DEVICES='["cuda:0"]'`. Paths count from the folder of `ratchet.toml`.

This page is generated from the code: change the descriptions there, then run `make docs`.
"""

CLI = """\
<!-- Generated from the code by `make docs`. -->

"""


def write_configuration() -> str:
    """`docs/configuration.md`: a heading for every section and every key."""
    lines = [CONFIGURATION]
    section = None
    for path, field in config.describe():
        if path[:-1] != section:
            section = path[:-1]
            lines += [f"## {_section_title(section)}", "", _section_text(section), ""]
        lines += [f"### {_key(path)}", "", f"{field.description} {_default(field)}".strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def _section_title(section: tuple[str, ...]) -> str:
    if not section:
        return "Top level"
    return f"`[[{_key(section[:-1])}]]`" if section[-1] == "N" else f"`[{_key(section)}]`"


def _key(path: tuple[str, ...]) -> str:
    return ".".join(part for part in path if part != "N")


def _section_text(section: tuple[str, ...]) -> str:
    """The docstring of the section's model: its first line."""
    model: type[BaseModel] = config.Settings
    for part in section:
        if part not in {"NAME", "N"}:
            model = config.section_of(model.model_fields[part])[0] or model
    return (model.__doc__ or "").strip().splitlines()[0]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "Must be given."
    default = field.default
    if default in (None, PydanticUndefined):
        return ""
    return f"Default: `{_toml(default)}`."


def _toml(value: Any) -> str:
    """A default as it would be written in the file."""
    if isinstance(value, agents.Section):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path | enum.Enum) else str(value)


def write_cli() -> str:
    """`docs/cli.md`: a heading for every command."""
    group = typer.main.get_command(cli.app)
    context = typer.Context(group, info_name="ratchet")
    return CLI + typer.cli.get_docs_for_click(obj=group, ctx=context, name="ratchet", title="The command line").strip() + "\n"


def write_schema(kind: str) -> str:
    """`docs/schemas/KIND.json`: the JSON Schema of one type of event."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": kind, **schemas.json_schemas()[kind]}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": write_configuration,
    "cli.md": write_cli,
    **{f"schemas/{kind}.json": functools.partial(write_schema, kind) for kind in schemas.json_schemas()},
}


def main() -> None:
    """Write every page."""
    (DOCS / "schemas").mkdir(exist_ok=True)
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
