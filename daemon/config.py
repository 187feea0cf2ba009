"""The configuration: read once from `ratchet.toml` and `RATCHET_…`, checked, and passed down as a frozen value."""

from __future__ import annotations

import difflib
import json
import os
import sys
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, SecretStr, ValidationError, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from daemon.agents import Agent, HomePath, Section
from daemon.kafka import Kafka
from storage import db
from trainers import spec

FILE = "ratchet.toml"
PREFIX = "RATCHET_"
NO_SETTINGS = frozenset({"RATCHET_CONFIG", "RATCHET_TOKEN", "RATCHET_TEST_DATA"})
SLOT = r"^(auto|(cpu(:\d+)?|cuda:\d+)(\+(cpu(:\d+)?|cuda:\d+))*)$"
AGENT_NAME = ("agents", "NAME", "name")
"""The one field that is no key: an agent is called as its table."""


class ConfigRefusedError(ValueError):
    """The configuration can't be used; one line for each thing wrong, with its key, its value and what would be right."""


def _place_database(url: str, info: ValidationInfo) -> str:
    if url.startswith("sqlite:///"):
        name = url.removeprefix("sqlite:///")
        return url if not info.context or name == ":memory:" else f"sqlite:///{Path(info.context['home']) / name}"
    if url.startswith(("postgresql://", "postgresql+psycopg://")):
        db.parse_url(url)
        return url.replace("postgresql://", "postgresql+psycopg://", 1)
    raise ValueError("should be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME")


class Database(Section):
    """Where all state lives."""

    url: Annotated[str, AfterValidator(_place_database)] = Field(
        default="sqlite:///ratchet.db", description="`sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/NAME`."
    )
    connections: int = Field(
        default=db.CONNECTIONS, ge=3, le=1000, description="How many connections one process opens to PostgreSQL at most; 5 stay open."
    )


class Server(Section):
    """Where the daemon answers."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Any address but loopback needs a token to be defined first.")
    port: int = Field(default=8420, ge=0, le=65535, description="The API and the review page; 0 takes a free one.")
    ops_port: int = Field(default=8421, ge=0, le=65535, description="Health and metrics; 0 takes a free one.")
    max_body_bytes: int = Field(default=5_000_000, ge=1000, description="A longer request is refused with 413.")


class Log(Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="The least grave line that is written.")
    format: Literal["auto", "json", "text"] = Field(default="auto", description="`auto`: text in a terminal, JSON lines elsewhere.")


class Training(Section):
    """Where and how training runs are started."""

    python: str = Field(
        default_factory=lambda: sys.executable, min_length=1, description="The interpreter for the trainers; this one by default."
    )
    launcher: Literal["local", "ray"] = Field(
        default="local", description="`local` starts processes on this machine, `ray` jobs on a Ray cluster (extra `ray`)."
    )
    ray_address: str = Field(default="http://127.0.0.1:8265", description="`ray`: where the cluster's dashboard takes jobs.")
    store: str | None = Field(
        default=None,
        min_length=1,
        description="`ray`: where run folders travel, a URL that fsspec knows, such as `s3://bucket/runs` or `file:///mnt/shared/runs`.",
    )
    threads: int = Field(
        default=1, ge=0, description="CPU threads of a trainer; 0 leaves torch's default, which is slow where other work runs beside it."
    )
    seed: int = Field(default=0, ge=0, description="Mixed with a run's id into the run's own seed.")
    attempts: int = Field(default=3, ge=1, description="Attempts without a newer checkpoint before a run is parked.")
    backoff_seconds: float = Field(default=60, ge=0, description="Wait before the second attempt; doubled for each one after it.")
    heartbeat_seconds: float = Field(default=300, ge=1, description="A trainer that is silent for longer is taken for dead.")

    @model_validator(mode="after")
    def _a_cluster_has_a_store(self) -> Self:
        if self.launcher == "ray" and self.store is None:
            raise ValueError("`store` is missing: with launcher `ray` say where run folders travel, such as `s3://bucket/runs`")
        return self


class Devices(Section):
    """What runs may use, one run at a time on each."""

    slots: tuple[Annotated[str, Field(pattern=SLOT)], ...] = Field(
        default=("auto",),
        min_length=1,
        description="`auto` (each other card that there is, else the CPU), `cuda:N`, `cpu`, `cpu:1`, or several as `cuda:0+cuda:1`.",
    )
    memory: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description='GB that runs may take, where that is less than there is or the driver can\'t tell: `{ "cuda:0" = 20 }`.'
    )

    keep_warm_minutes: float = Field(
        default=0, ge=0, description="A trainer waits so long for the next run with the base in memory; 0: it ends with its run."
    )

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> Self:
        parts = [part for slot in self.slots for part in slot.split("+")]
        twice = next((part for part in parts if parts.count(part) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} stands in two slots: two runs would share it; a second place on the CPU is `cpu:1`")
        return self


class Storage(Section):
    """Where files are kept that are too large for the database."""

    snapshots: HomePath = Field(default=Path("snapshots"), description="Dataset versions.")
    adapters: HomePath = Field(default=Path("adapters"), description="Trained adapters, each in a folder named by its digest.")
    bases: HomePath = Field(
        default=Path("bases"), description="Bases that `full` and `pretrain` made, each in a folder named by its digest."
    )
    runs: HomePath = Field(default=Path("runs"), description="Run folders of the trainers.")


class Settings(Section):
    """All settings. Paths count from `home`."""

    home: HomePath = Field(default=Path(), description="The folder that everything lives in; that of `ratchet.toml` by default.")
    database: Database = Database()
    server: Server = Server()
    log: Log = Log()
    devices: Devices = Devices()
    training: Training = Training()
    storage: Storage = Storage()
    kafka: Kafka = Kafka()
    agents: Mapping[str, Agent] = Field(default={}, description="One table for each agent.")

    def agent(self, name: str) -> Agent:
        """The agent of that name. Raises `ConfigRefusedError` that names those there are."""
        if name not in self.agents:
            there = ", ".join(self.agents) or "none"
            raise ConfigRefusedError(f"there is no agent {name!r}: the configuration has {there}")
        return self.agents[name]


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
        lines = [_sentence(detail, sources, path) for detail in error.errors(include_url=False)]
        raise ConfigRefusedError("\n".join(dict.fromkeys(lines))) from error
    return Reading(settings, sources)


def describe(model: type[BaseModel] = Settings, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key there is with its field, sections after their own keys; an agent's name is `NAME`, a place in a list `N`."""
    sections: list[tuple[tuple[str, ...], type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        inner, place = section_of(field)
        if (inner is None or place == "N") and (*prefix, name) != AGENT_NAME:
            yield (*prefix, name), field
        if inner is not None:
            sections.append(((*prefix, name, place) if place else (*prefix, name), inner))
    for path, inner in sections:
        yield from describe(inner, path)


def section_of(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds if any, and how each is called where it holds many."""
    annotation: Any = field.annotation
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    place = {Mapping: "NAME", tuple: "N"}.get(origin, "")
    inner = arguments[0 if place == "N" else -1] if place else annotation
    is_section = isinstance(inner, type) and issubclass(inner, BaseModel) and not issubclass(inner, spec.Prompt)
    return (inner, place) if is_section else (None, "")


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
    if detail["type"] == "string_pattern_mismatch":
        return f"{where}: {key} = {_show(detail['input'], loc)}: should be {_describe(_general(loc))}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should").replace("String should", "should")
    return f"{where}: {key} = {_show(detail['input'], loc)}: {message}"


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
