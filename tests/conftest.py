"""What all tests share: a fresh database, a fixed clock, and the way to data outside the project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from storage import db
from tests import broker_fixtures

NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)


@pytest.fixture
def now() -> datetime:
    """A Monday morning in March, for tests that need a clock."""
    return NOW


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A fresh database with the current schema."""
    engine = db.open_engine(f"sqlite:///{tmp_path}/ratchet.db")
    db.upgrade(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def outside_data() -> Path:
    """The folder of public data that is not shipped with the project."""
    folder = os.environ.get("RATCHET_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RATCHET_TEST_DATA names no folder: data outside the project is absent")
    return Path(folder)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[broker_fixtures.Broker]:
    """A real Kafka broker, the same for all tests of this process: each test takes topics and groups of its own."""
    broker = broker_fixtures.make_broker(tmp_path_factory.mktemp("kafka"))
    yield broker
    broker.kill()
