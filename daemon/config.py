"""The configuration: read once from `ratchet.toml` and `RATCHET_…`, checked, and passed down as a frozen value."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr, ValidationError
from pydantic_core import ErrorDetails

from consumers import schemas
from daemon.agents import Agent
from daemon.sections import NAME_PATTERN
from daemon.settings import AGENT_NAME, Settings, describe
from storage import db
from trainers import spec

FILE = "ratchet.toml"
PREFIX = "RATCHET_"
NO_SETTINGS = frozenset({"RATCHET_CONFIG", "RATCHET_TOKEN", "RATCHET_TEST_DATA"})


class ConfigRefusedError(ValueError):
    """The configuration can't be used; one line for each thing wrong, with its key, its value and what would be right."""


@dataclass(frozen=True, slots=True)
class Value:
    """One effective value: its dotted key, and `default`, `ratchet.toml` or the variable that it came from."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True, slots=True)
class Reading:
    """The settings, and which keys came from where."""

    settings: Settings
    sources: Mapping[tuple[str, ...], str]

    def values(self) -> Iterator[Value]:
        """Every effective value, passwords masked."""
        for path, value in _leaves(self.settings.model_dump(mode="json", exclude={"agents": {"__all__": {"name"}}})):
            yield Value(".".join(path), db.mask_passwords(value) if isinstance(value, str) else value, self._source(path))

    def _source(self, path: tuple[str, ...]) -> str:
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((self.sources[prefix] for prefix in prefixes if prefix in self.sources), "default")


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of `path` under the overrides of `environ`. Raises `ConfigRefusedError`."""
    return read(path, environ).settings


