"""The topics: made as the configuration wants them, and compared with it before anything is read or written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from consumers import broker

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

HOUR_MS = 3_600_000
UNKNOWN, FORBIDDEN, ALREADY_EXISTS = 3, 29, 36
"""Kafka's error codes for a topic that is not there, that we may not see, and that is there."""


class TopicMissingError(broker.BrokerError):
    """A topic that events come from or go to is not there."""


class TopicRefusedError(broker.BrokerError):
    """The broker does not make a topic as it is wanted."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic as it should be."""

    name: str
    partitions: int
    replicas: int
    retention_hours: int
    min_in_sync: int


@dataclass(frozen=True, slots=True)
class Outlets:
    """The names of the topics that go out."""

    queue: str
    events: str
    dead_letters: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A topic as it is; `differs` says how from what is wanted, `None` partitions that it is missing."""

    name: str
    partitions: int | None = None
    replicas: int | None = None
    retention_hours: float | None = None
    min_in_sync: int | None = None
    differs: tuple[str, ...] = ()

    @property
    def is_well(self) -> bool:
        """Whether it is there and as it should be."""
        return self.partitions is not None and not self.differs


def create(access: broker.Access, wanted: Sequence[Topic]) -> list[str]:
    """Make the topics that are missing and leave the others alone; returns the new ones. Raises `TopicRefusedError`, as `connect`."""
    made, refused = [], []
    with broker.connect(access) as admin:
        for topic in wanted:
            options = {"num_partitions": topic.partitions, "replication_factor": topic.replicas, "configs": _to_configs(topic)}
            (told,) = admin.create_topics({topic.name: options}, raise_errors=False)["topics"]
            if not told["error_code"]:
                made.append(topic.name)
            elif told["error_code"] != ALREADY_EXISTS:
                refused.append(f"{topic.name}: {told['error_message']}")
        if refused:
            raise TopicRefusedError("the broker refuses to make " + "; ".join(refused))
        if made:
            admin.wait_for_topics(made)
    return made


def check(access: broker.Access, wanted: Sequence[Topic]) -> list[Finding]:
    """Compare each topic with what is wanted. Raises as `connect`."""
    with broker.connect(access) as admin:
        return [_compare(admin, topic) for topic in wanted]


def require(admin: KafkaAdminClient, names: Iterable[str]) -> None:
    """Raise `TopicMissingError` that names every topic that is not there: to Kafka's clients that is no error, they wait in silence.

    Raises `AccessRefusedError` for those that we may not see. What else is said of a topic passes, such as an election of its leader.
    """
    told = [(topic["name"], topic["error_code"]) for topic in admin.describe_topics(list(names))]
    missing, forbidden = (sorted(name for name, code in told if code == wanted) for wanted in (UNKNOWN, FORBIDDEN))
    if forbidden:
        raise broker.AccessRefusedError(f"we may not see the topic {', '.join(forbidden)}: give [kafka] user the rights")
    if missing:
        raise TopicMissingError(f"there is no topic {', '.join(missing)}: run `ratchet topics create`, or correct [kafka.topics]")


def _to_configs(topic: Topic) -> dict[str, str]:
    return {"retention.ms": str(topic.retention_hours * HOUR_MS), "min.insync.replicas": str(topic.min_in_sync)}


def _compare(admin: KafkaAdminClient, wanted: Topic) -> Finding:
    from kafka.admin import ConfigResource, ConfigResourceType  # noqa: PLC0415  the extra may be absent

    (told,) = admin.describe_topics([wanted.name])
    if told["error_code"]:
        return Finding(wanted.name)
    asked = ConfigResource(ConfigResourceType.TOPIC, wanted.name, dict.fromkeys(_to_configs(wanted)))
    configs = admin.describe_configs([asked], config_filter="all")["topic"][wanted.name]
    found = Finding(
        wanted.name,
        len(told["partitions"]),
        min(len(part["replica_nodes"]) for part in told["partitions"]),
        int(configs["retention.ms"]["value"]) / HOUR_MS,
        int(configs["min.insync.replicas"]["value"]),
    )
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in ("partitions", "replicas", "retention_hours", "min_in_sync")}
    differs = (f"{name} {is_now:g}, configured {wished}" for name, (is_now, wished) in pairs.items() if is_now != wished)
    return replace(found, differs=tuple(differs))
