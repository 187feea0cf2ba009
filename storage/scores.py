"""Scores: what versions answer on stored claims when they are asked offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Text, and_, cast, exists, func, select
from sqlalchemy.orm import aliased

from storage import bulk
from storage.tables import Label, Prediction, Score


@dataclass(frozen=True, slots=True)
class Differing:
    """A claim on which two versions answer differently, why it was sent to an expert when it came in, and both versions' probabilities."""

    prediction: str
    claim_id: str
    candidate: str
    champion: str
    attributes: dict[str, Any]
    reasons: list[str]
    candidate_probabilities: list[float]
    champion_probabilities: list[float]


def insert_new(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store scores; a version's answer on a claim is stored once."""
    bulk.insert_many(connection, Score, rows)


def count_common(connection: Connection, agent: str, candidate: str, champion: str, since: str = "") -> int:
    """On how many claims, of those from the identifier `since` on, both versions were asked."""
    ours, theirs = aliased(Score), aliased(Score)
    both = select(func.count()).select_from(ours).join(theirs, and_(theirs.prediction == ours.prediction, theirs.agent == ours.agent))
    both = both.where(ours.agent == agent, ours.version == candidate, theirs.version == champion, ours.prediction >= since)
    return connection.execute(both).scalar_one()


def read_differing(connection: Connection, agent: str, candidate: str, champion: str, since: str = "") -> list[Differing]:
    """The claims, from the identifier `since` on, on which the two versions answer differently, in order of arrival."""
    ours, theirs = aliased(Score), aliased(Score)
    columns = (Prediction.id, Prediction.claim_id, ours.decision, theirs.decision, Prediction.attributes, Prediction.reasons)
    query = (
        select(*columns, ours.probabilities, theirs.probabilities)
        .join(ours, ours.prediction == Prediction.id)
        .join(theirs, and_(theirs.prediction == Prediction.id, theirs.agent == ours.agent))
        .where(ours.agent == agent, ours.version == candidate, theirs.version == champion, ours.decision != theirs.decision)
        .where(Prediction.id >= since)
        .order_by(Prediction.id)
    )
    return [Differing(*row) for row in connection.execute(query)]


def read_audited(connection: Connection, agent: str, version: str) -> list[tuple[str, str]]:
    """What the version answers on labelled claims that were drawn at random when they came in: (prediction, decision)."""
    query = (
        select(Score.prediction, Score.decision)
        .join(Prediction, Prediction.id == Score.prediction)
        .where(Score.agent == agent, Score.version == version, cast(Prediction.reasons, Text).like('%"audit"%'))
        .where(exists().where(Label.prediction == Prediction.id))
    )
    return [(row.prediction, row.decision) for row in connection.execute(query)]


def read_unscored(connection: Connection, agent: str, version: str, predictions: Sequence[str]) -> list[str]:
    """Which of these predictions the version has not been asked about."""
    query = select(Score.prediction).where(Score.agent == agent, Score.version == version, Score.prediction.in_(predictions))
    known = set(connection.execute(query).scalars())
    return [prediction for prediction in predictions if prediction not in known]


def read_scored(connection: Connection, agent: str, version: str, limit: int) -> list[str]:
    """The newest predictions that the version was asked about."""
    query = select(Score.prediction).where(Score.agent == agent, Score.version == version)
    return list(connection.execute(query.order_by(Score.prediction.desc()).limit(limit)).scalars())


def labelled_after(connection: Connection, predictions: Sequence[str], cut: int | None) -> set[str]:
    """Which of these predictions have a label that dataset version `cut` does not hold."""
    query = select(Label.prediction).where(Label.prediction.in_(predictions))
    query = query.where((Label.dataset.is_(None)) | (Label.dataset > (cut or 0)))
    return set(connection.execute(query).scalars())
