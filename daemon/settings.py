"""All settings there are: what can be set, within which limits, and what holds where nothing is said."""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, model_validator
from pydantic.fields import FieldInfo

from daemon.agents import Agent
from daemon.kafka import Kafka
from daemon.sections import HomePath, Section
from storage import db
from trainers import spec

PART = r"(cpu(:\d+)?|cuda:\d+)"
SLOT = rf"^(auto|{PART}(\+{PART})*)$"
AGENT_NAME = ("agents", "NAME", "name")
"""The one field that is no key: an agent is called as its table."""


class UnknownAgentError(LookupError):
    """There is no agent of this name."""


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
    heartbeat_seconds: float = Field(
        default=300,
        ge=1,
        description="A trainer that is silent for longer is taken for dead. One long call, such as loading a base, counts as a sign of "
        "life for up to an hour, as long as it computes, reads or writes.",
    )

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
    memory: dict[Annotated[str, Field(pattern=f"^{PART}$")], Annotated[float, Field(gt=0)]] = Field(
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
        mixed = next((slot for slot in self.slots if "cpu" in slot and "cuda" in slot), None)
        if mixed is not None:
            raise ValueError(f"slot {mixed} has cards and the CPU in one run, which can't add up gradients: use {mixed.split('+')}")
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
        """The agent of that name. Raises `UnknownAgentError` that names those there are."""
        if name not in self.agents:
            there = ", ".join(self.agents) or "none"
            raise UnknownAgentError(f"there is no agent {name!r}: the configuration has {there}")
        return self.agents[name]


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