def read(path: Path, environ: Mapping[str, str] = os.environ) -> Reading:
    """As `load`, with the source of every value."""
    raw = _parse(path)
    sources = {key: FILE for key, value in _leaves(raw) if value != {}}
    for key, value, variable in _overrides(raw, environ):
        _put(raw, key, value, variable)
        sources[key] = variable
    home = path.resolve().parent / Path(str(raw.get("home", "."))).expanduser()
    try:
        settings = Settings.model_validate_json(json.dumps(_complete(raw, home), default=str), strict=True, context={"home": home})
    except ValidationError as error:
        lines = [_sentence(detail, sources, path) for detail in _leave_out_followers(error.errors(include_url=False))]
        raise ConfigRefusedError("\n".join(dict.fromkeys(lines))) from error
    return Reading(settings, sources)


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigRefusedError(f"{path} is missing: `ratchet init DIR` writes one, `--config FILE` names another") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefusedError(f"{path} can't be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigRefusedError(f"{path} isn't TOML: {error}") from error


def _complete(raw: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """Add what follows from the place of a table: the home, an agent's name, its pointer file."""
    agents = raw.get("agents", {})
    if isinstance(agents, dict):
        agents = {name: _complete_agent(name, agent) if isinstance(agent, dict) else agent for name, agent in agents.items()}
    return {**raw, "home": str(home), "agents": agents}


def _complete_agent(name: str, agent: Mapping[str, Any]) -> dict[str, Any]:
    if "name" in agent:
        raise ConfigRefusedError(f"unknown key agents.{name}.name: an agent is called as its table, so rename that")
    publisher = agent.get("publisher", {})
    if isinstance(publisher, dict) and publisher.get("kind", "pointer") == "pointer":
        publisher = {"path": f"serving/{name}/current.json", **publisher}
    return {**agent, "name": name, "publisher": publisher}


def _overrides(raw: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    for variable in sorted(environ.keys() - NO_SETTINGS):
        if variable.startswith(PREFIX):
            key = tuple(variable.removeprefix(PREFIX).lower().split("__"))
            key = _name_agent(key, raw.get("agents", {}), variable)
            yield key, _value(key, environ[variable]), variable


def _name_agent(key: tuple[str, ...], agents: Any, variable: str) -> tuple[str, ...]:
    """A shell knows no `-` in a variable's name, so `_` stands for it where an agent is named so."""
    if key[0] != "agents" or len(key) == 1 or not isinstance(agents, dict):
        return key
    names = {name.replace("-", "_"): name for name in agents}
    if key[1] not in names:
        raise ConfigRefusedError(f"{variable}: there is no agent {key[1]!r}: the configuration has {', '.join(agents) or 'none'}")
    return ("agents", names[key[1]], *key[2:])


def _value(key: tuple[str, ...], text: str) -> Any:
    """A variable's value: its text where the setting is a text, else what it means in TOML."""
    field = dict(describe()).get(_general(key))
    if field is not None and _takes_text(field.annotation):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _put(raw: dict[str, Any], key: tuple[str, ...], value: Any, variable: str) -> None:
    for depth, part in enumerate(key[:-1], start=1):
        raw = raw.setdefault(part, {})
        if not isinstance(raw, dict):
            raise ConfigRefusedError(f"{variable}: {'.'.join(key[:depth])} is a value, not a section with keys of its own")
    raw[key[-1]] = value


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _sentence(detail: ErrorDetails, sources: Mapping[tuple[str, ...], str], path: Path) -> str:
    loc = tuple(str(part) for part in detail["loc"])
    source = next((sources[loc[:length]] for length in range(len(loc), 0, -1) if loc[:length] in sources), FILE)
    where = str(path) if source == FILE else source
    key = ".".join(loc)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key {key} = {_show(detail['input'], loc)}: {_suggest(loc)}"
    if detail["type"] == "missing":
        return f"{where}: {key} is missing: it is {_describe(_general(loc))}"
    return f"{where}: {key} = {_show(detail['input'], loc)}: {_advise(detail, loc)}"


def _advise(detail: ErrorDetails, loc: tuple[str, ...]) -> str:
    """What would be right in place of a wrong value."""
    if detail["type"] != "string_pattern_mismatch":
        return schemas.advise(detail)
    return "should hold no line break and no tab" if detail["ctx"]["pattern"] == NAME_PATTERN else f"should be {_describe(_general(loc))}"


def _leave_out_followers(found: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """What is wrong, without a list that is too short only because an entry of it was refused."""
    for detail in found:
        parts = (one["loc"][: len(detail["loc"])] for one in found if len(one["loc"]) > len(detail["loc"]))
        if detail["type"] != "too_short" or detail["loc"] not in parts:
            yield detail


def _show(value: Any, loc: tuple[str, ...]) -> str:
    is_known = _general(loc) in dict(describe())
    if loc[0] == "kafka" and (not is_known or "password" in loc[-1]):
        return "***"  # a password, perhaps under a misspelt key or in the section as a whole
    text = json.dumps(value, ensure_ascii=False, default=str)
    shown = db.mask_passwords(text)
    return shown if len(shown) <= 120 else shown[:120] + "…"  # noqa: PLR2004


def _general(loc: tuple[str, ...]) -> tuple[str, ...]:
    """The key as `describe` calls it."""
    named = ("agents", "NAME", *loc[2:]) if loc[0] == "agents" and len(loc) > 1 else loc
    return tuple("N" if part.isdecimal() else part for part in named)


def _describe(loc: tuple[str, ...]) -> str:
    """What a key holds, as the end of a sentence; for an entry of a list, what the list holds."""
    fields = {**dict(describe()), AGENT_NAME: Agent.model_fields["name"]}
    field = next((fields[loc[:length]] for length in range(len(loc), 0, -1) if loc[:length] in fields), None)
    text = (field.description if field else None) or "described in docs/configuration.md"
    return text[0].lower() + text[1:].removesuffix(".")


def _suggest(loc: tuple[str, ...]) -> str:
    """The nearest known key: in the same section first, else one of that name elsewhere."""
    parent, name = _general(loc)[:-1], loc[-1]
    siblings = list(dict.fromkeys(path[len(parent)] for path, _ in describe() if len(path) > len(parent) and path[: len(parent)] == parent))
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"did you mean {'.'.join((*loc[:-1], near[0]))}?"
    if elsewhere := [".".join(path) for path, _ in describe() if path[-1] == name]:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{'.'.join(loc[:-1]) or 'the top level'} knows {', '.join(siblings)}"


def _takes_text(annotation: Any) -> bool:
    """Whether a field holds one text, a path or one of several words, so that a variable's text is its value."""
    origin = typing.get_origin(annotation)
    if origin in {typing.Union, types.UnionType}:
        return all(part is type(None) or _takes_text(part) for part in typing.get_args(annotation))
    return origin is Literal or (isinstance(annotation, type) and issubclass(annotation, str | Path | SecretStr | spec.Prompt))
