"""What all tests share: a fresh database, a fixed clock, and the way to data outside the project."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine

from storage import db

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
