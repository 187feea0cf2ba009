"""Predictions: what a model said about a claim, how it was routed, and the case that labels refer to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec import Struct
from msgspec.structs import astuple
from sqlalchemy import Connection, RowMapping, Text, bindparam, cast, exists, func, select

from storage import bulk, ids
from storage.tables import Label, Prediction


class New(Struct, frozen=True, gc=False):
    """A prediction before it is stored; imported history has no decision and was not routed."""

    id: str
    agent: str
    prediction_id: str
    claim_id: str
    group_key: str
    origin: str
    input_digest: str
    attributes: Mapping[str, Any]
    occurred_at: datetime
    received_at: datetime
    decision: str | None = None
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None
    model_version: str | None = None
    policy_version: int | None = None
    reasons: tuple[str, ...] = ()
    priority: float = 0.0
    effective_threshold: float | None = None
    inclusion_probability: float | None = None


def insert_new(connection: Connection, rows: Sequence[New]) -> int:
    """Store predictions; one that is there already stays as it is. Returns how many are new."""
    if not rows:
        return 0
    return bulk.insert_columns(connection, Prediction, dict(zip(New.__struct_fields__, zip(*map(astuple, rows), strict=True), strict=True)))


def read(connection: Connection, prediction: str) -> RowMapping | None:
    """One prediction by our own key."""
    return connection.execute(select(Prediction.__table__).where(Prediction.id == prediction)).mappings().first()


def find_known(connection: Connection, agent: str, prediction_ids: Sequence[str]) -> dict[str, str]:
    """Our keys of the predictions of an agent that are stored already, by the producer's prediction id."""
    query = select(Prediction.prediction_id, Prediction.id).where(
        Prediction.agent == agent, bulk.is_one_of(connection, Prediction.prediction_id, prediction_ids)
    )
    return {row.prediction_id: row.id for row in connection.execute(query)}


def find_labelled(
    connection: Connection, agent: str, *, claim_id: str | None, prediction_id: str | None, at: datetime
) -> RowMapping | None:
    """The prediction that a label means: the one it names, else the claim's latest at that time, else its first."""
    columns = select(Prediction.id, Prediction.claim_id, Prediction.decision, Prediction.origin).where(Prediction.agent == agent)
    if prediction_id is not None:
        return connection.execute(columns.where(Prediction.prediction_id == prediction_id)).mappings().first()
    of_claim = columns.where(Prediction.claim_id == claim_id)
    latest = of_claim.where(Prediction.occurred_at <= at).order_by(Prediction.occurred_at.desc(), Prediction.id.desc())
    first = of_claim.order_by(Prediction.occurred_at, Prediction.id)
    return connection.execute(latest.limit(1)).mappings().first() or connection.execute(first.limit(1)).mappings().first()


def read_routed(connection: Connection, agent: str, limit: int) -> list[tuple[float | None, str, dict[str, Any]]]:
    """Confidence, the JSON text of the routing reasons, and attributes of the newest served predictions, oldest first."""
    newest = _NEWEST.add_columns(Prediction.attributes)
    return list(reversed(connection.execute(newest, {"agent": agent, "limit": limit}).all()))


def read_confidences(connection: Connection, agent: str, limit: int) -> list[tuple[float | None, str]]:
    """Confidence and the JSON text of the routing reasons of the newest served predictions, oldest first."""
    return list(reversed(connection.execute(_NEWEST, {"agent": agent, "limit": limit}).all()))


_NEWEST = (
    select(Prediction.confidence, cast(Prediction.reasons, Text))
    .where(Prediction.agent == bindparam("agent"), Prediction.origin == "served")
    .order_by(Prediction.id.desc())
    .limit(bindparam("limit"))
)
"""Read for every batch and every single event: put together once."""


def read_recent(
    connection: Connection, agent: str, limit: int, *, unlabelled_only: bool, since: datetime | None = None
) -> list[RowMapping]:
    """The newest served predictions with their inputs, oldest first."""
    query = select(
        Prediction.id, Prediction.claim_id, Prediction.group_key, Prediction.input, Prediction.attributes, Prediction.occurred_at
    )
    query = query.where(Prediction.agent == agent, Prediction.origin == "served", Prediction.input.is_not(None))
    if unlabelled_only:
        query = query.where(~exists().where(Label.prediction == Prediction.id))
    if since is not None:
        query = query.where(Prediction.received_at >= since)
    rows = connection.execute(query.order_by(Prediction.id.desc()).limit(limit)).mappings().all()
    return list(reversed(rows))


def count_since(connection: Connection, agent: str, since: datetime) -> int:
    """How many predictions came in since then, and were served."""
    query = select(func.count()).select_from(Prediction).where(Prediction.agent == agent, Prediction.origin == "served")
    return connection.execute(query.where(Prediction.id >= ids.after(since - timedelta(milliseconds=1)))).scalar_one()


def has_served(connection: Connection, agent: str, names: Sequence[str]) -> bool:
    """Whether any prediction says that it was made by a model of one of these names."""
    query = select(Prediction.id).where(Prediction.agent == agent, Prediction.origin == "served", Prediction.model_version.in_(names))
    return connection.execute(query.limit(1)).first() is not None


def find_window_start(connection: Connection, agent: str, size: int) -> datetime:
    """When the oldest of the newest `size` served predictions came; the epoch when there are fewer."""
    found = connection.execute(_WINDOW_START, {"agent": agent, "newer": size - 1}).scalar()
    return found or datetime.fromtimestamp(0, UTC)


_WINDOW_START = (
    select(Prediction.received_at)
    .where(Prediction.agent == bindparam("agent"), Prediction.origin == "served")
    .order_by(Prediction.id.desc())
    .offset(bindparam("newer"))
    .limit(1)
)
"""Read as often as `_NEWEST`."""


def read_between(connection: Connection, agent: str, first: str, last: str) -> list[RowMapping]:
    """The inputs of the served predictions from one identifier to another."""
    query = select(Prediction.id, Prediction.input).where(Prediction.agent == agent, Prediction.origin == "served")
    query = query.where(Prediction.id.between(first, last), Prediction.input.is_not(None)).order_by(Prediction.id)
    return list(connection.execute(query).mappings())


def newest_ids(connection: Connection, agent: str, since: str, limit: int) -> list[str]:
    """The newest served predictions, from the identifier `since` on, whose input is there, oldest first."""
    query = select(Prediction.id).where(Prediction.agent == agent, Prediction.origin == "served", Prediction.id >= since)
    query = query.where(Prediction.input.is_not(None)).order_by(Prediction.id.desc()).limit(limit)
    return list(reversed(connection.execute(query).scalars().all()))


def of_claim(connection: Connection, claim_id: str, agent: str | None = None) -> list[RowMapping]:
    """Every prediction of a claim, oldest first, without its input."""
    columns = [column for column in Prediction.__table__.columns if column.name != "probabilities"]
    query = select(*columns).where(Prediction.claim_id == claim_id).order_by(Prediction.occurred_at)
    if agent:
        query = query.where(Prediction.agent == agent)
    return list(connection.execute(query).mappings())


def read_inputs(connection: Connection, predictions: Iterable[str]) -> dict[str, RowMapping]:
    """Input, attributes and group of predictions, by our own key."""
    columns = select(Prediction.id, Prediction.input, Prediction.attributes, Prediction.group_key, Prediction.claim_id)
    return {row["id"]: row for row in connection.execute(columns.where(bulk.is_one_of(connection, Prediction.id, predictions))).mappings()}
