"""Imported history is labelled cases."""

from __future__ import annotations

from datetime import datetime

import pytest
from sqlalchemy import Engine

from storage import db, labels
from storage.tables import Review
from tests.event_fixtures import handle, make_agent, make_history, rows, send

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_history_is_labelled_cases_and_comes_in_once(engine: Engine, now: datetime) -> None:
    for _ in range(2):
        send(engine, [make_history(number, now) for number in range(20)], now)
        handle(engine, make_agent(), now)
    with db.reading(engine) as connection:
        assert len(labels.read_settled(connection, "adjudication")) == 20
        assert labels.count_fresh(connection, "adjudication") == 0
    assert rows(engine, Review, "id") == []
