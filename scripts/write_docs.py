"""Write the pages of `docs/` that follow from the code: `make docs`. tests/test_docs.py fails when one is out of date."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import typer.cli
from fastapi import FastAPI, routing
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from consumers import announcements, schemas
from daemon import agents, cli, config
from daemon.web import app as web
from storage import db

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

HTTP_API = """\
# HTTP API

The daemon answers on `server.host` and `server.port` (`127.0.0.1:8420`). `/openapi.json` is this page for programs. Programs send
`Authorization: Bearer TOKEN`; `ratchet tokens add NAME --role ROLE` makes one. What is refused gets
`{"error": {"field": …, "value": …, "remedy": …}}`. Of several events in one body the good ones are stored, and each gets its result.
The events themselves are described in [events.md](events.md). For people there are pages: `/login`, `/review` and `/status`.

This page is generated from the code: change the routes there, then run `make docs`.
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
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": kind, **SCHEMAS[kind]}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write_http_api() -> str:
    """`docs/http-api.md`: a heading for every route, and one for everything that is sent or answered."""
    app = create_api()
    api, roles = app.openapi(), dict(list_roles(app))
    lines = [HTTP_API, *_refusals(api), ""]
    for path, item in api["paths"].items():
        for method, operation in item.items():
            lines += [f"## `{method.upper()} {path}`", "", *_operation(operation, roles.get((method.upper(), path), ())), ""]
    lines += ["## What is sent and answered", ""]
    for name, schema in sorted(api["components"]["schemas"].items()):
        if "description" in schema:
            lines += [f"### {name}", "", *_schema(schema), ""]
    return "\n".join(lines).rstrip() + "\n"


def create_api() -> FastAPI:
    """The application of an installation without agents."""
    with tempfile.TemporaryDirectory() as folder:
        engine = db.open_engine(f"sqlite:///{folder}/docs.db")
        db.upgrade(engine)
        app = web.create_app(engine, config.Settings(), {}, lambda: datetime.now(UTC), lambda: None)
        engine.dispose()
    return app


def list_roles(app: FastAPI) -> Iterator[tuple[tuple[str, str], tuple[str, ...]]]:
    """Which roles `daemon.web.access.allow` lets through on each route."""
    for route in routing.iter_route_contexts(app.routes):
        dependant = getattr(route.original_route, "dependant", None)
        for one in dependant.dependencies if dependant else ():
            found = inspect.getclosurevars(one.call).nonlocals.get("roles") if inspect.isfunction(one.call) else None
            yield from (((method, route.path or ""), found) for method in route.methods or () if found)


def _refusals(api: dict[str, Any]) -> Iterator[str]:
    """What each status of a refusal means, once for all routes."""
    meanings: dict[str, str] = {}
    for item in api["paths"].values():
        for operation in item.values():
            meanings = {status: answer["description"] for status, answer in operation["responses"].items()} | meanings
    yield from ("| status | refused because |", "|---|---|")
    yield from (f"| {status} | {meanings[status]} |" for status in sorted(meanings) if _is_refusal(status))


def _is_refusal(status: str) -> bool:
    return int(status) >= HTTPStatus.BAD_REQUEST


def _operation(operation: dict[str, Any], roles: Sequence[str]) -> Iterator[str]:
    yield operation["description"].replace("\n", " ")
    if parameters := operation.get("parameters"):
        yield from ("", "| parameter | in | type | meaning |", "|---|---|---|---|")
        for one in parameters:
            yield f"| `{one['name']}` | {one['in']} | {_type(one['schema'])} | {one.get('description', '')} |"
    if body := operation.get("requestBody"):
        yield from ("", "| body | is |", "|---|---|")
        yield from (
            f"| `{name}` | {content['schema'].get('description') or _type(content['schema'])} |"
            for name, content in body["content"].items()
        )
    yield from ("", f"- Token of: {', '.join(roles) or 'nobody, it is open'}")
    for status, answer in sorted(operation["responses"].items()):
        if not _is_refusal(status):
            yield f"- {status}: {_answer(answer)}"
    if refusals := sorted(filter(_is_refusal, operation["responses"])):
        yield f"- Refusals: {', '.join(refusals)}"


def _answer(answer: dict[str, Any]) -> str:
    kinds = [_type(content.get("schema", {})) for content in answer.get("content", {}).values()]
    meaning = answer["description"].replace("Successful Response", "").rstrip(".")
    return "; ".join(filter(None, [" or ".join(dict.fromkeys(kinds)), meaning])) or "done"


def _schema(schema: dict[str, Any]) -> Iterator[str]:
    yield schema["description"].replace("\n", " ")
    if schema.get("properties"):
        yield from ("", "| field | type | always there |", "|---|---|---|")
        for name, field in schema["properties"].items():
            yield f"| `{name}` | {_type(field)} | {'yes' if name in schema.get('required', ()) else ''} |"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words; one that has a heading of its own by a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if several := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, several)))
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{schema.get('format') or schema.get('type', 'any')}"


SCHEMAS = schemas.json_schemas() | announcements.json_schemas()
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": write_configuration,
    "cli.md": write_cli,
    "http-api.md": write_http_api,
    **{f"schemas/{kind}.json": functools.partial(write_schema, kind) for kind in SCHEMAS},
}


def main() -> None:
    """Write every page."""
    (DOCS / "schemas").mkdir(exist_ok=True)
    for name, write in PAGES.items():
        (DOCS / name).write_text(write(), encoding="utf-8")
        sys.stdout.write(f"wrote docs/{name}\n")


if __name__ == "__main__":
    main()
